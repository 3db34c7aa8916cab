"""predict: any input, one or many, the same result alone and in company."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

import mimdet
from mimdet.inference import run_detector
from tests.small import small


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    cfg = small()
    cfg.detector.score_threshold = 0.0  # an untrained model is sure of nothing
    return mimdet.build_detector(cfg).eval()


@pytest.fixture(scope="module")
def picture():
    return mimdet.ShapesCOCO(size=96, length=1, split="val")[0].image


def same(a, b, tolerance=1e-5):
    assert a.image_size == b.image_size
    assert a.labels.tolist() == b.labels.tolist()
    torch.testing.assert_close(a.boxes, b.boxes, atol=tolerance * 100, rtol=tolerance)
    torch.testing.assert_close(a.scores, b.scores, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        a.mask_probabilities, b.mask_probabilities, atol=tolerance, rtol=tolerance
    )


def test_every_kind_of_input_gives_the_same(model, picture, tmp_path):
    array = picture.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(array).save(tmp_path / "x.png")
    expected = mimdet.predict(model, picture)
    assert len(expected) > 0
    for image in (array, Image.fromarray(array), tmp_path / "x.png", str(tmp_path / "x.png")):
        same(mimdet.predict(model, image), expected)


def test_grey_and_transparent_pictures(model, picture):
    grey = picture.float().mean(0).to(torch.uint8).numpy()
    same(
        mimdet.predict(model, grey),
        mimdet.predict(model, Image.fromarray(grey)),
    )
    rgba = Image.fromarray(picture.permute(1, 2, 0).numpy()).convert("RGBA")
    same(mimdet.predict(model, rgba), mimdet.predict(model, picture))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_alone_and_in_company(model, picture, ratio):
    """Sizes that share a batch, sizes that do not, and an order that mixes them."""
    others = [picture[:, :50, :90], picture[:, :96, :70], picture[:, :52, :88], picture]
    together = mimdet.predict(model, others, sample_ratio=ratio, seed=7)
    for image, found in zip(others, together, strict=True):
        same(mimdet.predict(model, image, sample_ratio=ratio, seed=7), found)


def test_seed_decides_the_tokens_below_ratio_one_only(model, picture):
    a, b = (mimdet.predict(model, picture, sample_ratio=0.25, seed=s).scores for s in (0, 1))
    assert not torch.equal(a, b)
    a, b = (mimdet.predict(model, picture, sample_ratio=1.0, seed=s).scores for s in (0, 1))
    assert torch.equal(a, b)


def test_ready_sample_is_used(model, picture):
    resized = mimdet.predict(model, picture).image_size
    assert resized == (96, 96)
    grid = (2, 4)  # 64 pixels short side, padded to 64 x 64
    grid = (4, 4)
    everything = mimdet.Sample([torch.arange(16)], grid)
    same(mimdet.predict(model, picture, sample=everything), mimdet.predict(model, picture))
    few = mimdet.Sample([torch.tensor([0, 5])], grid)
    assert not torch.equal(
        mimdet.predict(model, picture, sample=few).scores, mimdet.predict(model, picture).scores
    )


def test_boxes_are_in_the_pictures_own_pixels(model, picture):
    large = picture.repeat_interleave(3, 1).repeat_interleave(3, 2)
    found = mimdet.predict(model, large)
    assert found.image_size == (288, 288)
    assert (found.boxes >= 0).all() and (found.boxes <= 288).all()
    assert found.boxes.max() > 96


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (torch.zeros(3, 4, 4), "uint8"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\(3, H, W\)"),
        (np.zeros((3, 40, 50), np.uint8), r"becomes array.transpose\(1, 2, 0\)"),
        (np.zeros((40, 50, 2), np.uint8), "uint8 of shape"),
        (3.0, "cannot read an image from float"),
    ],
)
def test_wrong_input_says_what_is_right(model, image, message):
    with pytest.raises(ValueError, match=message):
        mimdet.predict(model, image)


def test_missing_file_is_named(model):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        mimdet.predict(model, "nowhere.jpg")


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
