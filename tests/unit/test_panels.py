"""Every panel in Python: what its controls change, what a saved notebook shows, what is refused."""

import copy
import json
import re
import statistics
import time
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mimdet
from mimdet import presets
from mimdet.config import DataConfig
from mimdet.data.shapes import ShapesCOCO
from mimdet.images import to_rgb
from mimdet.models.detector import Detector
from mimdet.models.mae import MAE
from mimdet.structures import Record, Target
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
    before = pictures(panel)
    seqs = [canvas.seq for canvas in panel.canvases]
    getattr(panel, control).value = value
    assert "Error" not in panel.status.value
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
        (lambda: ResultBrowser(SCENES, {"a": None}), "these are no results"),
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


# ------------------------------------------------------------------------------- any picture

OPEN: dict[str, Callable[[Any], Any]] = {
    "token": lambda images: TokenLab(tiny(), tiny_mae(), images),
    "attention": lambda images: AttentionExplorer(tiny(), images),
    "pyramid": lambda images: PyramidViewer(tiny(), images),
    "ratio": lambda images: RatioDial(tiny(), images),
}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def any_pictures(folder: Path) -> list[Any]:
    """Of every kind that predict takes, and of sizes nobody thought of."""
    photo, deep = Image.fromarray(noise(60, 90)), folder / "deep.png"
    Image.fromarray(noise(40, 50, 2).view(np.uint16)[..., 0]).save(deep)
    turned = Image.Exif()
    turned[0x0112] = 6  # as a phone that was held upright writes it
    photo.save(folder / "phone.jpg", exif=turned)
    return [
        *(photo, photo.convert("CMYK"), photo.convert("P"), photo.convert("LA")),
        *(deep, str(folder / "phone.jpg"), noise(40, 50), noise(40, 50)[..., 0], noise(40, 50, 4)),
        torch.zeros(3, 5000, 1, dtype=torch.uint8),  # a scan line
        noise(1, 5000),
        noise(90, 6000),  # a panorama
        noise(3000, 4000),  # 12 megapixels
        noise(1, 1),
    ]


@pytest.mark.parametrize("name", OPEN)
def test_a_picture_of_any_kind_and_size_is_shown(name, tmp_path) -> None:
    pictures = any_pictures(tmp_path)
    panel = OPEN[name](pictures)
    for index, picture in enumerate(pictures):
        panel.image.value = index
        assert "Error" not in panel.status.value
        assert torch.equal(panel.chosen, to_rgb(picture))
        assert all(c.picture and max(c.size) <= 1200 for c in panel.canvases)
        panel.snapshot()
    assert "Error" not in OPEN[name](pictures[0]).status.value  # one, as for predict


@pytest.mark.parametrize("name", OPEN)
def test_what_is_no_picture_is_said_in_the_panel_which_goes_on(name, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    Image.fromarray(noise(90, 90)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    wrong = {
        tmp_path / "notes.txt": "ValueError.*notes.txt",
        tmp_path / "cut.jpg": "ValueError.*cut.jpg",
        str(tmp_path / "none.png"): "FileNotFoundError.*none.png",
        None: "ValueError.*NoneType",
    }
    panel = OPEN[name]([*wrong, IMAGES[0]])
    for index, message in enumerate(wrong.values()):
        panel.image.value = index
        assert re.search(message, panel.status.value)
        assert not any(canvas.picture or canvas.title for canvas in panel.canvases)
        assert "Error" in panel.label
    panel.image.value = len(wrong)
    assert "Error" not in panel.status.value + panel.label
    assert all(canvas.picture for canvas in panel.canvases)


def test_an_image_of_a_data_set_that_cannot_be_read_is_said_and_the_others_are_shown() -> None:
    class Broken(ShapesCOCO):
        def __getitem__(self, index: int) -> Any:
            if index == 0:
                raise ValueError("0.png cannot be read as an image")
            return super().__getitem__(index)

    broken = Broken("shapes-v1-medium", length=3, split="val")
    samples, browser = SampleBrowser(broken, DataConfig()), ResultBrowser(broken, results(1))
    for panel, control, value in ((samples, samples.index, 1), (browser, browser.position, 2)):
        assert "0.png cannot be read" in panel.status.value
        assert not any(canvas.picture for canvas in panel.canvases)
        control.value = value
        assert "Error" not in panel.status.value
        assert all(canvas.picture for canvas in panel.canvases)


@pytest.mark.parametrize("height, width", [(5000, 1), (1, 5000)])
def test_a_thin_image_with_objects_is_shown(height, width) -> None:
    """Objects stand where they are along the long side."""
    box = [0, 0.25 * height, width, 0.5 * height] if width == 1 else [1250, 0, 2500, 1]
    target = Target(torch.tensor([box]), torch.tensor([0]))
    record = Record(torch.zeros(3, height, width, dtype=torch.uint8), target, 1)
    panel = SampleBrowser([record], DataConfig())
    assert "Error" not in panel.status.value
    panel.kind.value = "none"
    long = np.asarray(panel.stored.snapshot())[20:].max(axis=(1 if width == 1 else 0, 2))
    marked = np.flatnonzero(long > 60) / len(long)
    assert 0.2 < marked.min() < 0.3 and 0.45 < marked.max() < 0.55


# ------------------------------------------------------------------------------- what goes wrong


def test_an_error_of_a_part_of_ones_own_is_shown_with_its_place(monkeypatch) -> None:
    def helpful(tokens: torch.Tensor, grid: Any, generator: Any) -> torch.Tensor:
        return {}["<no>"]

    lab = TokenLab(tiny(), tiny_mae(), IMAGES, samplers={"helpful": helpful})
    lab.sampler.value = "helpful"
    assert "KeyError" in lab.status.value and "&lt;no&gt;" in lab.status.value
    assert "in helpful" in lab.status.value  # the traceback
    assert not any(canvas.picture for canvas in lab.canvases)
    lab.sampler.value = "random"
    assert "KeyError" not in lab.status.value and all(c.picture for c in lab.canvases)
    # An error nobody expected ends the cell that opens the panel.
    monkeypatch.setattr(RatioDial, "_detect", lambda self: {}["no"])
    with pytest.raises(KeyError):
        RatioDial(tiny(), IMAGES)


def test_results_are_read_from_files_and_folders_of_runs(tmp_path) -> None:
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(results(1)))
    expected = ResultBrowser(SCENES, results(1)).status.value
    evaluation = types.SimpleNamespace(results=results(1))
    for given in (file, str(file), tmp_path, {"detections": file}, evaluation):
        assert ResultBrowser(SCENES, given).status.value == expected
    file.write_text("[]")
    assert "3 of 3 images match" in ResultBrowser(SCENES, file).status.value


@pytest.mark.parametrize("text", ["words", "{}", '[{"image_id": 1}]', "[1]", '"words"', "[[]]", ""])
def test_a_file_that_holds_no_results_is_refused(text, tmp_path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        ResultBrowser(SCENES, tmp_path / "results.json")


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
    panel = PyramidViewer(scratch("tiny_resnet"), IMAGES[:1])
    assert "sees every token" in panel.status.value
    panel.ratio.value = 0.5
    assert "sees every token" in panel.status.value
    assert "tokens" not in panel.level.options


def test_viewer_keeps_the_channel_inside_the_map_and_shows_one_of_two_models() -> None:
    panel = PyramidViewer(tiny(), IMAGES[:1])
    assert panel.channel.disabled
    panel.view.value, panel.level.value = "channel", "tokens"
    panel.channel.value = 127
    assert not panel.channel.disabled
    panel.level.value = "c2"  # 32 channels
    assert (panel.channel.max, panel.channel.value) == (31, 31)
    panel = PANELS["pyramid"]()
    panel.model.value = "b"
    assert panel.snapshot().width == 2 * 320 + 8
    assert panel.maps["a"].layout.display == "none"
    assert panel.label.startswith("An image and its map c2 in b:")


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
    # An image 150 pixels wide: 300 as fed, 19 columns of its own and one of padding.
    panel = RatioDial(tiny(), [torch.zeros(3, 128, 150, dtype=torch.uint8)])
    assert "304 of 304 tokens" in panel.status.value
    whole = pictures(panel)[0][22:]
    panel.ratio.value = 0.05
    assert (pictures(panel)[0][22:] != whole).any(axis=2).mean() > 0.5


def test_dial_beside_the_truth_and_its_median_of_all_runs_at_a_ratio() -> None:
    panel = RatioDial(tiny(), IMAGES)
    panel.times = {1.0: [(100.0, 40.0), (300.0, 50.0), (120.0, 90.0)], 0.25: [(60.0, 6.0)]}
    panel.redraw()
    assert "120 ms, median of 3 (backbone 50 ms)" in panel.status.value
    assert re.search(r">0\.25<.*>60<.*>6<.*>1<.*>120<.*>50<.*>3<", panel.table.value, re.DOTALL)
    panel = RatioDial(tiny(), IMAGES, TARGETS)
    assert panel.truth.label == f"truth: {len(TARGETS[0])} objects"
    panel.add(IMAGES[0], "photo.png")
    assert panel.truth.label == "no truth is known"
    assert RatioDial(tiny(), IMAGES).snapshot().width == 400
