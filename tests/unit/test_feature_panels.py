"""PyramidViewer and RatioDial: what every control changes, in Python."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import mimdet
from mimdet.data.shapes import ShapesCOCO
from mimdet.models.detector import Detector
from mimdet.viz import PyramidViewer, RatioDial, pyramid_of
from mimdet.viz.features import fit_basis, pca_picture

SCENES = ShapesCOCO("shapes-v1-medium", length=3, split="val")
IMAGES = [SCENES[i].image for i in range(3)]
TARGETS = [SCENES[i].target for i in range(3)]


@pytest.fixture(scope="module")
def tiny() -> Detector:
    torch.set_num_threads(1)
    return mimdet.load_detector("tiny")


@pytest.fixture(scope="module")
def patchify() -> Detector:
    torch.manual_seed(0)
    return mimdet.build_detector(mimdet.presets.tiny_patch_stem()).eval()


def picture(canvas: Any) -> np.ndarray:
    return np.asarray(canvas.snapshot())


# ------------------------------------------------------------------------------- the viewer


def test_viewer_shows_the_map(tiny: Detector) -> None:
    panel = PyramidViewer(tiny, IMAGES[:1])
    features = pyramid_of(tiny, IMAGES[0]).maps["c2"]
    expected = pca_picture(features, fit_basis(features))
    shown = picture(panel.maps["model"])[-320:]  # below its caption; 64 places of 5 pixels
    assert np.array_equal(shown[2::5, 2::5], expected)


@pytest.mark.parametrize(
    ("control", "value", "image_changes", "map_changes"),
    [
        ("level", "p4", False, True),
        ("view", "norm", False, True),
        ("ratio", 0.25, True, True),
        ("image", 1, True, True),
        ("channel", 3, False, False),  # only where a channel is shown
        ("seed", 4, False, False),  # at ratio 1 nothing is drawn at random
    ],
)
def test_viewer_controls(
    tiny: Detector, control: str, value: Any, image_changes: bool, map_changes: bool
) -> None:
    panel = PyramidViewer(tiny, IMAGES)
    if control == "ratio":
        panel.level.value = "c4"
    before, seq = (picture(panel.picture), picture(panel.maps["model"])), panel.picture.seq
    getattr(panel, control).value = value
    assert np.array_equal(picture(panel.picture), before[0]) != image_changes
    assert np.array_equal(picture(panel.maps["model"]), before[1]) != map_changes
    assert panel.picture.seq == seq + 1 == panel.maps["model"].seq


def test_viewer_keeps_the_channel_inside_the_map(tiny: Detector) -> None:
    panel = PyramidViewer(tiny, IMAGES[:1])
    assert panel.channel.disabled
    panel.view.value, panel.level.value = "channel", "tokens"
    panel.channel.value = 127
    assert not panel.channel.disabled
    panel.level.value = "c2"  # 32 channels
    assert (panel.channel.max, panel.channel.value) == (31, 31)


def test_viewer_says_what_the_ratio_changes(tiny: Detector) -> None:
    panel = PyramidViewer(tiny, IMAGES[:1])
    panel.ratio.value = 0.25
    assert "the ratio does not matter" in panel.status.value
    panel.level.value = "c4"
    assert "64 of 256 tokens" in panel.status.value
    full = pyramid_of(tiny, IMAGES[0]).maps["c4"]
    now = pyramid_of(tiny, IMAGES[0], sample_ratio=0.25).maps["c4"]
    assert np.array_equal(
        picture(panel.maps["model"])[-310::20, 10::20], pca_picture(now, fit_basis(full))
    )
    moved = 100 * float((now - full).norm() / full.norm())
    assert f"moved from ratio 1 by {moved:.1f} %" in panel.status.value
    panel.ratio.value = 1.0
    assert "moved from ratio 1 by 0.0 %" in panel.status.value


def test_viewer_of_two_models(tiny: Detector, patchify: Detector) -> None:
    panel = PyramidViewer({"ConvStem": tiny, "patchify": patchify}, IMAGES[:1])
    assert panel.snapshot().width == 3 * 320 + 2 * 8
    shared = picture(panel.maps["patchify"])
    panel.scale.value = False
    assert not np.array_equal(picture(panel.maps["patchify"]), shared)
    panel.model.value = "patchify"
    assert panel.snapshot().width == 2 * 320 + 8
    assert panel.maps["ConvStem"].layout.display == "none"
    assert "patchify" in panel.label and "ConvStem" not in panel.label


def test_viewer_of_a_model_without_tokens() -> None:
    """Levels that only one model has are an error below the panel, not a dead panel."""
    resnet = mimdet.build_detector(mimdet.presets.tiny_resnet()).eval()
    panel = PyramidViewer(resnet, IMAGES[:1])
    assert "sees every token" in panel.status.value
    panel.ratio.value = 0.5
    assert "sees every token" in panel.status.value
    assert "tokens" not in panel.level.options
    with pytest.raises(ValueError, match="no model"):
        PyramidViewer({}, IMAGES)


# ------------------------------------------------------------------------------- the dial


def test_dial_shows_what_predict_finds(tiny: Detector) -> None:
    panel = RatioDial(tiny, IMAGES)
    panel.ratio.value, panel.seed.value = 0.25, 2
    found = mimdet.predict(tiny, IMAGES[0], sample_ratio=0.25, seed=2)
    assert torch.equal(panel.found.boxes, found.boxes)
    likely = int((found.scores >= 0.3).sum())
    assert f"64 of 256 tokens · {likely} detections" in panel.status.value


@pytest.mark.parametrize(
    ("control", "value", "runs"),
    [("ratio", 0.25, 2), ("score", 0.9, 1), ("pale", False, 1), ("image", 1, 2), ("seed", 3, 2)],
)
def test_dial_controls(tiny: Detector, control: str, value: Any, runs: int) -> None:
    """The model runs again only where its answer may be another."""
    panel = RatioDial(tiny, IMAGES)
    panel.ratio.value = 0.5
    panel.times.clear()
    panel.times[0.5] = [(10.0, 5.0)]
    before = picture(panel.picture)
    getattr(panel, control).value = value
    assert not np.array_equal(picture(panel.picture), before)
    assert sum(map(len, panel.times.values())) == runs


def test_dial_beside_the_truth(tiny: Detector) -> None:
    alone, beside = RatioDial(tiny, IMAGES), RatioDial(tiny, IMAGES, TARGETS)
    assert alone.snapshot().width == 400 and beside.snapshot().width == 808
    assert beside.truth.label == f"truth: {len(TARGETS[0])} objects"
    first = picture(beside.truth)
    beside.image.value = 1
    assert not np.array_equal(picture(beside.truth), first)
    beside.add(IMAGES[0], "photo.png")
    assert beside.truth.label == "no truth is known"


def test_dial_median_is_of_all_runs_at_a_ratio(tiny: Detector) -> None:
    panel = RatioDial(tiny, IMAGES)
    panel.times = {1.0: [(100.0, 40.0), (300.0, 50.0), (120.0, 90.0)], 0.25: [(60.0, 6.0)]}
    panel.redraw()
    assert "120 ms, median of 3 (backbone 50 ms)" in panel.status.value
    assert panel.table.value.index("0.25") < panel.table.value.index("1.00")
    assert "60 ms, backbone 6 ms" in panel.table.value


def test_dial_of_an_image_with_padding(tiny: Detector) -> None:
    """150 pixels wide: 300 as fed, 19 columns of its own and one of padding."""
    image = torch.zeros(3, 128, 150, dtype=torch.uint8)
    panel = RatioDial(tiny, [image])
    assert "304 of 304 tokens" in panel.status.value
    whole = picture(panel.picture)[22:]
    panel.ratio.value = 0.05
    assert (picture(panel.picture)[22:] != whole).any(axis=2).mean() > 0.5


def test_dial_refuses(tiny: Detector) -> None:
    with pytest.raises(ValueError, match="1 targets for 3 images"):
        RatioDial(tiny, IMAGES, TARGETS[:1])
    with pytest.raises(ValueError, match="sees every token"):
        RatioDial(mimdet.build_detector(mimdet.presets.tiny_resnet()), IMAGES)


def test_panels_leave_model_and_image_alone(tiny: Detector) -> None:
    model, image = copy.deepcopy(tiny).train(), IMAGES[0].clone()
    RatioDial(model, [image])
    PyramidViewer(model, [image])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(image, IMAGES[0])
