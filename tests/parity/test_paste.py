"""Masks pasted into the image, against bitmaps made by the original implementation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mimdet.structures import paste, probabilities_to_rle, rle_to_bitmap
from tests.parity.reference import reference


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize(
    "outputs", ["mimdet_small/eval_sr1", "mimdet_v1_small/eval_sr1", "benchmarking_small/eval"]
)
def test_pasted_masks_are_the_originals(golden: Path, outputs: str, image: int) -> None:
    tensors = reference(golden / outputs)
    expected = np.load(golden / f"{outputs}_masks.npz")[f"masks_{image}"]
    probabilities = tensors[f"det_raw_mask_probs_{image}"][:, 0]
    boxes = tensors[f"det_boxes_{image}"]
    height, width = expected.shape[1:]

    rles = probabilities_to_rle(probabilities, boxes, height, width)
    ours = np.stack([rle_to_bitmap(rle) for rle in rles])
    pasted = paste(probabilities, boxes, height, width)

    assert expected.any(axis=(1, 2)).sum() >= 10  # the reference is not a set of empty masks
    assert (ours != expected).sum() <= 1e-3 * expected.sum()
    assert torch.from_numpy(expected).ne(pasted).sum() <= 1e-3 * expected.sum()
