"""Benchmarking ViT, the paper's baseline, against tensors of its re-implementation by the authors.

Errors are relative, max |a - b| / max |b|, unless a unit is given.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mimdet
from mimdet import presets
from mimdet.analysis.cost import cost_of
from mimdet.config import BackboneConfig, Config, DetectorConfig
from mimdet.images import Resize
from mimdet.inference import to_original
from mimdet.models.baselines import moco_table, relative_index
from mimdet.models.detector import Detector, build_detector
from mimdet.models.official import detectron2_rules, export_detectron2, match_preset
from mimdet.models.weights import translate
from mimdet.structures import Detections, probabilities_to_rle, rle_to_bitmap
from mimdet.training.optim import parameter_groups
from tests.parity.reference import input_images, reference, relative
from tests.parity.test_mimdet_small import compare_detections, compare_proposals, largest

WHERE = "benchmarking_small eval"
FEATURES = 1e-5  # maps
HEADS = 1e-4  # logits and deltas of boxes that are pooled 1e-4 px apart
KINDS = ("float32", "int64")
RULES = detectron2_rules(kind="benchmarking_vit")
STAGES = {"s0": "c2", "s1": "c3", "s2": "c4", "s3": "c5"}


def our_name(official: str) -> str:
    return translate(official, RULES)


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "benchmarking_small"


def original_config(folder: Path) -> Config:
    preset = json.loads((folder / "config.json").read_text())["preset"]
    return Config(
        backbone=BackboneConfig(
            kind="benchmarking_vit",
            embed_dim=preset["embed"],
            depth=preset["depth"],
            num_heads=preset["heads"],
            drop_path=0.0,
            position_grid=preset["img"] // 16,
            window_size=preset["win"],
            sample_ratio=1.0,
            sample_ratio_eval=1.0,
        ),
        detector=DetectorConfig(
            num_classes=preset["ncls"],
            canvas=preset["img"],
            channels=preset["fpn"],
            box_fc_dim=preset["fc"],
            mask_convs=len(preset["mask_convs"]) - 1,
        ),
    )


def load_original(folder: Path) -> Detector:
    return mimdet.load_detector(folder / "model.safetensors", original_config(folder))


def contents(folder: Path) -> list[Tensor]:
    """The images without their grey padding: (3, h, w) uint8."""
    sizes = json.loads((folder / "config.json").read_text())["preset"]["content"]
    squares = input_images(folder)
    return [square[:, :h, :w] for square, (h, w) in zip(squares, sizes, strict=True)]


def forward(model: Detector, images: list[Tensor]) -> tuple[dict[str, Any], list[Detections]]:
    """Everything the reference names, under its names, and the detections."""
    seen: dict[str, Any] = {}

    def keep_neck(module: object, given: tuple[dict[str, Tensor], ...], output: Any) -> None:
        seen.update({theirs: given[0][ours] for theirs, ours in STAGES.items()} | output)

    def keep_rpn(module: object, given: object, output: tuple[list[Tensor], list[Tensor]]) -> None:
        for level, (logits, deltas) in enumerate(zip(*output, strict=True), start=2):
            seen[f"rpn_logits_p{level}"], seen[f"rpn_deltas_p{level}"] = logits, deltas

    def keep_proposals(module: object, given: object, output: Any) -> None:
        seen["proposals"] = output[0]

    def keep_boxes(module: object, given: object, output: tuple[Tensor, Tensor]) -> None:
        seen["box_cls_logits"], seen["box_deltas"] = output[0], output[1].flatten(1)

    hooks = {
        model.neck: keep_neck,
        model.rpn.head: keep_rpn,
        model.rpn: keep_proposals,
        model.roi_heads.box_head: keep_boxes,
    }
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    found = model(images)
    for handle in handles:
        handle.remove()
    return seen, found


def test_evaluation(folder: Path, measured) -> None:
    """Every map, logit, proposal and detection; the files' own pixels and masks."""
    tensors = reference(folder / "eval")
    model = load_original(folder).eval()
    with torch.inference_mode():
        seen, found = forward(model, contents(folder))

    maps = [name for name in seen if name in tensors and not name.startswith("box_")]
    assert len(maps) == len(STAGES) + 5 + 2 * 5
    for name in maps:
        measured(WHERE, name, relative(seen[name], tensors[name]), FEATURES)
    compared = {*maps} | compare_proposals(seen, tensors, WHERE, measured)
    compared |= compare_detections(found, tensors, WHERE, measured)
    compared |= compare_final(folder, found, tensors, measured)
    assert set(tensors) == compared  # nothing was left out


def compare_final(
    folder: Path, found: list[Detections], tensors: dict[str, Tensor], measured
) -> set[str]:
    """Back in the pixels of the files, by the larger of the two factors; the names compared."""
    bitmaps = np.load(folder / "eval_masks.npz")
    names = set()
    for i, raw in enumerate(found):
        expected = bitmaps[f"masks_{i}"]
        height, width = expected.shape[1:]
        ours = to_original(raw, (height, width), on_canvas=raw.image_size)
        assert ours.labels.tolist() == tensors[f"det_classes_{i}"].tolist()
        boxes, scores = tensors[f"det_boxes_{i}"], tensors[f"det_scores_{i}"]
        measured(WHERE, f"final boxes of image {i}, px", largest(ours.boxes, boxes), 1e-3)
        measured(WHERE, f"final scores of image {i}", relative(ours.scores, scores), HEADS)
        rles = probabilities_to_rle(ours.mask_probabilities, ours.boxes, height, width)
        pasted = np.stack([rle_to_bitmap(rle) for rle in rles])
        share = (pasted != expected).sum() / expected.sum()
        measured(WHERE, f"pasted masks of image {i}, share of pixels", share, 1e-3)
        names |= {f"det_{part}_{i}" for part in ("classes", "boxes", "scores")}
    return names


def test_predict_returns_the_same(folder: Path, measured) -> None:
    """The public path: the image file is resized, placed on the canvas and its boxes moved back."""
    tensors = reference(folder / "eval")
    model = load_original(folder).eval()
    model.resize = Resize(256, 256)
    for i, image in enumerate(contents(folder)):
        found = mimdet.predict(model, image)  # 256 pixels long: nothing is resized
        boxes = tensors[f"det_raw_boxes_{i}"].clone()
        boxes[:, 0::2] = boxes[:, 0::2].clamp(max=image.shape[2])
        boxes[:, 1::2] = boxes[:, 1::2].clamp(max=image.shape[1])
        inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        assert found.labels.tolist() == tensors[f"det_raw_classes_{i}"][inside].tolist()
        error = largest(found.boxes, boxes[inside])
        measured("benchmarking_small predict", f"boxes of image {i}, px", error, 1e-3)


def test_canvas_is_what_the_original_padded(folder: Path) -> None:
    from mimdet.data.augment import LSJ_FILL
    from mimdet.models.detector import CANVAS_GREY, on_canvas

    assert CANVAS_GREY == LSJ_FILL
    for content, square in zip(contents(folder), input_images(folder), strict=True):
        assert torch.equal(on_canvas(content, 256), square)


def test_relative_positions(folder: Path) -> None:
    """The index tables of the checkpoint are the ones we would compute."""
    tensors = reference(folder / "model")
    for part, side in (("windowed", 4), ("global", 16)):
        stored = tensors[f"backbone.bottom_up.{part}_rel_pos_bias.relative_position_index"]
        assert torch.equal(stored, relative_index(side, side))


def test_every_key_maps_to_ours_and_back(golden: Path, measured) -> None:
    stored = json.loads((golden / "keys_benchmarking_vit_b.json").read_text())
    official = {name: tuple(shape) for name, shape, _ in stored["state_dict"]}
    ours = {our_name(name): shape for name, shape in official.items()}
    assert len(ours) == len(official)
    assert {translate(name, RULES, back=True): s for name, s in ours.items()} == official

    cfg = match_preset("file", {n: torch.empty(s, device="meta") for n, s in ours.items()})
    assert cfg == presets.benchmarking_vit_base()
    with torch.device("meta"):
        model = build_detector(cfg)
    state = model.state_dict()
    own = {name: tuple(value.shape) for name, value in state.items()}
    where = "keys_benchmarking_vit_b"
    left_over = len(own.items() ^ ours.items())
    measured(where, f"{len(official)} keys, left over on either side", left_over, 0)
    kinds = {our_name(name): kind for name, _, kind in stored["state_dict"]}
    assert {name: str(value.dtype) for name, value in state.items()} == kinds
    total = sum(p.numel() for p in model.parameters())
    assert total == stored["total_params"] == 118_674_184
    assert all(p.requires_grad for p in model.parameters()) and not stored["frozen_params"]
    epsilons = {our_name(f"{name}.")[:-1]: eps for name, (_, eps) in stored["module_eps"].items()}
    modules = dict(model.named_modules())
    assert {name: modules[name].eps for name in epsilons} == epsilons


def test_operations_of_backbone_and_neck(golden: Path, measured) -> None:
    """As many multiply-adds as the original's: no block is windowed that should see everything."""
    stored = json.loads((golden / "flops.json").read_text())["benchmarking_vit_b_1024x1024"]
    cost = cost_of(presets.benchmarking_vit_base())
    error = abs(cost.backbone_and_neck / 1e9 / stored["total_GMACs"] - 1)
    measured("flops benchmarking_vit_base", "multiply-adds at 1024x1024", error, 1e-9)


def test_optimiser_groups(golden: Path, measured) -> None:
    """Learning rate and weight decay of every parameter at batch 64, by name."""
    stored = json.loads((golden / "optimizer_groups_benchmarking_vit_b.json").read_text())
    expected = {
        our_name(name): (group["lr"], group["weight_decay"])
        for group in stored
        for name in group["params"]
    }
    cfg = presets.benchmarking_vit_base()
    with torch.device("meta"):
        model = build_detector(cfg)
    groups = parameter_groups(model, cfg.training)
    ours = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    different = [name for name in {**ours, **expected} if ours.get(name) != expected.get(name)]
    where = "optimiser groups benchmarking"
    measured(where, f"parameters of {len(expected)} that differ", len(different), 0)
    assert list(cfg.training.betas) == stored[0]["betas"]


@pytest.mark.filterwarnings("ignore:.*from a non-meta parameter")
def test_a_released_file_is_recognised(golden: Path, tmp_path: Path) -> None:
    """The names and shapes alone say which model a file holds; values do not matter."""
    stored = json.loads((golden / "keys_benchmarking_vit_b.json").read_text())
    value = {f"torch.{kind}": torch.zeros((), dtype=getattr(torch, kind)) for kind in KINDS}
    tensors = {name: value[kind].expand(shape) for name, shape, kind in stored["state_dict"]}
    torch.save({"model": tensors}, tmp_path / "benchmarking.pth")
    with torch.device("meta"):
        model = mimdet.load_detector(tmp_path / "benchmarking.pth", device="meta")
    assert model.config.preset == "benchmarking_vit_base"
    assert len(model.categories) == 80


def test_round_trip_is_exact(folder: Path, measured, tmp_path: Path) -> None:
    model = load_original(folder)
    export_detectron2(model, tmp_path / "exported.pth")
    exported = torch.load(tmp_path / "exported.pth", weights_only=True)["model"]
    original = reference(folder / "model")
    assert exported.keys() == original.keys()
    different = [n for n, v in original.items() if not torch.equal(exported[n], v)]
    measured("benchmarking_small round trip", "tensors that differ", len(different), 0)


def test_position_table_is_moco_s() -> None:
    """By hand, width 4: one frequency (1); sine and cosine of the row, then of the column."""
    table = moco_table(4, 3)[0].unflatten(0, (3, 3))
    for row in range(3):
        for column in range(3):
            r, c = torch.tensor(float(row)), torch.tensor(float(column))
            torch.testing.assert_close(
                table[row, column], torch.stack([r.sin(), r.cos(), c.sin(), c.cos()])
            )
