"""The whole detector against tensors of the original implementation, on its own weights.

Errors are relative, max |a - b| / max |b|, unless a unit is given.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimdet.data.rasters import crops_from_segmentations
from mimdet.inference import to_original
from mimdet.models.detector import Detector
from mimdet.models.rcnn import draw_places, match_boxes
from mimdet.models.sampling import padded_places, select, token_grid
from mimdet.structures import Crops, Detections, Target, probabilities_to_rle, rle_to_bitmap
from tests.parity.reference import (
    RATIOS,
    forward,
    input_images,
    load_original,
    original_sample,
    our_name,
    reference,
    relative,
)

EVALUATIONS = [
    ("mimdet_small", "eval_sr1"),
    ("mimdet_small", "eval_sr075"),
    ("mimdet_small", "eval_sr05"),
    ("mimdet_v1_small", "eval_sr1"),
    ("mimdet_v1_small", "eval_sr05"),
]
FEATURES = 1e-5  # maps; seen: 2e-6
HEADS = 1e-4  # logits and deltas of boxes that are pooled 1e-4 px apart; seen: 8e-6
NEAR_TIE = 1e-5  # logits this close may come in either order
IN_PROPOSAL_ORDER = ("box_cls_logits", "box_deltas", "box_pooled", "box_head_feat")
FIRST = 8  # pooled features are stored for the first boxes of the first image


def map_names(seen: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Maps both sides have; what follows the order of proposals or detections comes later."""
    later = {*IN_PROPOSAL_ORDER, "mask_pooled", "proposals"}
    names = [name for name in seen if name in tensors and name not in later]
    assert {"conv_stem_last_map", "encoder_tokens", "decoder_map", "c2", "c3"} <= set(names)
    assert {"c4", "c5", "p3", "p4", "p5", "p6"} <= set(names)
    return names


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


@pytest.mark.parametrize(("model_name", "run"), EVALUATIONS)
def test_evaluation(golden: Path, measured, model_name: str, run: str) -> None:
    folder = golden / model_name
    where = f"{model_name} {run}"
    tensors = reference(folder / run)
    model = load_original(folder).eval()
    with torch.inference_mode():
        seen, found = forward(model, input_images(folder), original_sample(tensors, run))

    for name in map_names(seen, tensors):
        measured(where, name, relative(seen[name], tensors[name]), FEATURES)
    compared = {*map_names(seen, tensors)}
    if "proposals_boxes_0" in tensors:
        compared |= compare_proposals(seen, tensors, where, measured)
    compared |= compare_detections(found, tensors, where, measured)
    if "mask_pooled" in tensors:
        pooled = seen["mask_pooled"][:FIRST]
        measured(where, "mask_pooled", relative(pooled, tensors["mask_pooled"]), HEADS)
        compared.add("mask_pooled")
    if "det_boxes_0" in tensors:
        compared |= compare_final(folder, run, found, tensors, where, measured)
    assert set(tensors) - compared == {"grid_hw", "ids_restore", "noise"}  # nothing was left out


def compare_proposals(seen, tensors: dict[str, Tensor], where: str, measured) -> set[str]:
    """Proposals, and what the box head makes of them in their order; the names compared."""
    partners, offset, names = [], 0, set()
    for i, ours in enumerate(seen["proposals"]):
        keys = f"proposals_boxes_{i}", f"proposals_logits_{i}"
        partner, error = pair_proposals(ours, *(tensors[key] for key in keys))
        measured(where, f"proposals of image {i}, px", error, 1e-3)
        logits = relative(ours.logits[partner], tensors[keys[1]])
        measured(where, f"proposal logits of image {i}", logits, FEATURES)
        partners.append(partner + offset)
        offset += len(partner)
        names |= set(keys)
    order = torch.cat(partners)
    for name in IN_PROPOSAL_ORDER:
        if name in tensors:
            ours = seen[name][order][: len(tensors[name])]
            measured(where, name, relative(ours, tensors[name]), HEADS)
            names.add(name)
    return names


def compare_detections(found: list[Detections], tensors, where: str, measured) -> set[str]:
    """The same detections in the same order, before postprocessing; the names compared."""
    names = set()
    for i, ours in enumerate(found):
        classes = tensors[f"det_raw_classes_{i}"]
        assert ours.labels.tolist() == classes.tolist()
        assert len(ours) >= 7
        boxes, scores = tensors[f"det_raw_boxes_{i}"], tensors[f"det_raw_scores_{i}"]
        measured(where, f"detections of image {i}: boxes, px", largest(ours.boxes, boxes), 1e-3)
        measured(where, f"detections of image {i}: scores", relative(ours.scores, scores), HEADS)
        names |= {f"det_raw_{part}_{i}" for part in ("classes", "boxes", "scores")}
        masks = tensors.get(f"det_raw_mask_probs_{i}")
        if masks is not None:
            error = relative(ours.mask_probabilities, masks[:, 0])
            measured(where, f"detections of image {i}: 28x28 masks", error, HEADS)
            names.add(f"det_raw_mask_probs_{i}")
    return names


def compare_final(
    folder: Path, run: str, found, tensors, where: str, measured, on_canvas: bool = False
) -> set[str]:
    """Detections in the pixels of the files, and their pasted masks; the names compared."""
    bitmaps = np.load(folder / f"{run}_masks.npz")
    names = set()
    for i, raw in enumerate(found):
        expected = bitmaps[f"masks_{i}"]
        height, width = expected.shape[1:]
        ours = to_original(raw, (height, width), raw.image_size if on_canvas else None)
        assert ours.labels.tolist() == tensors[f"det_classes_{i}"].tolist()
        boxes, scores = tensors[f"det_boxes_{i}"], tensors[f"det_scores_{i}"]
        measured(where, f"final boxes of image {i}, px", largest(ours.boxes, boxes), 1e-3)
        measured(where, f"final scores of image {i}", relative(ours.scores, scores), HEADS)
        rles = probabilities_to_rle(ours.mask_probabilities, ours.boxes, height, width)
        pasted = np.stack([rle_to_bitmap(rle) for rle in rles])
        share = (pasted != expected).sum() / expected.sum()
        measured(where, f"pasted masks of image {i}, share of pixels", share, 1e-3)
        names |= {f"det_{part}_{i}" for part in ("classes", "boxes", "scores")}
    return names


def largest(ours: Tensor, original: Tensor) -> float:
    return (ours - original).abs().max().item()


@pytest.mark.parametrize(("model_name", "run"), EVALUATIONS)
def test_selection_from_the_originals_noise(golden: Path, model_name: str, run: str) -> None:
    """keep="padded": the same tokens in the same order, up to the padding's arbitrary order, and
    below ratio 1."""
    tensors = reference(golden / model_name / run)
    expected = original_sample(tensors, run)
    sizes = [(image.shape[1], image.shape[2]) for image in input_images(golden / model_name)]
    grids = [token_grid(*size) for size in sizes]
    own = [padded_places(own_grid, expected.grid, torch.device("cpu")) for own_grid in grids]
    scores = [-noise[places] for noise, places in zip(tensors["noise"], own, strict=True)]
    ours = select(scores, grids, expected.grid, RATIOS[run], "padded")
    for a, b, places in zip(ours.keep, expected.keep, own, strict=True):
        assert len(a) == len(b)
        if RATIOS[run] == 1:  # nothing to choose: ours come row by row
            assert torch.equal(a, b.sort().values)
        else:
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
        crops = crops_from_segmentations(truth["polygons"], height, width)
        local.append(Target(boxes, labels, crops))
    return full, local


def in_order(count: int, device: torch.device | None = None) -> Tensor:
    """The reference draws the first candidates instead of random ones."""
    return torch.arange(count, device=device)


def training_model(folder: Path) -> Detector:
    model = load_original(folder).train()
    model.rpn.permute = model.roi_heads.permute = in_order
    return model


def test_training_step(golden: Path, measured) -> None:
    folder = golden / "mimdet_small"
    where = "mimdet_small train_sr05"
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

    for name in map_names(seen, tensors):
        measured(where, name, relative(seen[name], tensors[name]), FEATURES)
    for name in ("box_cls_logits", "box_deltas"):
        measured(where, name, relative(seen[name], tensors[name]), HEADS)

    (drawn,) = sampled
    truth = torch.zeros(len(drawn.rois), 4)
    truth[drawn.objects] = torch.cat([target.boxes for target in targets])[drawn.truth]
    for i in range(len(targets)):
        own = drawn.rois[:, 0] == i
        assert torch.equal(drawn.labels[own], tensors[f"sampled_gt_classes_{i}"])
        error = largest(drawn.rois[own, 1:], tensors[f"sampled_proposal_boxes_{i}"])
        measured(where, f"sampled boxes of image {i}, px", error, 1e-3)
        objects = drawn.labels[own] < model.roi_heads.num_classes
        assert torch.equal(truth[own][objects], tensors[f"sampled_gt_boxes_{i}"][objects])

    for name, value in losses.items():
        expected = original["losses"][name]
        measured(where, name, abs(value.item() - expected) / expected, 1e-5)
    measured(where, "gradient norms", gradient_error(model, original["grad_norms"]), 1e-2)
    measured(where, "BatchNorm buffers, absolute", buffer_error(model, folder), 1e-5)


def gradient_error(model: Detector, stored: dict[str, float | None]) -> float:
    """Largest |a - b| / (b + 1e-4) of the gradient norms, i.e. within 1e-2 b + 1e-6 at 1e-2."""
    norms = {our_name(name): value for name, value in stored.items() if value is not None}
    ours = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == norms.keys()
    del norms["backbone.decoder.norm.bias"]  # BatchNorm follows: its gradient is rounding noise
    return max(abs(ours[n] - b) / (b + 1e-4) for n, b in norms.items())


def buffer_error(model: Detector, folder: Path) -> float:
    """Running statistics of every BatchNorm after the step."""
    after = {our_name(n): v for n, v in reference(folder / "train_sr05_bn_after").items()}
    ours = dict(model.named_buffers())
    assert after.keys() <= ours.keys() and len(after) == 3 * 16
    return max((ours[n] - v).abs().max().item() for n, v in after.items())


def test_anchor_labels(golden: Path) -> None:
    """Which anchors are objects (1), background (0) or not drawn (-1)."""
    folder = golden / "mimdet_small"
    tensors = reference(folder / "train_sr05")
    rpn = load_original(folder).rpn
    levels = [(p.shape[2], p.shape[3]) for p in (tensors[f"p{i}"] for i in range(2, 7))]
    anchors = torch.cat(rpn.anchors(levels))
    for i, target in enumerate(original_targets(folder)[0]):
        _, label = match_boxes([target.boxes], anchors[None], 0.3, 0.7, rescue_best=True)
        ((objects, background),) = draw_places(label, rpn.anchors_per_image, 0.5, in_order)
        labels = torch.full_like(label[0], -1)
        labels[objects], labels[background] = 1, 0
        assert torch.equal(labels, tensors[f"rpn_anchor_labels_{i}"].to(labels.dtype))


def test_box_local_masks_give_the_loss_of_polygons(golden: Path, measured) -> None:
    """The official path rasterises polygons in every sampled box; ours reads 112 x 112 crops."""
    folder = golden / "mimdet_small"
    original = json.loads((folder / "train_sr05_losses.json").read_text())["polygon"]["losses"]
    sample = original_sample(reference(folder / "train_sr05"), "train_sr05")
    _, targets = original_targets(folder)
    losses = training_model(folder)(input_images(folder), targets, sample=sample)
    error = abs(losses["loss_mask"].item() - original["loss_mask"]) / original["loss_mask"]
    measured("mimdet_small train_sr05", "loss_mask, box-local against polygons", error, 2e-3)
