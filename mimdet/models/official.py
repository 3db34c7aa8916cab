"""Released MIMDet detectors, in detectron2's layout: loaded, recognised, and written back."""

import copy
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from mimdet.config import (
    MODEL_PART,
    Config,
    check_model_part,
    from_dict,
    model_part,
    named_code,
    to_dict,
)
from mimdet.files import write_file
from mimdet.models.checkpoint_files import CheckpointFile, read_checkpoint
from mimdet.models.detector import (
    Category,
    Detector,
    build_detector,
    category_entries,
    read_categories,
)
from mimdet.models.weights import LoadReport, Rule, check_sizes, load_exactly, stored, translate
from mimdet.presets import PRESETS
from mimdet.structures import generic_names

_BOTTOM_UP = "backbone.bottom_up"
BACKBONE_RULES: dict[str, list[Rule]] = {
    "mimdet": [
        (f"{_BOTTOM_UP}.encoder.patch_embed.proj.{{}}.", "backbone.stem.stage{}.", 1),
        (f"{_BOTTOM_UP}.encoder.", "backbone.encoder.", 0),
        (f"{_BOTTOM_UP}.decoder.decoder_embed.", "backbone.decoder.embed.", 0),
        (f"{_BOTTOM_UP}.decoder.conv_feat_proj.", "backbone.decoder.fill.proj.", 0),
        (f"{_BOTTOM_UP}.decoder.mask_token", "backbone.decoder.fill.token", 0),
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


PUBLISHED = (
    "mimdet_base",
    "mimdet_large",
    "mimdet_v1_base",
    "mimdet_v1_large",
    "benchmarking_vit_base",
)
# Constants that some versions of detectron2 stored.
DETECTRON2_CONSTANTS = r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\."


def load_weights(source: str | Path, cfg: Config | None = None) -> Detector:
    """The detector of a file of weights, in evaluation mode and float32.

    A file that `save_detector` wrote describes itself. Any other is a released MIMDet (detectron2's
    layout) or, with `cfg`, whatever that describes. Without `cfg` it must equal one of the
    published models in every name and shape, up to the grid of its position tables, which is read
    from the file; the detector then keeps tokens as the paper's code does (keep="padded") and
    evaluates at ratio 1, as the published APs. ValueError naming the file for everything else.
    """
    file = read_checkpoint(source)
    if cfg is None and "config" in file.metadata:
        return detector_of(file, *read_metadata(file))
    cfg = read_released(file, cfg)
    model = detector_of(file, cfg)
    model.categories, model.category_ids = coco_classes(cfg.detector.num_classes)
    name = f"{file.name} as {cfg.preset or 'cfg'}"
    print(LoadReport(name, list(file.tensors), [], [], notes=file.notes))
    return model


def detector_of(
    file: CheckpointFile, cfg: Config, categories: Sequence[Category] = (), **slots: Any
) -> Detector:
    """The detector that `cfg` describes with a file's tensors, in evaluation mode.

    ValueError for tensors that are not its own, and where they were trained with another
    configuration (`check_model_part`).
    """
    if MODEL_PART in file.metadata:
        check_model_part(file.metadata[MODEL_PART], cfg, file.name)
    b, d = cfg.backbone, cfg.detector
    counts = (b.depth, b.decoder_depth, *b.stage_depths, d.rpn_convs, d.box_convs, d.mask_convs)
    if max(counts) > len(file.tensors):
        raise ValueError(
            f"{file.name}: its configuration describes {max(counts):,} blocks in a row, the file "
            f"holds {len(file.tensors)} tensors"
        )
    build = partial(build_detector, cfg, **slots)
    if not slots and not named_code(cfg):  # code of others may not know of the meta device
        check_sizes(build, file.tensors, file.name)
    model = build()
    load_exactly(model, file.tensors, file.name)
    model.categories = [category.name for category in categories]
    model.category_ids = [category.id for category in categories]
    return model.eval()


def read_metadata(file: CheckpointFile) -> tuple[Config, list[Category]]:
    """Configuration and categories in a file that `save_detector` wrote."""
    try:
        cfg: Config = from_dict(msgspec.json.decode(file.metadata["config"]))
        categories = read_categories(file.metadata["categories"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file.name}: its configuration cannot be read: {error}") from error
    if named_code(cfg):
        raise ValueError(
            f"{file.name} names code of others ({', '.join(named_code(cfg))}), which a file of "
            "weights may not run: ask for the run's directory instead"
        )
    return cfg, categories


def read_released(file: CheckpointFile, cfg: Config | None) -> Config:
    """Give the file's tensors our names; -> what they belong to: `cfg`, or a published model."""
    if cfg is not None:
        d = cfg.detector
        rules = detectron2_rules(d.box_convs, d.rpn_convs, cfg.backbone.kind)
        file.tensors = from_detectron2(file, rules)
        return cfg
    # Only the baseline's blocks stand at the top of its backbone.
    plain_vit = any(name.startswith(f"{_BOTTOM_UP}.blocks.") for name in file.tensors)
    kind = "benchmarking_vit" if plain_vit else "mimdet"
    file.tensors = from_detectron2(file, detectron2_rules(kind=kind))
    cfg = match_preset(file.name, file.tensors)
    cfg.backbone.keep = "padded"
    return cfg


def coco_classes(count: int) -> tuple[list[str], list[int]]:
    """COCO's 80 names and ids, which a file of 80 classes is taken to mean; else "class 1", ..."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    every_id = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # 0..90, with gaps
    ids = [number for number, name in enumerate(every_id) if name not in ("__background__", "N/A")]
    if count != len(ids):
        return generic_names(count), list(range(1, count + 1))
    return [every_id[number] for number in ids], ids


def from_detectron2(file: CheckpointFile, rules: list[Rule]) -> dict[str, Tensor]:
    """The file's tensors under our names; our own names are left as they are."""
    if any(name.startswith("neck.") for name in file.tensors):
        return file.tensors
    if "blocks.0.attn.qkv.weight" in file.tensors or "vit.layernorm.weight" in file.tensors:
        raise ValueError(
            f"{file.name} is a masked autoencoder, not a detector: load_mae(model, ...) starts a "
            "detector from it (--init-from in `mimdet train`)"
        )
    tensors = {}
    for name, value in file.tensors.items():
        try:
            tensors[translate(name, rules)] = value
        except KeyError:
            if not re.match(DETECTRON2_CONSTANTS, name):
                raise ValueError(
                    f"{file.name}: none of the published models has a tensor {name!r}. If it is a "
                    "MIMDet of other sizes, describe it: load_detector(file, cfg=...)"
                ) from None
    return tensors


def match_preset(name: str, tensors: dict[str, Tensor]) -> Config:
    """The published model with exactly these names and shapes. ValueError: ask for cfg=."""
    shapes = {key: value.shape for key, value in tensors.items()}
    others: list[tuple[int, str, str]] = []
    kind = "benchmarking_vit" if "backbone.adaptor.1.weight" in shapes else "mimdet"
    for preset in PUBLISHED:
        cfg = PRESETS[preset]()
        if cfg.backbone.kind != kind:
            continue
        table = shapes.get("backbone.encoder.pos_embed")
        if kind == "mimdet" and table is not None and len(table) == 3:
            cfg.backbone.position_grid = round((table[1] - 1) ** 0.5)
        with torch.device("meta"):
            own = {key: value.shape for key, value in build_detector(cfg).state_dict().items()}
        different = [key for key in {**own, **shapes} if own.get(key) != shapes.get(key)]
        if not different:
            return cfg
        others.append((len(different), preset, different[0]))
    count, closest, key = min(others, key=lambda other: other[0])
    shape = tuple(shapes[key]) if key in shapes else "absent"
    raise ValueError(
        f"{name} is none of the published models: closest is {closest}, but {count} tensors "
        f"differ, first {key!r} ({shape} in the file). Describe it: load_detector(file, cfg=...)"
    )


def export_detectron2(model: Detector, path: str | Path) -> None:
    """Write a detector in the layout of the released checkpoints, for the original's own tools.

    The file is {"model": tensors}, which detectron2's checkpointer reads. Raises ValueError naming
    a part the original does not have.
    """
    d, kind = model.config.detector, model.config.backbone.kind
    if kind not in BACKBONE_RULES:
        raise ValueError(f"the original MIMDet has no counterpart of a {kind!r} backbone")
    rules = detectron2_rules(d.box_convs, d.rpn_convs, kind)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        try:
            theirs = translate(name, rules, back=True)
        except KeyError:
            raise ValueError(f"the original MIMDet has no counterpart of {name!r}") from None
        state[theirs] = value.detach().cpu().contiguous().clone()
    write_file(path, lambda partial: torch.save({"model": state}, partial))


def save_detector(model: Detector, path: str | Path, *, half: bool = False) -> None:
    """Write a detector so that `mimdet.load_detector(path)` needs nothing else.

    half: store float16, half the size; scores change in the third digit. Raises ValueError for a
    detector with parts written in a notebook: a file of numbers cannot hold them, its run can.
    """
    cfg = copy.deepcopy(model.config)
    if ":" in cfg.data.source:
        cfg.data.source = "coco"  # a data set of one's own stays with the run
    own = [*model.slots, *named_code(cfg)]
    if own:
        raise ValueError(
            f"the detector has parts of its own ({', '.join(own)}), whose code one file of "
            "weights cannot hold: share the run's directory instead"
        )
    metadata = {
        "config": json.dumps(to_dict(cfg)),
        "categories": json.dumps(category_entries(model)),
        MODEL_PART: model_part(cfg),
    }
    write_file(path, lambda partial: save_file(stored(model, half), partial, metadata))
