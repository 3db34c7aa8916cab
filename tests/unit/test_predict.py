"""predict: any input, one or many, alone or in company; and its masks in the image's pixels."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

import mimdet
from mimdet.inference import run_detector
from mimdet.structures import bitmap_to_rle, paste, probabilities_to_rle, rle_to_bitmap
from tests.small import small_detector


@pytest.fixture(scope="module")
def model():
    return small_detector()


@pytest.fixture(scope="module")
def picture():
    return mimdet.ShapesCOCO(size=96, length=1, split="val")[0].image


def same(a, b):
    assert a.image_size == b.image_size
    assert a.labels.tolist() == b.labels.tolist()
    torch.testing.assert_close(a.boxes, b.boxes, atol=1e-3, rtol=1e-5)
    for part in ("scores", "mask_probabilities"):
        torch.testing.assert_close(getattr(a, part), getattr(b, part), atol=1e-5, rtol=1e-5)


def test_every_kind_of_input_gives_the_same_in_its_own_pixels(model, picture, tmp_path):
    array = picture.permute(1, 2, 0).contiguous().numpy()
    pil = Image.fromarray(array)
    pil.save(tmp_path / "x.png")
    expected = mimdet.predict(model, picture)
    assert len(expected) > 0
    for image in (array, pil, pil.convert("RGBA"), tmp_path / "x.png", str(tmp_path / "x.png")):
        same(mimdet.predict(model, image), expected)
    grey = picture.float().mean(0).to(torch.uint8).numpy()
    same(mimdet.predict(model, grey), mimdet.predict(model, Image.fromarray(grey)))
    large = picture.repeat_interleave(3, 1).repeat_interleave(3, 2)
    found = mimdet.predict(model, large)
    assert found.image_size == (288, 288)
    assert (found.boxes >= 0).all() and (found.boxes <= 288).all()
    assert found.boxes.max() > 96


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_alone_and_in_company(model, picture, ratio):
    """Sizes that share a batch, sizes that do not, and an order that mixes them."""
    others = [picture[:, :50, :90], picture[:, :96, :70], picture[:, :52, :88], picture]
    together = mimdet.predict(model, others, sample_ratio=ratio, seed=7)
    for image, found in zip(others, together, strict=True):
        same(mimdet.predict(model, image, sample_ratio=ratio, seed=7), found)


def test_ready_sample_is_used_and_the_seed_decides_below_ratio_one_only(model, picture):
    plain = mimdet.predict(model, picture)
    everything, few = (
        mimdet.Sample([torch.tensor(places)], (4, 4)) for places in (list(range(16)), [0, 5])
    )
    same(mimdet.predict(model, picture, sample=everything), plain)
    assert not torch.equal(mimdet.predict(model, picture, sample=few).scores, plain.scores)
    a, b = (mimdet.predict(model, picture, sample_ratio=0.25, seed=s).scores for s in (0, 1))
    assert not torch.equal(a, b)
    a, b = (mimdet.predict(model, picture, sample_ratio=1.0, seed=s).scores for s in (0, 1))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (torch.zeros(3, 4, 4), "uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\(3, H, W\)"),
        (np.zeros((3, 40, 50), np.uint8), r"becomes array.transpose\(1, 2, 0\)"),
        (np.zeros((40, 50, 2), np.uint8), "uint8 of shape"),
        (3.0, "cannot read an image from float"),
        ("nowhere.jpg", r"nowhere\.jpg"),
    ],
)
def test_wrong_input_says_what_is_right(model, image, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mimdet.predict(model, image)


@pytest.mark.parametrize(("trained", "computed"), [("fp32", "fp32"), ("bf16", "auto")])
def test_who_asks_for_float32_gets_it_here_too(model, picture, monkeypatch, trained, computed):
    seen = []

    def noting(device, precision):
        seen.append(precision)
        return nullcontext()

    monkeypatch.setattr(sys.modules[run_detector.__module__], "autocast", noting)
    monkeypatch.setattr(model.config.training, "precision", trained)
    mimdet.predict(model, picture)
    assert seen == [computed]


# ------------------------------------------------------------------ masks


def test_full_mask_fills_its_box_to_the_pixel_centres():
    boxes = torch.tensor([[2.0, 1.0, 6.0, 4.0]])
    mask = paste(torch.ones(1, 28, 28), boxes, 6, 8)[0]
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 2:6] = True
    assert torch.equal(mask, expected)
    probabilities = torch.zeros(1, 28, 28)
    probabilities[:, :, 14:] = 1
    mask = paste(probabilities, torch.tensor([[0.0, 0.0, 8.0, 4.0]]), 4, 8)[0]
    assert mask[:, 4:].all() and not mask[:, :4].any()


side = st.floats(-20, 60, width=32)
extent = st.floats(0, 50, width=32)


@given(
    st.lists(st.tuples(side, side, extent, extent), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_run_lengths_equal_the_pasted_bitmaps(corners, seed):
    """Boxes partly or wholly outside, thin, empty: the same pixels either way."""
    height, width = 31, 43
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in corners])
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(len(boxes), 7, 7, generator=generator)
    pasted = paste(cells, boxes, height, width).numpy()
    rles = probabilities_to_rle(cells, boxes, height, width)
    for bitmap, rle in zip(pasted, rles, strict=True):
        assert rle["size"] == [height, width]
        # Rounding may decide a pixel that lies on the threshold to 1e-6.
        assert np.count_nonzero(rle_to_bitmap(rle) != bitmap) <= 1


def test_run_lengths_by_hand_and_of_no_masks():
    assert probabilities_to_rle(torch.zeros(0, 28, 28), torch.zeros(0, 4), 5, 5) == []
    bitmap = torch.zeros(5, 4, dtype=torch.bool)
    bitmap[1:3, 2] = True
    rle = bitmap_to_rle(bitmap.numpy())
    assert isinstance(rle["counts"], str) and coco_mask.area(rle) == 2
    assert np.array_equal(rle_to_bitmap(rle), bitmap.numpy())
