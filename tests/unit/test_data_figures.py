"""Figures of bitmaps and of padding."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mimdet.viz import padding_factor, show_batches, show_bitmaps, show_sample


def test_padding_factor_by_hand():
    # 32 x 32 has 4 tokens, 64 x 64 has 16; together both are computed on 64 x 64.
    assert padding_factor([[(32, 32), (64, 64)]]) == pytest.approx(32 / 20)
    assert padding_factor([[(32, 32)], [(64, 64)]]) == 1
    # Height and width grow apart: a canvas of 64 x 64 for 32 x 64 and 64 x 32.
    assert padding_factor([[(32, 64), (64, 32)]]) == pytest.approx(32 / 16)
    # Even alone an image is padded to a multiple of 32: 16 x 16 is one token of four.
    assert padding_factor([[(16, 16)]]) == 4


def test_batches_say_their_factor_and_show_padding():
    ways = {"mixed": [[(320, 320), (640, 640)]], "sorted": [[(320, 320)], [(640, 640)]]}
    fig = show_batches(ways)
    assert "mixed: 1.60 x; sorted: 1.00 x" in fig.alt_text
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles == ["mixed: 1.60 x", "sorted: 1.00 x"]
    pixels = _pixels(fig)
    orange = np.array([0xE6, 0x9F, 0x00])
    padded = (np.abs(pixels - orange).sum(2) < 12).mean(1)  # share of each row of pixels
    half = len(padded) // 2
    assert padded[:half].max() > 0.1  # the padding of the mixed batch
    assert padded[half + 30 :].max() == 0  # none in the sorted ones


def test_bitmaps_keep_their_cells():
    plane = torch.zeros(4, 8, dtype=torch.uint8)
    plane[:, :2] = 1
    fig = show_bitmaps({"left quarter": plane, "all": np.ones((4, 4), bool)})
    assert fig.alt_text == "Bitmaps: left quarter: 25% covered; all: 100% covered."
    blue = np.abs(_pixels(fig) - np.array([0x00, 0x72, 0xB2])).sum(2) < 12
    assert blue.mean() > 0.2


def test_nothing_to_show():
    with pytest.raises(ValueError, match="nothing to show"):
        show_sample(torch.zeros(3, 8, 8, dtype=torch.uint8), {})
    with pytest.raises(ValueError, match="nothing to show"):
        show_bitmaps({})
    with pytest.raises(ValueError, match="nothing to show"):
        show_batches({})
    with pytest.raises(ValueError, match="at least one picture"):
        show_batches({"empty": [[]]})


def _pixels(fig):
    file = io.BytesIO()
    fig.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB")).astype(int)
