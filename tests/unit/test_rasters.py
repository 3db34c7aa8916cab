"""Box-local masks: by-hand cases, the empty ring, and agreement of the three sources."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mimdet.data.rasters import crops_from_bitmaps, crops_from_segmentations, extent, full_bitmap

SQUARE = [10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]
COORDINATE = st.floats(-50, 200, width=32)


def _empty_ring(bitmaps: torch.Tensor) -> bool:
    inner = bitmaps[:, 1:-1, 1:-1].sum()
    return bool(inner == bitmaps.sum()) and bool(inner > 0)


def test_crop_of_a_two_by_two_box_by_hand():
    mask = np.zeros((1, 5, 6), dtype=bool)
    mask[0, 1:3, 2:4] = [[True, False], [True, True]]
    crops = crops_from_bitmaps(mask, np.array([[2, 1, 4, 3]]), side=6)
    assert crops.boxes.tolist() == [[1.5, 0.5, 4.5, 3.5]]  # a cell is half a pixel
    rows = ["000000", "011000", "011000", "011110", "011110", "000000"]
    assert crops.bitmaps[0].tolist() == [list(map(int, row)) for row in rows]
    assert crops.bitmaps.dtype == torch.uint8


def test_no_objects():
    for crops in (
        crops_from_bitmaps(np.zeros((0, 4, 4)), np.zeros((0, 4))),
        crops_from_segmentations([], 4, 4),
    ):
        assert crops.boxes.shape == (0, 4) and crops.bitmaps.shape == (0, 112, 112)


def test_a_square_polygon_fills_every_inner_cell_and_its_bitmap():
    crops = crops_from_segmentations([[SQUARE]], 50, 60)
    cell = 10 / 110
    expected = torch.tensor([[10 - cell, 10 - cell, 20 + cell, 20 + cell]])
    torch.testing.assert_close(crops.boxes, expected)
    assert int(crops.bitmaps.sum()) == 110 * 110
    assert _empty_ring(crops.bitmaps)
    square = full_bitmap([SQUARE], 30, 40)
    assert square.shape == (30, 40) and square.dtype == bool
    assert extent(square) == (10, 10, 20, 20) and square.sum() == 100
    parts = [SQUARE, [value + 15 for value in SQUARE]]
    assert full_bitmap(parts, 40, 40).sum() == 200  # two parts are one object


def test_polygons_are_united_may_leave_the_image_and_keep_the_corners_of_a_sliver():
    right = [30.0, 10.0, 40.0, 10.0, 40.0, 20.0, 30.0, 20.0]
    bitmap = crops_from_segmentations([[SQUARE, [0, 0, 5, 5], right]], 50, 60).bitmaps[0]
    share = bitmap[1:-1, 1:-1].float().mean().item()
    assert share == pytest.approx(2 / 3, abs=0.02)  # of an extent of 30 x 10
    assert bitmap[56, 56] == 0 and bitmap[56, 10] == 1 and bitmap[56, 100] == 1
    beyond, sliver = [-10, -10, 20, -10, 20, 20, -10, 20], [10, 10, 20, 20, 15, 15]
    crops = crops_from_segmentations([[beyond], [sliver]], 15, 15)
    assert crops.boxes[0, 0] < -10 and crops.bitmaps.sum((1, 2)).tolist() == [110 * 110, 3]
    assert _empty_ring(crops.bitmaps)


def test_run_lengths_of_three_kinds_agree():
    mask = np.zeros((50, 60), dtype=np.uint8)
    mask[10:20, 5:9] = 1
    runs = coco_mask.encode(np.asfortranarray(mask))
    plain = {"size": [50, 60], "counts": [260, *[10, 40] * 3, 10, 2580]}
    text = {"size": [50, 60], "counts": runs["counts"].decode()}
    crops = crops_from_segmentations([runs, plain, text], 50, 60)
    direct = crops_from_bitmaps(mask[None], np.array([[5, 10, 9, 20]]))
    for i, segmentation in enumerate((runs, plain, text)):
        assert torch.equal(crops.bitmaps[i], direct.bitmaps[0])
        assert torch.equal(crops.boxes[i], direct.boxes[0])
        assert (full_bitmap(segmentation, 50, 60) == mask).all()


@pytest.mark.parametrize(
    "segmentation", [[[1, 2, 3, 4]], [], [[1, 1, 5, 1, 9, 1]], {"size": [50, 60], "counts": [3000]}]
)
def test_masks_without_extent_are_refused(segmentation):
    with pytest.raises(ValueError, match=r"nothing|empty"):
        crops_from_segmentations([[SQUARE], segmentation], 50, 60)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=9))
def test_the_ring_is_empty_for_any_polygon(points):
    corners = np.array(points)
    if (np.ptp(corners, axis=0) < 1e-3).any():
        return
    crops = crops_from_segmentations([[corners.ravel().tolist()]], 100, 100)
    assert _empty_ring(crops.bitmaps)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 100), st.integers(1, 100))
def test_a_crop_back_in_its_box_is_the_mask(seed, height, width):
    """Nearest sampling up to 110 cells a side keeps every pixel of a box no larger than that."""
    mask = np.random.default_rng(seed).random((1, height, width)) < 0.4
    mask[0, height // 2, width // 2] = True
    left, top, right, bottom = extent(mask[0])
    bitmap = crops_from_bitmaps(mask, np.array([[left, top, right, bottom]])).bitmaps[0].numpy()
    rows = ((np.arange(bottom - top) + 0.5) / (bottom - top) * 110).astype(int) + 1
    columns = ((np.arange(right - left) + 0.5) / (right - left) * 110).astype(int) + 1
    assert (bitmap[rows][:, columns] == mask[0, top:bottom, left:right]).all()
