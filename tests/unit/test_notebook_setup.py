"""The first cell of a notebook, its checks, and the figure that is redrawn while training runs."""

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import mimdet
from mimdet import check, notebook, notebook_setup
from mimdet.notebook import watch
from mimdet.training.trainer import Step
from mimdet.viz import new_figure


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The setup cell changes the process; the next test must not notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------- the first cell


def test_quick_mode_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = notebook_setup("quick", seed=3, minutes={"quick": 1.5, "full": 9})
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["mode", "device", "versions", "time", "data"]
    assert lines["mode"] == "quick: preset tiny, seed 3"
    assert lines["time"] == "about 1.5 min"
    assert lines["data"] == "shapes-v1-easy, 128 px, drawn on the fly: no files"
    assert f"torch {torch.__version__}" in lines["versions"]
    assert cfg.training.seed == 3


def test_quick_config_builds_and_fits_its_data() -> None:
    cfg = notebook_setup("quick")
    data = mimdet.build_dataset(cfg.data, "train")
    model = mimdet.build_detector(cfg)
    losses = model.train()([data[0].image], [data[0].target])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert cfg.detector.num_classes == len(data.categories)
    assert cfg.data.test_short_side == data.image_size(0)[0]  # seen as drawn, not enlarged


def test_setup_repeats_every_random_number() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    notebook_setup("quick", seed=1)
    first = draw()
    other = draw()
    notebook_setup("quick", seed=1)
    assert draw() == first
    assert first != other
    notebook_setup("quick", seed=2)
    assert draw() != first


def test_steps_override_the_modes_own() -> None:
    assert notebook_setup("quick", steps=7).training.steps == 7
    assert notebook_setup("quick").training.steps == notebook.quick_config().training.steps > 7


def test_unknown_mode_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"MODE='fast': use one of \['quick', 'full'\]"):
        notebook_setup("fast")


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for place in notebook.COCO_LAYOUT.values():
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        if path.suffix:
            path.write_text("{}")
        else:
            path.mkdir()
    monkeypatch.setenv("MIMDET_COCO", str(tmp_path))
    return tmp_path


def test_full_mode_takes_coco_from_the_variable(
    coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = notebook_setup("full", minutes={"quick": 1})
    assert cfg.preset == "mimdet_base"
    assert cfg.data.source == "coco"
    assert cfg.data.train_json == str(coco / "annotations" / "instances_train2017.json")
    assert cfg.data.val_images == str(coco / "val2017")
    told = capsys.readouterr().out
    assert cfg.data.train_json in told
    assert "not measured" in told  # a time that nobody measured is not made up


def test_full_mode_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIMDET_COCO", raising=False)
    with pytest.raises(ValueError, match=r"set the environment variable MIMDET_COCO.*val2017"):
        notebook_setup("full")


def test_full_mode_names_what_is_missing(coco: Path) -> None:
    (coco / "val2017").rmdir()
    with pytest.raises(FileNotFoundError, match=r"val2017 is missing: MIMDET_COCO="):
        notebook_setup("full")


@pytest.mark.parametrize(
    ("wanted", "cores", "load", "threads"),
    [
        ("3", 16, 0.0, 3),  # said by the user
        ("", 2, 0.0, 1),
        ("", 16, 0.0, 4),
        ("", 6, 0.0, 3),
        ("", 16, 9.0, 1),  # others are at work
        ("many", 2, 0.0, 1),
        ("0", 16, 0.0, 4),
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch, wanted: str, cores: int, load: float, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    monkeypatch.setattr(notebook, "usable_cores", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load), raising=False)
    assert notebook.sensible_threads() == threads


# ------------------------------------------------------------------------------- sanity checks


def test_check_prints_a_tick(capsys: pytest.CaptureFixture[str]) -> None:
    check("rows sum to 1", torch.ones(()) == 1, "they are probabilities")
    check("kept", np.True_)
    assert capsys.readouterr().out == "✓ rows sum to 1: they are probabilities\n✓ kept\n"


@pytest.mark.parametrize("condition", [False, torch.tensor(False), np.False_, 0, [], None])
def test_check_fails_with_the_text(condition: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match=r"✗ rows sum to 1 \(they are probabilities\)"):
        check("rows sum to 1", condition, "they are probabilities")
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------- the live figure


def steps(count: int) -> Iterator[Step]:
    """Steps with a falling loss; the last one ends with an evaluation."""
    for number in range(1, count + 1):
        loss = 1 / number
        step = Step(number, count, {"loss_mask": loss}, loss, 0.0, 0.0, 1, 0.1, 0.0)
        if number == count:
            step.evaluation = {"box": {"AP": 0.25}}
        yield step


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A notebook is pretended; the alt texts of every drawing are noted."""
    drawings: list[list[str]] = []
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    monkeypatch.setattr(
        notebook.LivePicture,
        "show",
        lambda self, figures: drawings.append([figure.alt_text for figure in figures]),
    )
    return drawings


def test_watch_outside_a_notebook_only_passes_steps_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert not notebook.in_notebook()
    assert [step.number for step in watch(steps(5), lambda: 1 / 0, every=0)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out == ""


def test_watch_draws_the_last_state(shown: list[list[str]]) -> None:
    assert len(list(watch(steps(5), every=1e9))) == 5
    assert len(shown) == 1
    assert "0.20 at step 5" in shown[0][0]
    assert "box AP is 25.0 at step 5" in shown[0][0]


def test_watch_redraws_and_never_twice_the_same(
    shown: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 1000, 10))  # every look at the clock is 10 s after the last
    monkeypatch.setattr(notebook, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    extra = new_figure(1, 1)
    extra.alt_text = "detections"
    list(watch(steps(4), lambda: extra, every=5))
    # A drawing takes 10 s here, so the next one waits for 90 s: one, and the last state.
    assert [d[0].split(" at step ")[2].split(";")[0].rstrip(".") for d in shown] == ["1", "4"]
    assert all(drawing[1] == "detections" for drawing in shown)


def test_watch_draws_after_an_interruption(shown: list[list[str]]) -> None:
    def interrupted() -> Iterator[Step]:
        yield from steps(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(watch(interrupted(), every=1e9))
    assert len(shown) == 1
    assert "at step 3" in shown[0][0]


def test_watch_closes_the_training_when_the_loop_is_left() -> None:
    saved = []

    def training() -> Iterator[Step]:
        try:
            yield from steps(9)
        finally:
            saved.append(True)

    kept = training()  # a second reference: without closing, it would stay suspended
    for step in watch(kept):
        if step.number == 2:
            break
    assert saved == [True]


def test_watch_without_a_step_draws_nothing(shown: list[list[str]]) -> None:
    assert list(watch(steps(0), every=0)) == []
    assert shown == []


def test_stacked_puts_figures_below_each_other() -> None:
    wide, narrow = new_figure(2.0, 1.0), new_figure(1.0, 0.5)  # 100 pixels an inch
    wide.set_facecolor("red")
    narrow.set_facecolor("blue")
    wide.alt_text, narrow.alt_text = "Above.", "Below."
    data, metadata = notebook.stacked([wide, narrow])
    picture = Image.open(io.BytesIO(data["image/png"]))
    assert picture.size == (200, 150)
    assert picture.getpixel((199, 99)) == (255, 0, 0)
    assert picture.getpixel((99, 100)) == (0, 0, 255)
    assert picture.getpixel((100, 100)) == (255, 255, 255)
    assert data["text/plain"] == metadata["image/png"]["alt"] == "Above. Below."


def test_stacked_stores_photographs_as_jpeg() -> None:
    photograph, curve = new_figure(1, 1), new_figure(1, 1)
    photograph.has_photographs = True
    data, metadata = notebook.stacked([curve, photograph])
    assert sorted(data) == ["image/jpeg", "text/plain"]
    assert list(metadata) == ["image/jpeg"]
    assert Image.open(io.BytesIO(data["image/jpeg"])).format == "JPEG"


def test_live_picture_updates_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    ipython = pytest.importorskip("IPython.display")
    calls = []

    class Handle:
        def update(self, data: dict, **options: object) -> None:  # type: ignore[type-arg]
            calls.append(("update", sorted(data), options["raw"]))

    def display(data: dict, **options: object) -> Handle:  # type: ignore[type-arg]
        calls.append(("display", sorted(data), options["raw"]))
        assert options["display_id"]
        return Handle()

    monkeypatch.setattr(ipython, "display", display)
    live = notebook.LivePicture()
    for _ in range(3):
        live.show([new_figure(1, 1)])
    kinds = ["image/png", "text/plain"]
    assert calls == [("display", kinds, True), ("update", kinds, True), ("update", kinds, True)]
