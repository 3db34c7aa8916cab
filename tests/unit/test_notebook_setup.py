"""The first cell of a notebook, its checks, and the figure that is redrawn while training runs."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mimdet
from mimdet import check, notebook, notebook_setup
from mimdet.notebook import watch
from mimdet.training.trainer import Step
from mimdet.viz import new_figure
from mimdet.viz.style import NotebookFigure


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
    """A notebook is pretended; the alt texts of every drawing are noted, a list for each output."""
    outputs: list[list[str]] = []

    class Handle(list):
        update = lambda self, figure: self.append(figure.alt_text)  # noqa: E731

    def display(figure: NotebookFigure, display_id: bool) -> Handle:
        outputs.append(Handle([figure.alt_text]))
        return outputs[-1]

    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    monkeypatch.setattr(pytest.importorskip("IPython.display"), "display", display)
    return outputs


def test_watch_outside_a_notebook_only_passes_steps_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert not notebook.in_notebook()
    assert [step.number for step in watch(steps(5), lambda: 1 / 0, every=0)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out == ""


def test_watch_redraws_the_same_outputs_and_never_twice_the_same(
    shown: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 1000, 10))  # every look at the clock is 10 s after the last
    monkeypatch.setattr(notebook, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    extra = new_figure(1, 1)
    extra.alt_text = "detections"
    list(watch(steps(4), lambda: extra, every=5))
    losses, detections = shown
    # A drawing takes 10 s here, so the next one waits for 90 s: one, and the last state.
    assert [text.split(" at step ")[2].split(";")[0].rstrip(".") for text in losses] == ["1", "4"]
    assert "0.25 at step 4" in losses[1] and "box AP is 25.0 at step 4" in losses[1]
    assert detections == ["detections"] * 2


def test_watch_draws_after_an_interruption(shown: list[list[str]]) -> None:
    def interrupted() -> Iterator[Step]:
        yield from steps(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(watch(interrupted(), every=1e9))
    ((alt_text,),) = shown
    assert "at step 3" in alt_text


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
