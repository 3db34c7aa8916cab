"""Names of other people's tensors <-> ours: one table per origin, readable in both directions."""

import re
from collections.abc import Sequence

Rule = tuple[str, str, int]
"""(start of their name, start of ours, our number minus theirs); `{}` stands for a number, and what
follows the start is equal on both sides. The first rule that fits counts."""


def translate(name: str, rules: Sequence[Rule], *, back: bool = False) -> str:
    """Their name -> ours; with back=True ours -> theirs. KeyError for a name no rule knows."""
    for theirs, ours, shift in rules:
        source, target = (ours, theirs) if back else (theirs, ours)
        found = re.match(re.escape(source).replace(r"\{\}", r"(\d+)"), name)
        if found:
            number = int(found[1]) + (-shift if back else shift) if found.groups() else 0
            return target.format(number) + name[found.end() :]
    raise KeyError(name)


_BOTTOM_UP = "backbone.bottom_up"
BACKBONE_RULES: dict[str, list[Rule]] = {
    "mimdet": [
        (f"{_BOTTOM_UP}.encoder.patch_embed.proj.{{}}.", "backbone.stem.stage{}.", 1),
        (f"{_BOTTOM_UP}.encoder.", "backbone.encoder.", 0),
        (f"{_BOTTOM_UP}.decoder.decoder_embed.", "backbone.decoder.embed.", 0),
        (f"{_BOTTOM_UP}.decoder.conv_feat_proj.", "backbone.decoder.stem_proj.", 0),
        (f"{_BOTTOM_UP}.decoder.mask_token", "backbone.decoder.mask_token", 0),
        (f"{_BOTTOM_UP}.decoder.decoder_", "backbone.decoder.", 0),
    ],
    "benchmarking_vit": [
        (f"{_BOTTOM_UP}.patch_embed.proj.", "backbone.stem.patchify.", 0),
        (f"{_BOTTOM_UP}.pos_embed", "backbone.encoder.pos_embed", 0),
        (f"{_BOTTOM_UP}.blocks.", "backbone.encoder.blocks.", 0),
        (f"{_BOTTOM_UP}.windowed_rel_pos_bias.", "backbone.encoder.window_bias.", 0),
        (f"{_BOTTOM_UP}.global_rel_pos_bias.", "backbone.encoder.global_bias.", 0),
        (f"{_BOTTOM_UP}.ms_adaptor.", "backbone.adaptor.", 0),
    ],
}
"""The backbones of released checkpoints, by `backbone.kind`."""


def detectron2_rules(box_convs: int = 4, rpn_convs: int = 2, kind: str = "mimdet") -> list[Rule]:
    """Released MIMDet checkpoints (detectron2's layout) <-> `Detector`.

    detectron2 counts convolutions from 1 and pyramid levels from 2; a single RPN convolution has
    no number there. A `kind` of backbone that was never released has no names but ours.
    """
    head = "proposal_generator.rpn_head"
    rpn_conv: Rule = (f"{head}.conv.conv{{}}.", "rpn.head.conv.{}.0.", 0)
    if rpn_convs == 1:
        rpn_conv = (f"{head}.conv.", "rpn.head.conv.0.0.", 0)
    return [
        *BACKBONE_RULES.get(kind, []),
        ("backbone.fpn_lateral{}.norm.", "neck.pyramid.inner_blocks.{}.1.", -2),
        ("backbone.fpn_output{}.norm.", "neck.pyramid.layer_blocks.{}.1.", -2),
        ("backbone.fpn_lateral{}.", "neck.pyramid.inner_blocks.{}.0.", -2),
        ("backbone.fpn_output{}.", "neck.pyramid.layer_blocks.{}.0.", -2),
        rpn_conv,
        (f"{head}.objectness_logits.", "rpn.head.cls_logits.", 0),
        (f"{head}.anchor_deltas.", "rpn.head.bbox_pred.", 0),
        # The numbered convolutions are followed by a flattening and the one linear layer.
        ("roi_heads.box_head.fc1.", f"roi_heads.box_head.features.{box_convs + 1}.", 0),
        ("roi_heads.box_head.conv{}.norm.", "roi_heads.box_head.features.{}.1.", -1),
        ("roi_heads.box_head.conv{}.", "roi_heads.box_head.features.{}.0.", -1),
        ("roi_heads.box_predictor.", "roi_heads.box_head.", 0),
        ("roi_heads.mask_head.mask_fcn{}.norm.", "roi_heads.mask_head.features.{}.1.", -1),
        ("roi_heads.mask_head.mask_fcn{}.", "roi_heads.mask_head.features.{}.0.", -1),
        ("roi_heads.mask_head.deconv.", "roi_heads.mask_head.predictor.conv5_mask.", 0),
        ("roi_heads.mask_head.predictor.", "roi_heads.mask_head.predictor.mask_fcn_logits.", 0),
    ]


MAE_RULES: list[Rule] = [
    ("pos_embed", "encoder.pos_embed", 0),
    ("blocks.{}.", "encoder.blocks.{}.", 0),
    ("norm.", "encoder.norm.", 0),
    ("decoder_embed.", "decoder.embed.", 0),
    ("decoder_pos_embed", "decoder.pos_embed", 0),
    ("decoder_blocks.{}.", "decoder.blocks.{}.", 0),
    ("decoder_norm.", "decoder.norm.", 0),
    ("mask_token", "decoder.mask_token", 0),
    ("patch_embed.proj.", "stem.patchify.", 0),
]
"""Meta's MAE files <-> a MIMDet backbone. The paper's ConvStem has no counterpart; the patchify
stem of the ablation takes MAE's patch embedding."""

_HF_LAYER = {
    "attention.attention.query.": "attn.query.",
    "attention.attention.key.": "attn.key.",
    "attention.attention.value.": "attn.value.",
    "attention.output.dense.": "attn.proj.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
HF_RULES: list[Rule] = [
    *((f"vit.encoder.layer.{{}}.{a}", f"blocks.{{}}.{b}", 0) for a, b in _HF_LAYER.items()),
    *(
        (f"decoder.{layers}.{{}}.{a}", f"decoder_blocks.{{}}.{b}", 0)
        for layers in ("decoder_layers", "decoder_encoder.layer")  # transformers 4; saved by 5
        for a, b in _HF_LAYER.items()
    ),
    ("vit.embeddings.cls_token", "cls_token", 0),
    ("vit.embeddings.position_embeddings", "pos_embed", 0),
    ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj.", 0),
    ("vit.layernorm.", "norm.", 0),
    ("decoder.mask_token", "mask_token", 0),
    ("decoder.", "", 0),  # decoder.decoder_embed and so on
]
"""`facebook/vit-mae-*` on the Hugging Face hub <-> Meta's names, query, key and value apart."""
