"""Proposals, losses and detections on cases small enough to work out on paper."""

import math

import pytest
import torch
from torch import Tensor, nn

from mimdet.models.rcnn import AnchorGrid, Batch
from mimdet.models.roi_heads import BoxHead, MaskHead, RoIHeads, SampledBoxes, mask_targets
from mimdet.models.rpn import RPN, Proposals, init_rpn
from mimdet.structures import Crops, Detections, Target

LOG2 = math.log(2)


def target(boxes: list[list[float]], labels: list[int], masks: Crops | None = None) -> Target:
    return Target(torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.long), masks)


# ------------------------------------------------------------------ RPN


def small_rpn(levels: int = 1, **settings: object) -> RPN:
    """Anchors of 8 x 8 pixels around (0, 0), (8, 0), (0, 8), (8, 8) on every level."""
    anchors = AnchorGrid((8,) * levels, (1.0,), (8,) * levels)
    return RPN(4, anchors, **settings).eval()  # type: ignore[arg-type]


def propose(
    rpn: RPN,
    logits: list[list[float]],
    size: tuple[int, int] = (12, 12),
    deltas: list[Tensor] | None = None,
) -> Proposals:
    anchors = rpn.anchors([(2, 2)] * len(logits))
    maps = [torch.tensor([values]) for values in logits]
    zero = [torch.zeros(1, 4, 4) for _ in logits]
    return rpn.propose(anchors, maps, deltas or zero, [size])[0]


def test_proposals_are_clipped_and_sorted() -> None:
    found = propose(small_rpn(), [[1.0, 3.0, 2.0, -4.0]])
    assert found.boxes.tolist() == [[4, 0, 12, 4], [0, 4, 4, 12], [0, 0, 4, 4], [4, 4, 12, 12]]
    assert found.logits.tolist() == [3, 2, 1, -4]


def test_proposals_outside_the_image_or_not_finite_drop_out() -> None:
    deltas = torch.zeros(1, 4, 4)
    deltas[0, 0, 2] = float("nan")
    found = propose(small_rpn(), [[5.0, 3.0, 2.0, 1.0]], (12, 4), [deltas])
    assert found.boxes.tolist() == [[0, 4, 4, 12]]  # of an image 4 wide; anchor 0 was not a number


def test_pre_and_post_nms_counts_depend_on_the_phase() -> None:
    rpn = small_rpn(2, pre_nms=(4, 2), post_nms=(5, 3))
    logits = [[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]]
    assert propose(rpn, logits).logits.tolist() == [8, 7, 4]  # two a level, three in all
    assert propose(rpn.train(), logits).logits.tolist() == [8, 7, 6, 5, 4]


def test_nms_works_within_a_level() -> None:
    shifted = torch.zeros(1, 4, 4)
    shifted[0, 0, 0] = 1.0  # anchor 0 moves 8 px right, onto anchor 1
    equal = propose(small_rpn(), [[5.0, 3.0, 2.0, 1.0]], deltas=[shifted])
    assert equal.logits.tolist() == [5, 2, 1]
    across = propose(small_rpn(2), [[5.0, 3.0, 2.0, 1.0]] * 2)
    assert len(across.boxes) == 8  # equal boxes of different levels all stay


def test_rpn_losses_by_hand() -> None:
    """Four anchors, one of them the object; a second image is empty."""
    rpn = small_rpn(anchors_per_image=4)
    anchors = torch.cat(rpn.anchors([(2, 2)]))
    targets = [target([[4, 4, 12, 12]], [0]), target([], [])]
    losses = rpn.losses(anchors, torch.zeros(2, 4), torch.full((2, 4, 4), 0.5), targets)
    assert losses["loss_rpn_cls"].item() == pytest.approx(LOG2)  # (4 + 4) log 2 / 8
    assert losses["loss_rpn_loc"].item() == pytest.approx(4 * 0.5 / 8)

    sure = torch.tensor([[-20.0, -20.0, -20.0, 20.0], [-20.0] * 4])
    assert rpn.losses(anchors, sure, torch.zeros(2, 4, 4), targets)["loss_rpn_cls"] < 1e-6
    wrong = torch.tensor([[-20.0, -20.0, 20.0, 20.0], [-20.0] * 4])
    loss = rpn.losses(anchors, wrong, torch.zeros(2, 4, 4), targets)["loss_rpn_cls"]
    assert loss.item() == pytest.approx(20 / 8)
    # Of 256 anchors asked for only 8 exist, yet 2 x 256 divides, as in detectron2.
    rpn.anchors_per_image = 256
    many = rpn.losses(anchors, torch.zeros(2, 4), torch.zeros(2, 4, 4), targets)
    assert many["loss_rpn_cls"].item() == pytest.approx(8 * LOG2 / 512)


def test_head_maps_and_anchors_are_in_the_same_order() -> None:
    """Anchor a of place (y, x) must meet channel a (and 4a..4a+3) of that place."""
    rpn = RPN(1, AnchorGrid((8,), (0.5, 2.0), (8,)), pre_nms=(1, 1))
    rpn.eval()
    logits, deltas = torch.zeros(1, 2, 3, 5), torch.zeros(1, 8, 3, 5)
    logits[0, 1, 2, 3] = 9.0
    deltas[0, 4, 2, 3] = 0.25  # dx of anchor 1
    rpn.head.forward = lambda features: ([logits], [deltas])  # type: ignore[method-assign]
    batch = Batch(torch.zeros(1, 3, 24, 40), [(400, 400)], [])
    found, losses = rpn(batch, [torch.zeros(1, 1, 3, 5)])
    width = 8 / 2**0.5
    centre_x, centre_y = 24 + 0.25 * width, 16
    expected = [centre_x - width / 2, centre_y - width, centre_x + width / 2, centre_y + width]
    assert found[0].boxes[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert losses == {}


def test_init_rpn() -> None:
    rpn = RPN(64, AnchorGrid((8,), (1.0,), (8,)))
    init_rpn(rpn)
    for name, parameter in rpn.head.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.05)


# ------------------------------------------------------------------ RoI heads: losses


def heads(num_classes: int = 2, masks: bool = True, **settings: object) -> RoIHeads:
    box_head = BoxHead(4, num_classes, 1, 8, nn.BatchNorm2d)
    mask_head = MaskHead(4, num_classes, 1, nn.BatchNorm2d) if masks else None
    return RoIHeads(box_head, mask_head, **settings)  # type: ignore[arg-type]


def test_sampled_boxes_hold_the_truth_and_a_quarter_of_objects() -> None:
    made = heads(rois_per_image=8, permute=lambda n, device: torch.arange(n))
    truth = target([[0, 0, 10, 10], [50, 50, 70, 70]], [1, 0])
    near, far = [0.0, 0, 10, 9], [200.0, 200, 220, 230]
    sampled = made.sample(torch.tensor([far, near, near, far, far]), truth)
    # 2 of 8 may be objects: the first two proposals that overlap; then all background there is.
    assert sampled.boxes.tolist() == [near, near, far, far, far]
    assert sampled.labels.tolist() == [1, 1, 2, 2, 2]
    assert sampled.truth[:2].tolist() == [0, 0]

    alone = made.sample(torch.zeros(0, 4), truth)
    assert alone.boxes.tolist() == truth.boxes.tolist()  # the true boxes themselves
    assert alone.labels.tolist() == [1, 0] and alone.truth.tolist() == [0, 1]


def test_box_losses_by_hand() -> None:
    truth = target([[5, 5, 15, 15]], [1])
    boxes = torch.tensor([[0.0, 0, 10, 20], [40, 40, 50, 50]])
    sampled = SampledBoxes(boxes, torch.tensor([1, 2]), torch.tensor([0, 0]))
    deltas = torch.full((2, 2, 4), 7.0)
    deltas[0, 1] = 0  # the object's own class; all other deltas must not matter
    losses = heads().box_losses(torch.zeros(2, 3), deltas, [sampled], [truth])
    assert losses["loss_cls"].item() == pytest.approx(math.log(3))
    assert losses["loss_box_reg"].item() == pytest.approx((5 + 0 + 0 + 5 * LOG2) / 2)


def test_background_is_the_last_class() -> None:
    sampled = SampledBoxes(torch.rand(3, 4), torch.tensor([2, 2, 2]), torch.tensor([0, 0, 0]))
    logits = torch.tensor([[0.0, 0.0, 30.0]] * 3)
    losses = heads().box_losses(logits, torch.ones(3, 2, 4), [sampled], [target([], [])])
    assert losses["loss_cls"] < 1e-6 and losses["loss_box_reg"] == 0


def constant_mask_head(made: RoIHeads, logit_of_class: list[float]) -> None:
    assert made.mask_head is not None
    last = made.mask_head.predictor.mask_fcn_logits
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor(logit_of_class)


def test_mask_loss_by_hand() -> None:
    """A mask that fills the left half of its box, logits of 1 everywhere for its class."""
    made = heads()
    constant_mask_head(made, [-9.0, 1.0])
    bitmap = torch.zeros(1, 8, 8, dtype=torch.uint8)
    bitmap[:, :, :4] = 1
    box = torch.tensor([[8.0, 8, 24, 24]])
    truth = Target(box, torch.tensor([1]), Crops(box, bitmap))
    background = torch.tensor([[40.0, 40, 60, 60]])
    sampled = SampledBoxes(torch.cat([box, background]), torch.tensor([1, 2]), torch.tensor([0, 0]))
    features = [torch.randn(1, 4, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    loss = made.mask_loss(features, [sampled], [truth])
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ mask targets


def test_mask_target_of_a_box_local_crop_by_hand() -> None:
    """A crop over (10, 10)..(30, 50) whose upper half is filled, seen from three boxes."""
    bitmap = torch.zeros(1, 10, 6, dtype=torch.uint8)
    bitmap[:, :5] = 1
    masks = Crops(torch.tensor([[10.0, 10, 30, 50]]), bitmap)
    boxes = torch.tensor([[10.0, 10, 30, 50], [10, 10, 30, 30], [12, 32, 28, 48]])
    whole, upper, lower = mask_targets(masks, torch.tensor([0, 0, 0]), boxes)
    assert whole.shape == (28, 28) and whole.dtype == torch.float32
    assert whole[:13].all() and not whole[15:].any()  # the edge cells are interpolated
    assert upper[:27].all() and not lower.any()


# ------------------------------------------------------------------ detections


def test_best_boxes_by_hand() -> None:
    made = heads(num_classes=2, score_threshold=0.3, nms_threshold=0.5)
    first, second, third = [0.0, 0, 10, 10], [0.0, 0, 10, 9], [20.0, 0, 30, 10]
    boxes = torch.tensor([[first, first], [second, second], [third, [20.0, 0, 90, 10]]])
    scores = torch.tensor([[0.9, 0.4], [0.8, 0.2], [0.3, 0.7]])
    found = made.best_boxes(boxes, scores, (50, 40))
    # Class 0 loses `second` to NMS; class 1 keeps `first` although class 0 has it too; a score at
    # the threshold is out; the last box is clipped to the image.
    assert found.boxes.tolist() == [first, [20, 0, 40, 10], first]
    assert found.labels.tolist() == [0, 1, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.4])
    assert found.image_size == (50, 40)

    made.detections_per_image = 1
    assert made.best_boxes(boxes, scores, (50, 40)).scores.tolist() == pytest.approx([0.9])


def test_a_proposal_with_a_box_that_is_no_number_drops_out() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[float("inf"), 0, 10, 10]], [[20.0, 0, 30, 10]]])
    scores = torch.tensor([[0.9], [0.8], [float("nan")]])
    found = heads(num_classes=1).best_boxes(boxes, scores, (50, 50))
    assert found.scores.tolist() == pytest.approx([0.9])


def test_masks_are_of_the_predicted_class() -> None:
    made = heads().eval()
    constant_mask_head(made, [-LOG2, LOG2])
    box = torch.tensor([[0.0, 0, 8, 8], [1, 1, 9, 9]])
    found = [
        Detections(box, torch.ones(2), torch.tensor([1, 0]), (32, 32)),
        Detections(box[:0], torch.ones(0), torch.zeros(0, dtype=torch.long), (32, 32)),
    ]
    features = [torch.randn(2, 4, 32 // s, 32 // s) for s in (4, 8, 16, 32)]
    first, second = made.add_masks(features, found)
    assert first.mask_probabilities.mean(dim=(1, 2)).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert second.mask_probabilities.shape == (0, 28, 28)


def test_nothing_found_is_empty_not_an_error() -> None:
    made = heads(score_threshold=0.99).eval()
    features = [torch.randn(1, 4, 32 // s, 32 // s) for s in (4, 8, 16, 32)]
    batch = Batch(torch.zeros(1, 3, 32, 32), [(32, 32)], [])
    for proposals in (torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)):
        found = made.detect(batch, features, [proposals])[0]
        assert len(found) == 0 and found.mask_probabilities.shape == (0, 28, 28)
