"""The whole detector against tensors of the original implementation, on its own weights.

`pytest -s tests/parity` prints a table of the largest errors.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import box_iou

from mimdet.config import BackboneConfig, Config, DetectorConfig
from mimdet.data.rasters import crops_from_segmentations
from mimdet.models.detector import Detector, build_detector
from mimdet.models.rcnn import match, subsample
from mimdet.models.sampling import Sample, padded_places, select, token_grid
from mimdet.structures import Crops, Detections, Target
from tests.parity.official_names import our_name

RATIOS = {"eval_sr1": 1.0, "eval_sr075": 0.75, "eval_sr05": 0.5, "train_sr05": 0.5}
EVALUATIONS = [
    ("mimdet_small", "eval_sr1"),
    ("mimdet_small", "eval_sr075"),
    ("mimdet_small", "eval_sr05"),
    ("mimdet_v1_small", "eval_sr1"),
    ("mimdet_v1_small", "eval_sr05"),
]
FEATURES = 1e-5  # largest error of a map, relative to its largest value; seen: 1e-6
HEADS = 1e-4  # the same for logits and deltas of boxes that are pooled 1e-4 px apart; seen: 8e-6
NEAR_TIE = 1e-5  # logits this close may come in either order


@cache
def reference(path: Path) -> dict[str, Tensor]:
    return load_file(path.with_suffix(".safetensors"))


def load_original(folder: Path) -> Detector:
    """Our detector with the original's weights; every tensor must find its place."""
    preset = json.loads((folder / "config.json").read_text())["preset"]
    weights = {our_name(name): value for name, value in reference(folder / "model").items()}
    cfg = Config(
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
        detector=DetectorConfig(
            num_classes=preset["ncls"],
            channels=preset["fpn"],
            box_fc_dim=preset["fc"],
            mask_convs=len(preset["mask_convs"]) - 1,
        ),
    )
    model = build_detector(cfg)
    model.load_state_dict(weights, strict=True)
    return model


def input_images(folder: Path) -> list[Tensor]:
    stored = np.load(folder / "images.npz")
    return [torch.from_numpy(stored[name]).permute(2, 0, 1) for name in sorted(stored.files)]


def original_sample(tensors: dict[str, Tensor], run: str) -> Sample:
    """The tokens the original kept: ids_restore[j] is the rank of place j of the padded grid."""
    grid: tuple[int, int] = tuple(tensors["grid_hw"].tolist())  # type: ignore[assignment]
    count = int(grid[0] * grid[1] * RATIOS[run])
    return Sample(list(tensors["ids_restore"].argsort(dim=1)[:, :count]), grid)


def forward(
    model: Detector, images: list[Tensor], sample: Sample, targets: list[Target] | None = None
) -> tuple[dict[str, Any], Any]:
    """Everything the reference names, under its names, and what the detector returns."""
    seen: dict[str, Any] = {}

    def keep_rpn(module: object, given: object, output: tuple[list[Tensor], list[Tensor]]) -> None:
        for level, (logits, deltas) in enumerate(zip(*output, strict=True), start=2):
            seen[f"rpn_logits_p{level}"], seen[f"rpn_deltas_p{level}"] = logits, deltas

    def keep_boxes(module: object, given: object, output: tuple[Tensor, Tensor]) -> None:
        seen["box_cls_logits"], seen["box_deltas"] = output[0], output[1].flatten(1)

    hooks = {
        model.backbone: lambda module, given, output: seen.update(preprocessed_images=given[0]),
        model.backbone.stem: lambda m, given, out: seen.update(conv_stem_last_map=out.tokens),
        model.backbone.encoder: lambda m, given, out: seen.update(encoder_tokens=torch.stack(out)),
        model.neck: lambda module, given, output: seen.update(given[0] | output),
        model.rpn.head: keep_rpn,
        model.rpn: lambda module, given, output: seen.update(proposals=output[0]),
        model.roi_heads.box_head: keep_boxes,
    }
    if model.backbone.decoder.fill == "mask_token":
        hooks[model.backbone.decoder.blocks[0]] = lambda module, given, output: seen.update(
            decoder_block0_input=given[0]
        )
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    result = model(images, targets, sample=sample)
    for handle in handles:
        handle.remove()
    return seen, result


def relative(ours: Tensor, original: Tensor) -> float:
    assert ours.shape == original.shape
    return ((ours - original).abs().max() / original.abs().max()).item()


def feature_errors(seen: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error of every map both sides have; proposals may differ in order."""
    ordered = ("box_cls_logits", "box_deltas", "proposals")
    names = [name for name in seen if name in tensors and name not in ordered]
    assert {"conv_stem_last_map", "encoder_tokens", "c2", "c3", "c4", "c5", "p6"} <= set(names)
    return {name: relative(seen[name].detach(), tensors[name]) for name in names}


def pair_proposals(ours: Any, boxes: Tensor, logits: Tensor) -> tuple[Tensor, float]:
    """Index of our proposal for each original one, and the largest box error in pixels.

    A partner may stand at another position only among logits that are nearly equal.
    """
    assert ours.boxes.shape == boxes.shape
    distance = torch.cdist(ours.boxes, boxes, p=torch.inf)
    distance = distance + 1e3 * (ours.logits[:, None] - logits[None]).abs()
    partner = distance.argmin(dim=0)
    assert len(partner.unique()) == len(partner)
    assert (ours.logits[partner] - logits).abs().max() < NEAR_TIE
    moved = partner != torch.arange(len(partner))
    assert ((logits[partner] - logits).abs()[moved] < NEAR_TIE).all()
    return partner, (ours.boxes[partner] - boxes).abs().max().item()


def compare_detections(found: list[Detections], tensors: dict[str, Tensor]) -> dict[str, float]:
    """Same detections in the same order; the largest errors of boxes (px), scores and masks."""
    errors = {"detection boxes, px": 0.0, "detection scores": 0.0}
    for i, ours in enumerate(found):
        expected = {
            "detection boxes, px": (ours.boxes, tensors[f"det_raw_boxes_{i}"]),
            "detection scores": (ours.scores, tensors[f"det_raw_scores_{i}"]),
        }
        if f"det_raw_mask_probs_{i}" in tensors:
            masks = tensors[f"det_raw_mask_probs_{i}"][:, 0]
            expected["detection masks"] = (ours.mask_probabilities, masks)
        assert ours.labels.tolist() == tensors[f"det_raw_classes_{i}"].tolist()
        assert len(ours) >= 7
        for name, (a, b) in expected.items():
            errors[name] = max(errors.get(name, 0.0), (a - b).abs().max().item())
    return errors


def show(title: str, errors: dict[str, float]) -> None:
    print(f"\n{title}: largest errors")
    for name, error in errors.items():
        print(f"  {name:28} {error:.1e}")


@pytest.mark.parametrize(("model_name", "run"), EVALUATIONS)
def test_evaluation(golden: Path, model_name: str, run: str) -> None:
    folder = golden / model_name
    tensors = reference(folder / run)
    model = load_original(folder).eval()
    with torch.inference_mode():
        seen, found = forward(model, input_images(folder), original_sample(tensors, run))

    errors = feature_errors(seen, tensors)
    assert max(errors.values()) < FEATURES, errors
    if "proposals_boxes_0" in tensors:
        partners, offset = [], 0
        for i, ours in enumerate(seen["proposals"]):
            original = tensors[f"proposals_boxes_{i}"], tensors[f"proposals_logits_{i}"]
            partner, errors[f"proposals of image {i}, px"] = pair_proposals(ours, *original)
            assert errors[f"proposals of image {i}, px"] < 1e-3
            partners.append(partner + offset)
            offset += len(partner)
        for name in ("box_cls_logits", "box_deltas"):
            errors[name] = relative(seen[name][torch.cat(partners)], tensors[name])
            assert errors[name] < HEADS
    detections = compare_detections(found, tensors)
    assert detections["detection boxes, px"] < 1e-3
    assert detections["detection scores"] < 2e-5
    assert detections.get("detection masks", 0) < 5e-5
    show(f"{model_name} {run}", errors | detections)


@pytest.mark.parametrize(("model_name", "run"), EVALUATIONS)
def test_selection_from_the_originals_noise(golden: Path, model_name: str, run: str) -> None:
    """keep="padded": the same tokens in the same order, up to the padding's arbitrary order."""
    tensors = reference(golden / model_name / run)
    expected = original_sample(tensors, run)
    sizes = [(image.shape[1], image.shape[2]) for image in input_images(golden / model_name)]
    grids = [token_grid(*size) for size in sizes]
    own = [padded_places(own_grid, expected.grid, torch.device("cpu")) for own_grid in grids]
    scores = [-noise[places] for noise, places in zip(tensors["noise"], own, strict=True)]
    ours = select(scores, grids, expected.grid, RATIOS[run], "padded")
    for a, b, places in zip(ours.keep, expected.keep, own, strict=True):
        assert len(a) == len(b)
        assert torch.equal(a[: len(places)], b[: len(places)])
        rest = torch.cat([a, b])[~torch.isin(torch.cat([a, b]), places)]
        assert len(rest) == 2 * max(0, len(a) - len(places))


def original_targets(folder: Path) -> tuple[list[Target], list[Target]]:
    """The truth with full-size bitmaps, and the same with our box-local crops of its polygons."""
    bitmaps = np.load(folder / "train_gt_bitmasks.npz")
    full, local = [], []
    for i, truth in enumerate(json.loads((folder / "train_gt.json").read_text())):
        boxes, labels = torch.tensor(truth["boxes_xyxy"]), torch.tensor(truth["classes"])
        pixels = torch.from_numpy(bitmaps[f"gt_bitmasks_{i}"]).to(torch.uint8)
        height, width = pixels.shape[1:]
        image = torch.tensor([[0.0, 0, width, height]]).repeat(len(boxes), 1)
        full.append(Target(boxes, labels, Crops(image, pixels)))
        local.append(
            Target(boxes, labels, crops_from_segmentations(truth["polygons"], height, width))
        )
    return full, local


def in_order(count: int, device: torch.device | None = None) -> Tensor:
    """The reference draws the first candidates instead of random ones."""
    return torch.arange(count, device=device)


def training_model(folder: Path) -> Detector:
    model = load_original(folder).train()
    model.rpn.permute = model.roi_heads.permute = in_order
    return model


def test_training_step(golden: Path) -> None:
    folder = golden / "mimdet_small"
    tensors = reference(folder / "train_sr05")
    original = json.loads((folder / "train_sr05_losses.json").read_text())["bitmask"]
    model = training_model(folder)
    targets, _ = original_targets(folder)
    sampled = []
    draw = model.roi_heads.sample
    model.roi_heads.sample = lambda *given: sampled.append(draw(*given)) or sampled[-1]  # type: ignore
    sample = original_sample(tensors, "train_sr05")
    seen, losses = forward(model, input_images(folder), sample, targets)
    sum(losses.values()).backward()

    errors = feature_errors(seen, tensors)
    assert max(errors.values()) < FEATURES, errors
    for name in ("box_cls_logits", "box_deltas"):
        errors[name] = relative(seen[name].detach(), tensors[name])
        assert errors[name] < HEADS

    for i, drawn in enumerate(sampled):
        assert torch.equal(drawn.labels, tensors[f"sampled_gt_classes_{i}"])
        boxes = (drawn.boxes - tensors[f"sampled_proposal_boxes_{i}"]).abs().max().item()
        errors[f"sampled boxes of image {i}, px"] = boxes
        assert boxes < 1e-3
        objects = drawn.labels < model.roi_heads.num_classes
        truth = targets[i].boxes[drawn.truth[objects]]
        assert torch.equal(truth, tensors[f"sampled_gt_boxes_{i}"][objects])

    for name, value in losses.items():
        expected = original["losses"][name]
        errors[name] = abs(value.item() - expected) / expected
        assert errors[name] < 1e-5

    errors |= gradient_errors(model, original["grad_norms"]) | buffer_errors(model, folder)
    show("mimdet_small train_sr05", errors)


def gradient_errors(model: Detector, stored: dict[str, float | None]) -> dict[str, float]:
    """All gradient norms within 1 %, the rounding level of the reference being 0.5 %."""
    norms = {our_name(name): value for name, value in stored.items() if value is not None}
    ours = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == norms.keys()
    del norms["backbone.decoder.norm.bias"]  # BatchNorm follows: its gradient is rounding noise
    wrong = {n: (ours[n], b) for n, b in norms.items() if abs(ours[n] - b) > 1e-2 * b + 1e-6}
    assert not wrong
    return {"gradient norms": max(abs(ours[n] - b) / (b + 1e-6) for n, b in norms.items())}


def buffer_errors(model: Detector, folder: Path) -> dict[str, float]:
    """Running statistics of every BatchNorm after the step."""
    after = {our_name(n): v for n, v in reference(folder / "train_sr05_bn_after").items()}
    ours = dict(model.named_buffers())
    assert after.keys() <= ours.keys() and len(after) == 3 * 16
    error = max((ours[n] - v).abs().max().item() for n, v in after.items())
    assert error < 1e-5
    return {"BatchNorm buffers": error}


def test_anchor_labels(golden: Path) -> None:
    """Which anchors are objects (1), background (0) or not drawn (-1)."""
    folder = golden / "mimdet_small"
    tensors = reference(folder / "train_sr05")
    rpn = load_original(folder).rpn
    levels = [(p.shape[2], p.shape[3]) for p in (tensors[f"p{i}"] for i in range(2, 7))]
    anchors = torch.cat(rpn.anchors(levels))
    for i, target in enumerate(original_targets(folder)[0]):
        _, label = match(box_iou(target.boxes, anchors), 0.3, 0.7, rescue_best=True)
        candidates = [(label == value).nonzero()[:, 0] for value in (1, 0)]
        objects, background = subsample(*candidates, rpn.anchors_per_image, 0.5, in_order)
        labels = torch.full_like(label, -1)
        labels[objects], labels[background] = 1, 0
        assert torch.equal(labels, tensors[f"rpn_anchor_labels_{i}"].to(labels.dtype))


def test_box_local_masks_give_the_loss_of_polygons(golden: Path) -> None:
    """The official path rasterises polygons in every sampled box; ours reads 112 x 112 crops."""
    folder = golden / "mimdet_small"
    original = json.loads((folder / "train_sr05_losses.json").read_text())["polygon"]["losses"]
    sample = original_sample(reference(folder / "train_sr05"), "train_sr05")
    _, targets = original_targets(folder)
    losses = training_model(folder)(input_images(folder), targets, sample=sample)
    error = abs(losses["loss_mask"].item() - original["loss_mask"]) / original["loss_mask"]
    show("box-local crops against polygons", {"loss_mask": error})
    assert error < 2e-3
