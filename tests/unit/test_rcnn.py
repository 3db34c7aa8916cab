"""Anchors, box coding, pooling, matching: numbers a reader can check by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mimdet.models.batchnorm import SyncedBatchNorm
from mimdet.models.rcnn import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_SIZE_DELTA,
    AlignedRoIPool,
    AnchorGrid,
    BoxCoder,
    Losses,
    clip_boxes,
    make_norm,
    match,
    non_empty,
    pad_and_normalise,
    padded_size,
    subsample,
)

CPU = torch.device("cpu")
STRIDES = (4, 8, 16, 32)


def in_order(count: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(count, device=device)


# ------------------------------------------------------------------ batch


def test_padded_size() -> None:
    assert padded_size(800, 1333) == (800, 1344)
    assert padded_size(1, 32) == (32, 32)


def test_batch_is_normalised_before_it_is_padded() -> None:
    tall = torch.full((3, 40, 20), 255, dtype=torch.uint8)
    wide = torch.zeros(3, 10, 33, dtype=torch.uint8)
    batch = pad_and_normalise([tall, wide], CPU)
    assert batch.tensors.shape == (2, 3, 64, 64)
    assert batch.image_sizes == [(40, 20), (10, 33)]
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
    assert ratios.tolist() == [  # ratio = height / width; area stays 32 x 32
        [-32, -8, 32, 8],
        [-8, -32, 8, 32],
        [-32, 0, 32, 16],
        [-8, -24, 8, 40],
    ]
    assert ratios.dtype == torch.float32


def test_anchors_of_p6_keep_stride_64_and_are_not_rounded() -> None:
    """At height 800 p6 has 13 rows; 800 // 13 would be a stride of 61."""
    ours = AnchorGrid((512,), (0.5, 1.0, 2.0), (64,))([(13, 21)])[0].view(13, 21, 3, 4)
    centre = (ours[..., :2] + ours[..., 2:]) / 2
    assert centre[12, 20].tolist() == [[1280, 768]] * 3
    width = ours[0, 0, 0, 2] - ours[0, 0, 0, 0]
    assert width.item() == pytest.approx(512 * 2**0.5, rel=1e-6)  # 724.08, not 724


def test_one_anchor_size_a_level() -> None:
    with pytest.raises(ValueError, match="2 anchor sizes for 1 pyramid levels"):
        AnchorGrid((32, 64), (1.0,), (4,))


# ------------------------------------------------------------------ box coder


def test_box_deltas_by_hand() -> None:
    reference = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    box = torch.tensor([[5.0, 5.0, 15.0, 15.0]])
    deltas = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode(reference, box)
    torch.testing.assert_close(deltas, torch.tensor([[5.0, 0.0, 0.0, 5 * math.log(0.5)]]))
    per_class = BoxCoder().decode(
        reference, torch.tensor([[[0.5, 0, 0, 0], [0, 0, math.log(2), 0]]])
    )
    assert per_class.shape == (1, 2, 4)
    torch.testing.assert_close(
        per_class[0], torch.tensor([[5.0, 0.0, 15.0, 20.0], [-5.0, 0.0, 15.0, 20.0]])
    )


def test_a_size_delta_is_clamped_from_above_only() -> None:
    reference = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    huge = BoxCoder().decode(reference, torch.tensor([[0.0, 0.0, 50.0, -50.0]]))[0]
    assert math.exp(MAX_SIZE_DELTA) == pytest.approx(62.5)
    assert (huge[2] - huge[0]).item() == pytest.approx(8 * 62.5)
    assert (huge[3] - huge[1]).item() == pytest.approx(0, abs=1e-6)


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
    pooled = AlignedRoIPool(7, STRIDES)(features, [box])
    assert pooled.shape == (1, 2, 7, 7)
    centres = (torch.arange(7) + 0.5) * side / 7
    torch.testing.assert_close(pooled[0, 0], (100 + centres).expand(7, 7))
    torch.testing.assert_close(pooled[0, 1], (60 + centres)[:, None].expand(7, 7))


def test_boxes_go_to_their_image_and_come_back_in_order() -> None:
    features = [torch.zeros(2, 1, 512 // s, 512 // s) for s in STRIDES]
    for level, feature in enumerate(features):
        feature[0], feature[1] = level, 10 + level
    squares = torch.tensor([[0, 0, side, side] for side in (300.0, 20.0, 500.0, 150.0)])
    pooled = AlignedRoIPool(2, STRIDES)(features, [squares[:3], squares[3:]])
    assert pooled[:, 0, 0, 0].tolist() == [2, 0, 3, 11]


def test_no_boxes_leave_a_path_for_the_gradient() -> None:
    features = [torch.ones(1, 3, 8, 8, requires_grad=True) for _ in STRIDES]
    pooled = AlignedRoIPool(7, STRIDES)(features, [torch.zeros(0, 4)])
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(f.grad is not None and f.grad.abs().sum() == 0 for f in features)


def test_the_area_of_a_box_decides_its_level() -> None:
    features = [torch.full((1, 1, 512 // s, 512 // s), i + 2.0) for i, s in enumerate(STRIDES)]
    sides = torch.tensor([0.0, 1, 111, 112, 223, 224, 447, 448, 5000])
    squares = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    for boxes in (squares, squares * torch.tensor([1, 1, 0.5, 2])):
        pooled = AlignedRoIPool(2, STRIDES)(features, [boxes])
        levels = AlignedRoIPool(2, STRIDES).level_of(boxes) + 2
        assert levels.tolist() == [2, 2, 2, 3, 3, 4, 4, 5, 5]
        assert torch.equal(pooled[1:8, 0, 0, 0], levels[1:8].float())
    moved = AlignedRoIPool(2, STRIDES, canonical_size=112.0)(features, [squares[3:4]])
    assert moved[0, 0, 0, 0] == 4


# ------------------------------------------------------------------ matching


def test_matching_by_hand() -> None:
    overlap = torch.tensor([[0.90, 0.40, 0.10, 0.30], [0.20, 0.65, 0.05, 0.70]])
    index, label = match(overlap, 0.3, 0.7)
    assert index.tolist() == [0, 1, 0, 1]
    assert label.tolist() == [1, -1, 0, 1]  # at `high` is an object already


def test_the_lower_bound_is_not_background() -> None:
    assert match(torch.tensor([[0.3, 0.2999]]), 0.3, 0.7)[1].tolist() == [-1, 0]
    assert match(torch.tensor([[0.5, 0.4999]]), 0.5, 0.5)[1].tolist() == [1, 0]


def test_every_true_box_gets_its_best_candidates() -> None:
    overlap = torch.tensor([[0.10, 0.20, 0.20, 0.00], [0.00, 0.60, 0.05, 0.65]])
    assert match(overlap, 0.3, 0.7)[1].tolist() == [0, -1, 0, -1]
    index, label = match(overlap, 0.3, 0.7, rescue_best=True)
    assert label.tolist() == [0, 1, 1, 1]  # both of truth 0's equally good ones
    assert index.tolist() == [0, 1, 0, 1]  # a rescued candidate keeps the truth it overlaps most


def test_without_true_boxes_everything_is_background() -> None:
    index, label = match(torch.zeros(0, 5), 0.3, 0.7, rescue_best=True)
    assert index.tolist() == label.tolist() == [0] * 5


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.sampled_from([0.25, 0.5]))
def test_subsample_counts(positives: int, negatives: int, total: int, share: float) -> None:
    positive, negative = torch.arange(positives), torch.arange(100, 100 + negatives)
    objects, background = subsample(positive, negative, total, share)
    assert len(objects) == min(int(total * share), positives)
    assert len(background) == min(total - len(objects), negatives)
    assert len(objects.unique()) == len(objects) and torch.isin(objects, positive).all()
    assert len(background.unique()) == len(background) and torch.isin(background, negative).all()


def test_subsample_takes_a_permutation() -> None:
    chosen = subsample(torch.arange(10, 20), torch.arange(50, 90), 8, 0.25, in_order)
    assert [part.tolist() for part in chosen] == [[10, 11], [50, 51, 52, 53, 54, 55]]


# ------------------------------------------------------------------ small ones


def test_clipping() -> None:
    boxes = torch.tensor([[[-5.0, -1.0, 50.0, 8.0], [45.0, 25.0, 60.0, 99.0]]])
    expected = [[[0, 0, 40, 8], [40, 25, 40, 30]]]  # (height, width) = (30, 40)
    assert clip_boxes(boxes, (30, 40)).tolist() == expected


def test_boxes_without_width_or_height_are_empty() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 0, 1, 5], [0, 5, 5, 5], [3, 0, 2, 9]])
    assert non_empty(boxes).tolist() == [True, False, False, False]


def test_l1_is_plain() -> None:
    assert Losses().boxes(torch.tensor([0.05, 3.0]), torch.zeros(2)).item() == pytest.approx(3.05)


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
