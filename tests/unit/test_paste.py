"""Mask probabilities -> pixels: by hand, and run lengths equal to the plain way."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mimdet.structures import bitmap_to_rle, paste, probabilities_to_rle, rle_to_bitmap

side = st.floats(-20, 60, width=32)
extent = st.floats(0, 50, width=32)


def test_full_mask_fills_its_box_to_the_pixel_centres():
    boxes = torch.tensor([[2.0, 1.0, 6.0, 4.0]])
    mask = paste(torch.ones(1, 28, 28), boxes, 6, 8)[0]
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 2:6] = True
    assert torch.equal(mask, expected)


def test_half_mask_covers_half_the_box():
    probabilities = torch.zeros(1, 28, 28)
    probabilities[:, :, 14:] = 1
    mask = paste(probabilities, torch.tensor([[0.0, 0.0, 8.0, 4.0]]), 4, 8)[0]
    assert mask[:, 4:].all() and not mask[:, :4].any()


@given(
    st.lists(st.tuples(side, side, extent, extent), min_size=1, max_size=6),
    st.integers(0, 1000),
    st.sampled_from([0.3, 0.5, 0.9]),
)
def test_run_lengths_equal_the_pasted_bitmaps(corners, seed, threshold):
    """Boxes partly or wholly outside, thin, empty: the same pixels either way."""
    height, width = 31, 43
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in corners])
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(len(boxes), 7, 7, generator=generator)
    pasted = paste(cells, boxes, height, width, threshold).numpy()
    rles = probabilities_to_rle(cells, boxes, height, width, threshold)
    for bitmap, rle in zip(pasted, rles, strict=True):
        assert rle["size"] == [height, width]
        # Rounding may decide a pixel that lies on the threshold to 1e-6.
        assert np.count_nonzero(rle_to_bitmap(rle) != bitmap) <= 1


def test_nothing_detected():
    assert probabilities_to_rle(torch.zeros(0, 28, 28), torch.zeros(0, 4), 5, 5) == []


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_threshold_that_would_fill_the_image(threshold):
    with pytest.raises(ValueError, match="threshold"):
        probabilities_to_rle(torch.ones(1, 2, 2), torch.zeros(1, 4), 5, 5, threshold)


def test_bitmaps_and_run_lengths_are_inverse():
    bitmap = torch.zeros(5, 4, dtype=torch.bool)
    bitmap[1:3, 2] = True
    rle = bitmap_to_rle(bitmap.numpy())
    assert isinstance(rle["counts"], str)
    assert coco_mask.area(rle) == 2
    assert np.array_equal(rle_to_bitmap(rle), bitmap.numpy())
