"""Anchors, boxes, matching, RPN and RoI heads: cases small enough to work out on paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import box_iou

from mimdet.models import rcnn
from mimdet.models.batchnorm import SyncedBatchNorm
from mimdet.models.rcnn import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_SIZE_DELTA,
    AlignedRoIPool,
    AnchorGrid,
    Batch,
    BoxCoder,
    draw_places,
    make_norm,
    match,
    match_boxes,
    non_empty,
    pad_and_normalise,
    padded_size,
    rois_of,
)
from mimdet.models.roi_heads import BoxHead, MaskHead, RoIHeads, SampledBoxes, mask_targets
from mimdet.models.rpn import RPN, Proposals
from mimdet.structures import Crops, Detections, Target

STRIDES = (4, 8, 16, 32)
LOG2 = math.log(2)


def in_order(count: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(count, device=device)


def target(boxes: list[list[float]], labels: list[int], masks: Crops | None = None) -> Target:
    return Target(torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.long), masks)


# ------------------------------------------------------------------ batch


def test_batch_is_normalised_before_it_is_padded() -> None:
    tall = torch.full((3, 40, 20), 255, dtype=torch.uint8)
    wide = torch.zeros(3, 10, 33, dtype=torch.uint8)
    batch = pad_and_normalise([tall, wide], nn.Linear(1, 1))
    assert batch.tensors.shape == (2, 3, 64, 64)
    assert pad_and_normalise([wide], nn.Linear(1, 1).double()).tensors.dtype == torch.float64
    assert batch.image_sizes == [(40, 20), (10, 33)]
    assert padded_size(800, 1333) == (800, 1344) and padded_size(1, 32) == (32, 32)
    for channel in range(3):
        mean, std = IMAGENET_MEAN[channel], IMAGENET_STD[channel]
        white, black = batch.tensors[0, channel], batch.tensors[1, channel]
        torch.testing.assert_close(white[:40, :20], torch.full((40, 20), (255 - mean) / std))
        torch.testing.assert_close(black[:10, :33], torch.full((10, 33), -mean / std))
        assert white[40:].abs().sum() == white[:, 20:].abs().sum() == 0
        assert black[10:].abs().sum() == black[:, 33:].abs().sum() == 0


# ------------------------------------------------------------------ anchors


def test_anchors_by_hand() -> None:
    two = AnchorGrid(sizes=(32,), ratios=(1.0,), strides=(4,))([(1, 2)])[0]
    assert two.tolist() == [[-16, -16, 16, 16], [-12, -16, 20, 16]]  # the second is 4 px right

    ratios = AnchorGrid(sizes=(32,), ratios=(0.25, 4.0), strides=(8,))([(2, 1)])[0]
    expected = [[-32, -8, 32, 8], [-8, -32, 8, 32], [-32, 0, 32, 16], [-8, -24, 8, 40]]
    assert ratios.tolist() == expected  # ratio = height / width; area stays 32 x 32
    assert ratios.dtype == torch.float32
    with pytest.raises(ValueError, match="2 anchor sizes for 1 pyramid levels"):
        AnchorGrid((32, 64), (1.0,), (4,))


def test_anchors_of_p6_keep_stride_64_and_are_not_rounded() -> None:
    """At height 800 p6 has 13 rows; 800 // 13 would be a stride of 61."""
    ours = AnchorGrid((512,), (0.5, 1.0, 2.0), (64,))([(13, 21)])[0].view(13, 21, 3, 4)
    centre = (ours[..., :2] + ours[..., 2:]) / 2
    assert centre[12, 20].tolist() == [[1280, 768]] * 3
    width = ours[0, 0, 0, 2] - ours[0, 0, 0, 0]
    assert width.item() == pytest.approx(512 * 2**0.5, rel=1e-6)  # 724.08, not 724


# ------------------------------------------------------------------ box coder


def test_box_deltas_by_hand() -> None:
    reference = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    box = torch.tensor([[5.0, 5.0, 15.0, 15.0]])
    deltas = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode(reference, box)
    torch.testing.assert_close(deltas, torch.tensor([[5.0, 0.0, 0.0, 5 * math.log(0.5)]]))
    per_class = BoxCoder().decode(reference, torch.tensor([[[0.5, 0, 0, 0], [0, 0, LOG2, 0]]]))
    expected = torch.tensor([[[5.0, 0.0, 15.0, 20.0], [-5.0, 0.0, 15.0, 20.0]]])
    torch.testing.assert_close(per_class, expected)
    # A size delta is clamped from above only.
    x0, y0, x1, y1 = BoxCoder().decode(reference, torch.tensor([[0.0, 0.0, 50.0, -50.0]]))[0]
    assert math.exp(MAX_SIZE_DELTA) == pytest.approx(62.5) == (x1 - x0).item() / 10
    assert (y1 - y0).item() == pytest.approx(0, abs=1e-6)


def test_decoding_is_float32_whatever_the_heads_computed_in() -> None:
    decoded = BoxCoder().decode(torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16))
    assert decoded.dtype == torch.float32


# ------------------------------------------------------------------ pooling


def ramp(stride: int, height: int = 512, width: int = 768) -> Tensor:
    """(1, 2, h, w): the x and y coordinate, in image pixels, of every cell's centre."""
    y = (torch.arange(height // stride) + 0.5) * stride
    x = (torch.arange(width // stride) + 0.5) * stride
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows])[None]


@pytest.mark.parametrize("side", [40.0, 112.0, 224.0, 300.0])
def test_pooling_a_ramp_gives_the_centres_of_the_bins(side: float) -> None:
    """On a map of coordinates, aligned sampling reads exactly the middle of every bin."""
    features = [ramp(stride) for stride in STRIDES]
    box = torch.tensor([[100.0, 60.0, 100 + side, 60 + side]])
    pooled = AlignedRoIPool(7, STRIDES)(features, rois_of([box]))
    assert pooled.shape == (1, 2, 7, 7)
    centres = (torch.arange(7) + 0.5) * side / 7
    torch.testing.assert_close(pooled[0, 0], (100 + centres).expand(7, 7))
    torch.testing.assert_close(pooled[0, 1], (60 + centres)[:, None].expand(7, 7))


def test_boxes_go_to_their_image_and_come_back_in_order() -> None:
    features = [torch.zeros(2, 1, 512 // s, 512 // s) for s in STRIDES]
    for level, feature in enumerate(features):
        feature[0], feature[1] = level, 10 + level
    squares = torch.tensor([[0, 0, side, side] for side in (300.0, 20.0, 500.0, 150.0)])
    pooled = AlignedRoIPool(2, STRIDES)(features, rois_of([squares[:3], squares[3:]]))
    assert pooled[:, 0, 0, 0].tolist() == [2, 0, 3, 11]


def test_the_area_of_a_box_decides_its_level() -> None:
    features = [torch.full((1, 1, 512 // s, 512 // s), i + 2.0) for i, s in enumerate(STRIDES)]
    sides = torch.tensor([0.0, 1, 111, 112, 223, 224, 447, 448, 5000])
    squares = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    for boxes in (squares, squares * torch.tensor([1, 1, 0.5, 2])):
        pooled = AlignedRoIPool(2, STRIDES)(features, rois_of([boxes]))
        levels = AlignedRoIPool(2, STRIDES).level_of(boxes) + 2
        assert levels.tolist() == [2, 2, 2, 3, 3, 4, 4, 5, 5]
        assert torch.equal(pooled[1:8, 0, 0, 0], levels[1:8].float())
    moved = AlignedRoIPool(2, STRIDES, canonical_size=112.0)(features, rois_of([squares[3:4]]))
    assert moved[0, 0, 0, 0] == 4


# ------------------------------------------------------------------ matching


def test_matching_by_hand() -> None:
    overlap = torch.tensor([[0.90, 0.40, 0.10, 0.30], [0.20, 0.65, 0.05, 0.70]])
    index, label = match(overlap, [2], 0.3, 0.7)
    assert index.tolist() == [[0, 1, 0, 1]]
    assert label.tolist() == [[1, -1, 0, 1]]  # at `high` is an object already
    index, label = match(overlap, [1, 0, 1], 0.3, 0.7)  # two images of one object, one of none
    assert index[0].tolist() == [0, 0, 0, 0] and index[2].tolist() == [1, 1, 1, 1]
    assert label.tolist() == [[1, -1, 0, -1], [0, 0, 0, 0], [0, -1, 0, 1]]
    # The lower bound is not background.
    assert match(torch.tensor([[0.3, 0.2999]]), [1], 0.3, 0.7)[1].tolist() == [[-1, 0]]
    assert match(torch.tensor([[0.5, 0.4999]]), [1], 0.5, 0.5)[1].tolist() == [[1, 0]]
    # Every true box gets its best candidates, if it is asked for.
    overlap = torch.tensor([[0.10, 0.20, 0.20, 0.00], [0.00, 0.60, 0.05, 0.65]])
    assert match(overlap, [2], 0.3, 0.7)[1].tolist() == [[0, -1, 0, -1]]
    index, label = match(overlap, [2], 0.3, 0.7, overlap.amax(1, keepdim=True))
    assert label.tolist() == [[0, 1, 1, 1]]  # both of truth 0's equally good ones
    assert index.tolist() == [[0, 1, 0, 1]]  # a rescued candidate keeps the truth it overlaps most


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("rescue_best", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, 100, 1 << 23])
def test_images_and_parts_match_as_each_image_alone(
    alike: bool, rescue_best: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rcnn, "MATCHED_AT_ONCE", at_once)
    monkeypatch.setattr(rcnn, "MATCHED_WHOLE", at_once if at_once > 100 else 0)
    corners = torch.rand(3, 60, 2, generator=torch.Generator().manual_seed(1)) * 20
    boxes = torch.cat([corners, corners + 9], 2).round()  # equal overlaps occur
    boxes = boxes[:1] if alike else boxes
    truths = [boxes[0, :6], boxes[0, :0], boxes[-1, 5:9] + 1]
    index, label = match_boxes(truths, boxes, 0.3, 0.7, rescue_best)
    for i, truth in enumerate(truths):
        own = box_iou(truth, boxes[0 if alike else i])
        most = own.amax(1, keepdim=True) if rescue_best else None
        expected = match(own, [len(truth)], 0.3, 0.7, most)
        assert torch.equal(index[i] - sum(map(len, truths[:i])), expected[0][0])
        assert torch.equal(label[i], expected[1][0])
    nothing = match_boxes([boxes[0, :0]], boxes[:1], 0.3, 0.7, rescue_best)
    assert nothing[1].tolist() == [[0] * 60]


def test_places_are_drawn_from_each_image() -> None:
    label = torch.tensor([[1, 0, -1, 1, 1], [0, 0, 0, -1, -1], [-1, -1, -1, -1, 1]])
    drawn = draw_places(label, 4, 0.5, in_order)
    assert [own.tolist() for own, _ in drawn] == [[0, 3], [], [14]]
    assert [others.tolist() for _, others in drawn] == [[1], [5, 6, 7], []]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.sampled_from([0.25, 0.5]))
def test_counts_of_a_draw(positives: int, negatives: int, total: int, share: float) -> None:
    positive, negative = torch.arange(positives + negatives).split([positives, negatives])
    label = torch.cat([torch.ones(positives), torch.zeros(negatives), torch.full((9,), -1)])[None]
    ((objects, background),) = draw_places(label, total, share)
    assert len(objects) == min(int(total * share), positives)
    assert len(background) == min(total - len(objects), negatives)
    assert len(objects.unique()) == len(objects) and torch.isin(objects, positive).all()
    assert len(background.unique()) == len(background) and torch.isin(background, negative).all()


# ------------------------------------------------------------------ small ones


def test_boxes_that_are_empty() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 0, 1, 5], [0, 5, 5, 5], [3, 0, 2, 9]])
    assert non_empty(boxes).tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["BN", "GN", "LN"])
@pytest.mark.parametrize("channels", [24, 64])
def test_norms(name: str, channels: int) -> None:
    norm = make_norm(name)(channels)
    x = 3 + 2 * torch.randn(4, channels, 6, 6)
    assert isinstance(norm, SyncedBatchNorm) == (name == "BN")
    axes = {"BN": (0, 2, 3), "GN": None, "LN": (1,)}[name]
    y = norm(x)
    if axes is None:
        assert isinstance(norm, nn.GroupNorm) and norm.num_groups == math.gcd(32, channels)
        y, axes = y.unflatten(1, (norm.num_groups, -1)), (2, 3, 4)
    assert y.mean(dim=axes).abs().max() < 1e-4
    assert (y.var(dim=axes, unbiased=False) - 1).abs().max() < 1e-3
    with pytest.raises(ValueError, match="'BN', 'GN' or 'LN'"):
        make_norm(f"Sync{name}")


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


def test_proposals_are_clipped_and_sorted_and_those_outside_or_not_finite_drop_out() -> None:
    found = propose(small_rpn(), [[1.0, 3.0, 2.0, -4.0]])
    assert found.boxes.tolist() == [[4, 0, 12, 4], [0, 4, 4, 12], [0, 0, 4, 4], [4, 4, 12, 12]]
    assert found.logits.tolist() == [3, 2, 1, -4]
    deltas = torch.zeros(1, 4, 4)
    deltas[0, 0, 2] = float("nan")
    found = propose(small_rpn(), [[5.0, 3.0, 2.0, 1.0]], (12, 4), [deltas])
    assert found.boxes.tolist() == [[0, 4, 4, 12]]  # of an image 4 wide; anchor 0 was not a number


def test_nms_works_within_a_level_and_counts_depend_on_the_phase() -> None:
    rpn = small_rpn(2, pre_nms=(4, 2), post_nms=(5, 3))
    logits = [[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]]
    assert propose(rpn, logits).logits.tolist() == [8, 7, 4]  # two a level, three in all
    assert propose(rpn.train(), logits).logits.tolist() == [8, 7, 6, 5, 4]
    shifted = torch.zeros(1, 4, 4)
    shifted[0, 0, 0] = 1.0  # anchor 0 moves 8 px right, onto anchor 1
    equal = propose(small_rpn(), [[5.0, 3.0, 2.0, 1.0]], deltas=[shifted])
    assert equal.logits.tolist() == [5, 2, 1]
    across = propose(small_rpn(2), [[5.0, 3.0, 2.0, 1.0]] * 2)
    assert len(across.boxes) == 8  # equal boxes of different levels all stay


def test_rpn_losses_by_hand_and_its_initialisation() -> None:
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
    rpn = RPN(64, AnchorGrid((8,), (1.0,), (8,)))
    for name, parameter in rpn.head.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.05)


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


# ------------------------------------------------------------------ RoI heads: losses


def heads(num_classes: int = 2, masks: bool = True, **settings: object) -> RoIHeads:
    box_head = BoxHead(4, num_classes, 1, 8, nn.BatchNorm2d)
    mask_head = MaskHead(4, num_classes, 1, nn.BatchNorm2d) if masks else None
    return RoIHeads(box_head, mask_head, **settings)  # type: ignore[arg-type]


def test_sampled_boxes_hold_the_truth_and_a_quarter_of_objects() -> None:
    made = heads(rois_per_image=8, permute=in_order)
    truth = target([[0, 0, 10, 10], [50, 50, 70, 70]], [1, 0])
    near, far = [0.0, 0, 10, 9], [200.0, 200, 220, 230]
    nothing = target([], [])
    proposals = [torch.tensor([far, near, near, far, far]), torch.zeros(0, 4), torch.tensor([far])]
    sampled = made.sample(proposals, [truth, truth, nothing])
    # 2 of 8 may be objects: the first two proposals that overlap; then all background there is. In
    # the second image there are only the true boxes themselves, in the third nothing is true.
    boxes = [near, near, far, far, far, *truth.boxes.tolist(), far]
    assert sampled.rois[:, 1:].tolist() == boxes
    assert sampled.rois[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 2]
    assert sampled.labels.tolist() == [1, 1, 2, 2, 2, 1, 0, 2]
    assert sampled.objects.tolist() == [0, 1, 5, 6] and sampled.counts == [2, 2, 0]
    assert sampled.truth.tolist() == [0, 0, 2, 3]  # of the four true boxes of all images


def one_object(boxes: Tensor) -> SampledBoxes:
    """Two boxes of an image: the first of class 1, its only true one; the other background."""
    labels, first = torch.tensor([1, 2]), torch.tensor([0])
    return SampledBoxes(rois_of([boxes]), labels, first, first, [1])


def test_box_losses_by_hand() -> None:
    truth = target([[5, 5, 15, 15]], [1])
    boxes = torch.tensor([[0.0, 0, 10, 20], [40, 40, 50, 50]])
    sampled = one_object(boxes)
    deltas = torch.full((2, 2, 4), 7.0)
    deltas[0, 1] = 0  # the object's own class; all other deltas must not matter
    losses = heads().box_losses(torch.zeros(2, 3), deltas, sampled, [truth])
    assert losses["loss_cls"].item() == pytest.approx(math.log(3))
    assert losses["loss_box_reg"].item() == pytest.approx((5 + 0 + 0 + 5 * LOG2) / 2)
    sure = torch.tensor([[0.0, 30, 0], [0, 0, 30]])  # background is the last class
    assert heads().box_losses(sure, deltas, sampled, [truth])["loss_cls"] < 1e-6


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
    sampled = one_object(torch.cat([box, background]))
    features = [torch.randn(1, 4, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    loss = made.mask_loss(features, sampled, [truth])
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
    # Of a proposal whose box or score is no number nothing is left.
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[float("inf"), 0, 10, 10]], [[20.0, 0, 30, 10]]])
    scores = torch.tensor([[0.9], [0.8], [float("nan")]])
    found = heads(num_classes=1).best_boxes(boxes, scores, (50, 50))
    assert found.scores.tolist() == pytest.approx([0.9])


def test_masks_are_of_the_predicted_class_and_nothing_found_is_no_error() -> None:
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
    made = heads(score_threshold=0.99).eval()
    features = [torch.randn(1, 4, 32 // s, 32 // s) for s in (4, 8, 16, 32)]
    batch = Batch(torch.zeros(1, 3, 32, 32), [(32, 32)], [])
    for proposals in (torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)):
        found = made.detect(batch, features, [proposals])[0]
        assert len(found) == 0 and found.mask_probabilities.shape == (0, 28, 28)
