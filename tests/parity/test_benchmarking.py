"""Benchmarking ViT, the paper's baseline, against tensors of its re-implementation by the authors.

Errors are relative, max |a - b| / max |b|, unless a unit is given.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import mimdet
from mimdet import presets
from mimdet.analysis.cost import cost_of
from mimdet.config import BackboneConfig, Config
from mimdet.images import Resize
from mimdet.models.baselines import moco_table, relative_index
from mimdet.models.official import export_detectron2
from tests.parity.reference import (
    forward,
    input_images,
    load_original,
    optimiser_groups,
    original_heads,
    reference,
    relative,
    same_number,
    stored_json,
)
from tests.parity.test_mimdet_small import (
    compare_detections,
    compare_final,
    compare_proposals,
    largest,
)

WHERE = "benchmarking_small eval"
FEATURES = 1e-5  # maps
STAGES = {"s0": "c2", "s1": "c3", "s2": "c4", "s3": "c5"}


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "benchmarking_small"


def original_config(folder: Path) -> Config:
    preset = stored_json(folder / "config")["preset"]
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
        detector=original_heads(preset, canvas=preset["img"]),
    )


def contents(folder: Path) -> list[Tensor]:
    """The images without their grey padding: (3, h, w) uint8."""
    sizes = stored_json(folder / "config")["preset"]["content"]
    squares = input_images(folder)
    return [square[:, :h, :w] for square, (h, w) in zip(squares, sizes, strict=True)]


def test_evaluation(folder: Path, measured) -> None:
    """Every map, logit, proposal and detection; the files' own pixels and masks."""
    tensors = reference(folder / "eval")
    model = load_original(folder, original_config(folder)).eval()
    with torch.inference_mode():
        seen, found = forward(model, contents(folder))

    seen.update({theirs: seen[ours] for theirs, ours in STAGES.items()})
    maps = [name for name in seen if name in tensors and not name.startswith("box_")]
    assert len(maps) == len(STAGES) + 5 + 2 * 5
    for name in maps:
        measured(WHERE, name, relative(seen[name], tensors[name]), FEATURES)
    compared = {*maps} | compare_proposals(seen, tensors, WHERE, measured)
    compared |= compare_detections(found, tensors, WHERE, measured)
    compared |= compare_final(folder, "eval", found, tensors, WHERE, measured, on_canvas=True)
    assert set(tensors) == compared  # nothing was left out


def test_predict_returns_the_same(folder: Path, measured) -> None:
    """The public path: the image file is resized, placed on the canvas and its boxes moved back."""
    tensors = reference(folder / "eval")
    model = load_original(folder, original_config(folder)).eval()
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


def test_canvas_is_what_the_original_padded_and_index_tables_are_ours(folder: Path) -> None:
    from mimdet.data.augment import LSJ_FILL
    from mimdet.models.detector import CANVAS_GREY, on_canvas

    assert CANVAS_GREY == LSJ_FILL
    for content, square in zip(contents(folder), input_images(folder), strict=True):
        assert torch.equal(on_canvas(content, 256), square)
    # The index tables of the checkpoint are the ones we would compute.
    tensors = reference(folder / "model")
    for part, side in (("windowed", 4), ("global", 16)):
        stored = tensors[f"backbone.bottom_up.{part}_rel_pos_bias.relative_position_index"]
        assert torch.equal(stored, relative_index(side, side))


def test_operations_of_backbone_and_neck(golden: Path, measured) -> None:
    """As many multiply-adds as the original's: no block is windowed that should see everything."""
    stored = stored_json(golden / "flops")["benchmarking_vit_b_1024x1024"]
    cost = cost_of(presets.benchmarking_vit_base())
    error = abs(cost.backbone_and_neck / 1e9 / stored["total_GMACs"] - 1)
    measured("flops benchmarking_vit_base", "multiply-adds at 1024x1024", error, 1e-9)


def test_optimiser_groups(golden: Path, measured) -> None:
    """Learning rate and weight decay of every parameter at batch 64, by name."""
    name, kind = "benchmarking_vit_b", "benchmarking_vit"
    ours, expected = optimiser_groups(golden, name, "benchmarking_vit_base", kind)
    different = [name for name in {**ours, **expected} if ours.get(name) != expected.get(name)]
    where = "optimiser groups benchmarking"
    measured(where, f"parameters of {len(expected)} that differ", len(different), 0)


@pytest.mark.filterwarnings("ignore:.*from a non-meta parameter")
def test_a_released_file_is_recognised(golden: Path, tmp_path: Path) -> None:
    """The names and shapes alone say which model a file holds; values do not matter."""
    stored = stored_json(golden / "keys_benchmarking_vit_b")["state_dict"]
    tensors = {name: same_number(shape, kind, 0) for name, shape, kind in stored}
    torch.save({"model": tensors}, tmp_path / "benchmarking.pth")
    with torch.device("meta"):
        model = mimdet.load_detector(tmp_path / "benchmarking.pth", device="meta")
    assert model.config.preset == "benchmarking_vit_base"
    assert len(model.categories) == 80


def test_round_trip_is_exact(folder: Path, measured, tmp_path: Path) -> None:
    model = load_original(folder, original_config(folder))
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
            expected = torch.stack([r.sin(), r.cos(), c.sin(), c.cos()])
            torch.testing.assert_close(table[row, column], expected)
