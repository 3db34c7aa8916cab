"""Every panel in Python: what its controls change, what a saved notebook shows, what is refused."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import mimdet
from mimdet import presets
from mimdet.config import DataConfig
from mimdet.data.shapes import ShapesCOCO
from mimdet.models.detector import Detector
from mimdet.models.mae import MAE
from mimdet.viz.features import fit_basis, pca_picture

pytest.importorskip("anywidget", reason='panels need pip install "mimdet[notebooks]"')
from mimdet.viz import (
    AttentionExplorer,
    Panel,
    PyramidViewer,
    RatioDial,
    ResultBrowser,
    SampleBrowser,
    TokenLab,
    pyramid_of,
)

SCENES = ShapesCOCO("shapes-v1-medium", length=3, split="val")
IMAGES = [SCENES[i].image for i in range(3)]
TARGETS = [SCENES[i].target for i in range(3)]


@cache
def tiny() -> Detector:
    torch.set_num_threads(1)
    return mimdet.load_detector("tiny")


@cache
def tiny_mae() -> MAE:
    return mimdet.load_mae_model("tiny_mae")


@cache
def scratch(preset: str) -> Detector:
    torch.manual_seed(0)
    return mimdet.build_detector(getattr(presets, preset)()).eval()


def results(every: int) -> list[dict[str, Any]]:
    """The truth, or every n-th object of it, as detections."""
    keys = ("image_id", "category_id", "bbox", "segmentation")
    objects = SCENES.ground_truth()["annotations"][::every]
    return [
        {key: a[key] for key in keys} | {"score": 0.3 + 0.001 * i} for i, a in enumerate(objects)
    ]


PANELS: dict[str, Callable[[], Panel]] = {
    "token": lambda: TokenLab(tiny(), tiny_mae(), IMAGES),
    "attention": lambda: AttentionExplorer(tiny(), IMAGES),
    "pyramid": lambda: PyramidViewer({"a": tiny(), "b": scratch("tiny_patch_stem")}, IMAGES),
    "ratio": lambda: RatioDial(tiny(), IMAGES, TARGETS),
    "results": lambda: ResultBrowser(SCENES, {"a": results(1), "b": results(2)}, "segm"),
    "data": lambda: SampleBrowser(SCENES, DataConfig()),
}


def pictures(panel: Panel) -> list[np.ndarray]:
    return [np.asarray(canvas.snapshot()) for canvas in panel.canvases]


# ------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    ("name", "first", "control", "value", "changed"),
    [
        ("token", {}, "ratio", 0.5, "111"),
        ("token", {}, "seed", 1, "111"),
        ("token", {}, "sampler", "grid", "111"),
        ("token", {}, "image", 1, "111"),
        ("token", {}, "reconstruction", "painted", "010"),
        ("attention", {}, "block", 0, "01"),
        ("attention", {}, "head", 1, "01"),
        ("attention", {}, "rollout", True, "01"),
        ("attention", {}, "part", "decoder", "01"),
        ("attention", {}, "ratio", 0.75, "11"),
        ("attention", {}, "seed", 3, "11"),
        ("attention", {}, "image", 1, "11"),
        ("pyramid", {}, "level", "p4", "011"),
        ("pyramid", {}, "view", "norm", "011"),
        ("pyramid", {}, "scale", False, "011"),
        ("pyramid", {"level": "c4"}, "ratio", 0.25, "111"),
        ("pyramid", {}, "image", 1, "111"),
        ("pyramid", {"view": "channel"}, "channel", 3, "011"),
        ("pyramid", {}, "channel", 0, ""),  # only where a channel is shown
        ("pyramid", {}, "seed", 4, "000"),  # at ratio 1 nothing is drawn at random
        ("ratio", {"ratio": 0.5}, "ratio", 0.25, "01"),
        ("ratio", {"ratio": 0.5}, "score", 0.9, "01"),
        ("ratio", {"ratio": 0.5}, "pale", False, "01"),
        ("ratio", {"ratio": 0.5}, "seed", 3, "01"),
        ("ratio", {}, "image", 1, "11"),
        ("results", {}, "position", 2, "111"),
        ("results", {}, "score", 1.0, "011"),
        ("results", {}, "verdict", "missed", "011"),
        ("data", {}, "seed", 7, "11"),
        ("data", {}, "index", 2, "11"),
        ("data", {}, "kind", "lsj", "11"),
        ("data", {"kind": "none"}, "seed", 5, "00"),  # the test transform draws nothing
    ],
)
def test_a_control_is_answered_once(name, first, control, value, changed) -> None:
    panel = PANELS[name]()
    for other, start in first.items():
        getattr(panel, other).value = start
    before, count = pictures(panel), len(panel.milliseconds)
    seqs = [canvas.seq for canvas in panel.canvases]
    getattr(panel, control).value = value
    assert "Error" not in panel.status.value
    assert len(panel.milliseconds) == count + bool(changed)
    assert [canvas.seq for canvas in panel.canvases] == [seq + bool(changed) for seq in seqs]
    after = pictures(panel)
    differs = ["01"[not np.array_equal(a, b)] for a, b in zip(before, after, strict=True)]
    assert "".join(differs) == (changed or "0" * len(differs))


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("token", (3 * 300 + 2 * 8, 320), "beside it what the models make of these"),
        ("attention", (2 * 352 + 8, 352), "Encoder block 3, mean of the heads"),
        ("pyramid", (3 * 320 + 2 * 8, 340), "An image and its map c2 in a, b: PCA"),
        ("ratio", (2 * 400 + 8, 420), "An image, detections at ratio 1.00"),
        ("data", (2 * 400 + 8, 459), "objects are left"),
    ],
)
def test_a_saved_notebook_shows_the_canvases_and_says_them(name, size, said) -> None:
    panel = PANELS[name]()
    _, metadata = panel._repr_mimebundle_()
    assert said in metadata["image/png"]["alt"]
    assert panel.snapshot().size == size


@pytest.mark.parametrize(
    ("name", "control", "limit"),
    [("token", "seed", 400), ("attention", "seed", 150), ("results", "position", 150)],
)
def test_it_answers_in_time(name, control, limit) -> None:
    """The goal is 180 ms; processor time, as other programs may use the machine meanwhile."""
    panel, took = PANELS[name](), []
    for value in (2, 1, 3, 2, 1):
        start = time.process_time()
        getattr(panel, control).value = value
        took.append(1000 * (time.process_time() - start))
    assert statistics.median(took) < limit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RatioDial(tiny(), IMAGES, TARGETS[:1]), "1 targets for 3 images"),
        (lambda: RatioDial(scratch("tiny_resnet"), IMAGES), "sees every token"),
        (lambda: TokenLab(scratch("tiny_resnet"), None, IMAGES), "sees every token"),
        (lambda: TokenLab(tiny(), None, []), "give at least one"),
        (lambda: AttentionExplorer(scratch("tiny_vitdet")), "ViTDet has no encoder of sampled"),
        (lambda: PyramidViewer({}, IMAGES), "no model"),
        (lambda: SampleBrowser([], DataConfig()), "the data set is empty"),
        (lambda: ResultBrowser(SCENES, {}), "results of 0 runs: give one or two"),
        (lambda: ResultBrowser(SCENES, {n: [] for n in "abc"}), "results of 3 runs: give one or"),
        (lambda: ResultBrowser(SCENES, [{"image_id": 1}]), r"results\[0\] has no"),
        (lambda: ResultBrowser(SCENES, [], iou_threshold=0), "iou_threshold=0"),
    ],
)
def test_what_cannot_be_shown_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_panels_leave_model_image_and_random_state_alone() -> None:
    model, image, state = copy.deepcopy(tiny()).train(), IMAGES[0].clone(), torch.get_rng_state()
    for panel in (RatioDial, PyramidViewer, AttentionExplorer, TokenLab):
        panel(model, images=[image])
    assert all(module.training for module in model.modules())
    assert model.backbone.encoder.blocks[1].attn.fused_attn
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(image, IMAGES[0]) and torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------- the viewer


def test_viewer_shows_the_map_and_what_the_ratio_changes() -> None:
    panel = PyramidViewer(tiny(), IMAGES[:1])

    def middles(side: int) -> np.ndarray:
        """Colour of the middle of every place of the map, below its caption."""
        whole = np.asarray(panel.maps["model"].snapshot())[-320:]
        return whole[side // 2 :: side, side // 2 :: side]

    full = pyramid_of(tiny(), IMAGES[0]).maps
    assert np.array_equal(middles(5), pca_picture(full["c2"], fit_basis(full["c2"])))
    panel.ratio.value = 0.25
    assert "the ratio does not matter" in panel.status.value
    panel.level.value = "c4"
    assert "64 of 256 tokens" in panel.status.value
    now = pyramid_of(tiny(), IMAGES[0], sample_ratio=0.25).maps["c4"]
    assert np.array_equal(middles(20), pca_picture(now, fit_basis(full["c4"])))
    moved = 100 * float((now - full["c4"]).norm() / full["c4"].norm())
    assert f"moved from ratio 1 by {moved:.1f} %" in panel.status.value
    panel.ratio.value = 1.0
    assert "moved from ratio 1 by 0.0 %" in panel.status.value


def test_viewer_keeps_the_channel_inside_the_map() -> None:
    panel = PyramidViewer(tiny(), IMAGES[:1])
    assert panel.channel.disabled
    panel.view.value, panel.level.value = "channel", "tokens"
    panel.channel.value = 127
    assert not panel.channel.disabled
    panel.level.value = "c2"  # 32 channels
    assert (panel.channel.max, panel.channel.value) == (31, 31)


def test_viewer_of_one_of_two_models() -> None:
    panel = PANELS["pyramid"]()
    panel.model.value = "b"
    assert panel.snapshot().width == 2 * 320 + 8
    assert panel.maps["a"].layout.display == "none"
    assert panel.label.startswith("An image and its map c2 in b:")


def test_viewer_of_a_model_without_tokens() -> None:
    panel = PyramidViewer(scratch("tiny_resnet"), IMAGES[:1])
    assert "sees every token" in panel.status.value
    panel.ratio.value = 0.5
    assert "sees every token" in panel.status.value
    assert "tokens" not in panel.level.options


# ------------------------------------------------------------------------------- the dial


def test_dial_shows_what_predict_finds_and_runs_only_for_another_answer() -> None:
    panel = RatioDial(tiny(), IMAGES)
    panel.ratio.value, panel.seed.value = 0.25, 2
    panel.score.value, panel.pale.value = 0.4, False
    assert [len(runs) for runs in panel.times.values()] == [1, 2]
    found = mimdet.predict(tiny(), IMAGES[0], sample_ratio=0.25, seed=2)
    assert torch.equal(panel.found.boxes, found.boxes)
    likely = int((found.scores >= 0.4).sum())
    assert f"64 of 256 tokens · {likely} detections" in panel.status.value


def test_dial_beside_the_truth() -> None:
    panel = RatioDial(tiny(), IMAGES, TARGETS)
    assert panel.truth.label == f"truth: {len(TARGETS[0])} objects"
    panel.add(IMAGES[0], "photo.png")
    assert panel.truth.label == "no truth is known"
    assert RatioDial(tiny(), IMAGES).snapshot().width == 400


def test_dial_median_is_of_all_runs_at_a_ratio() -> None:
    panel = RatioDial(tiny(), IMAGES)
    panel.times = {1.0: [(100.0, 40.0), (300.0, 50.0), (120.0, 90.0)], 0.25: [(60.0, 6.0)]}
    panel.redraw()
    assert "120 ms, median of 3 (backbone 50 ms)" in panel.status.value
    cells = panel.table.value.replace("<td>", "").replace("</td>", "").split()
    assert cells.index("0.25") < cells.index("60") < cells.index("1") < cells.index("120")


def test_dial_of_an_image_with_padding() -> None:
    """150 pixels wide: 300 as fed, 19 columns of its own and one of padding."""
    panel = RatioDial(tiny(), [torch.zeros(3, 128, 150, dtype=torch.uint8)])
    assert "304 of 304 tokens" in panel.status.value
    whole = pictures(panel)[0][22:]
    panel.ratio.value = 0.05
    assert (pictures(panel)[0][22:] != whole).any(axis=2).mean() > 0.5
