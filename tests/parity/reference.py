"""The original implementation's reference tensors, and our detector on the original's weights."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import mimdet
from mimdet import presets
from mimdet.config import BackboneConfig, Config, DetectorConfig
from mimdet.models.backbones import MIMDetBackbone
from mimdet.models.detector import Detector, build_detector
from mimdet.models.official import detectron2_rules
from mimdet.models.sampling import Sample
from mimdet.models.vit import MaskTokenFill
from mimdet.models.weights import translate
from mimdet.structures import Target
from mimdet.training.optim import parameter_groups

RATIOS = {"eval_sr1": 1.0, "eval_sr075": 0.75, "eval_sr05": 0.5, "train_sr05": 0.5}


def our_name(official: str, kind: str = "mimdet") -> str:
    return translate(official, detectron2_rules(kind=kind))


@cache
def stored_json(path: Path) -> Any:
    return json.loads(path.with_suffix(".json").read_text())


@cache
def reference(path: Path) -> dict[str, Tensor]:
    return load_file(path.with_suffix(".safetensors"))


def original_heads(preset: dict[str, Any], **fields: Any) -> DetectorConfig:
    convs = len(preset["mask_convs"]) - 1
    fields |= {"num_classes": preset["ncls"], "channels": preset["fpn"], "mask_convs": convs}
    return DetectorConfig(box_fc_dim=preset["fc"], **fields)


def original_config(folder: Path) -> Config:
    """What the reference's config.json describes, as one of ours."""
    preset = stored_json(folder / "config")["preset"]
    return Config(
        backbone=BackboneConfig(
            embed_dim=preset["embed_dim"],
            depth=preset["depth"],
            num_heads=preset["heads"],
            decoder_dim=preset["dec_dim"],
            decoder_depth=preset["dec_depth"],
            decoder_heads=preset["dec_heads"],
            drop_path=0.0,
            position_grid=preset["img_size"] // 16,
            keep="padded",
            decoder_fill="mask_token" if "v1" in folder.name else "stem",
        ),
        detector=original_heads(preset),
    )


def load_original(folder: Path, cfg: Config | None = None) -> Detector:
    """Our detector with the original's weights, through the public loader."""
    return mimdet.load_detector(folder / "model.safetensors", cfg or original_config(folder))


def same_number(shape: list[int], kind: str = "torch.float32", number: float = 0.5) -> Tensor:
    """For files of which names and shapes count. Whole, as in real files: views are refused."""
    return torch.full(shape, number, dtype=getattr(torch, kind.split(".")[1]))


Groups = dict[str, tuple[float, float]]


def optimiser_groups(
    golden: Path, name: str, preset: str, kind: str = "mimdet"
) -> tuple[Groups, Groups]:
    """Learning rate and weight decay of every parameter at batch 64, ours and the original's."""
    stored = stored_json(golden / f"optimizer_groups_{name}")
    expected = {
        our_name(name, kind): (group["lr"], group["weight_decay"])
        for group in stored
        for name in group["params"]
    }
    cfg = presets.PRESETS[preset]()
    with torch.device("meta"):
        model = build_detector(cfg)
    groups = parameter_groups(model, cfg.training)
    ours = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert list(cfg.training.betas) == stored[0]["betas"]
    return ours, expected


def input_images(folder: Path) -> list[Tensor]:
    stored = np.load(folder / "images.npz")
    return [torch.from_numpy(stored[name]).permute(2, 0, 1) for name in sorted(stored.files)]


def original_sample(tensors: dict[str, Tensor], run: str) -> Sample:
    """The tokens the original kept: ids_restore[j] is the rank of place j of the padded grid."""
    grid: tuple[int, int] = tuple(tensors["grid_hw"].tolist())  # type: ignore[assignment]
    count = int(grid[0] * grid[1] * RATIOS[run])
    return Sample(list(tensors["ids_restore"].argsort(dim=1)[:, :count]), grid)


def forward(
    model: Detector,
    images: list[Tensor],
    sample: Sample | None = None,
    targets: list[Target] | None = None,
) -> tuple[dict[str, Any], Any]:
    """Everything the reference names, under its names, and what the detector returns."""
    seen: dict[str, Any] = {}

    def keep_rpn(module: object, given: object, output: tuple[list[Tensor], list[Tensor]]) -> None:
        for level, (logits, deltas) in enumerate(zip(*output, strict=True), start=2):
            seen[f"rpn_logits_p{level}"], seen[f"rpn_deltas_p{level}"] = logits, deltas

    def keep_boxes(module: object, given: object, output: tuple[Tensor, Tensor]) -> None:
        seen["box_cls_logits"], seen["box_deltas"] = output[0], output[1].flatten(1)

    def keep(**names: Any) -> Any:
        def hook(module: object, given: tuple[Any, ...], output: Any) -> None:
            seen.update({name: read(given, output) for name, read in names.items()})

        return hook

    backbone, heads = model.backbone, model.roi_heads
    hooks = {
        model.neck: lambda module, given, output: seen.update(given[0] | output),
        model.rpn.head: keep_rpn,
        model.rpn: keep(proposals=lambda given, out: out[0]),
        heads.box_pool: keep(box_pooled=lambda given, out: out),
        heads.box_head.features: keep(box_head_feat=lambda given, out: out),
        heads.box_head: keep_boxes,
        heads.mask_pool: keep(mask_pooled=lambda given, out: out),
    }
    if isinstance(backbone, MIMDetBackbone):
        hooks |= {
            backbone: keep(preprocessed_images=lambda given, out: given[0]),
            backbone.stem: keep(conv_stem_last_map=lambda given, out: out.tokens),
            backbone.encoder: keep(encoder_tokens=lambda given, out: torch.stack(out)),
            backbone.decoder: keep(decoder_map=lambda given, out: out),
        }
        if isinstance(backbone.decoder.fill, MaskTokenFill):
            first = backbone.decoder.blocks[0]
            hooks[first] = keep(decoder_block0_input=lambda given, out: given[0])
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    result = model(images, targets, sample=sample)
    for handle in handles:
        handle.remove()
    return seen, result


def relative(ours: Tensor, original: Tensor) -> float:
    """max |a - b| / max |b|"""
    assert ours.shape == original.shape
    return ((ours.detach() - original).abs().max() / original.abs().max()).item()
