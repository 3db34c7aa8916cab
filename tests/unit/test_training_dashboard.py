"""The training panel: its buttons, what it shows, its thread; a second panel takes over."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimdet.files import write_json
from mimdet.presets import tiny_mae
from mimdet.training.checkpoints import OPTIMIZER
from mimdet.training.job import Job, JobState
from mimdet.training.owner import STATUS
from mimdet.training.run import WEIGHTS, Run
from mimdet.training.train import resume
from mimdet.viz import TrainingDashboard
from mimdet.viz.widgets import training_dashboard
from tests.small import gated, small, wait_until, weights_of

STEPS = 6


def short():
    cfg = small(STEPS)
    cfg.data.workers = 0
    cfg.data.shapes_level = "shapes-v1-easy"
    cfg.training.evaluate_every_steps = 0
    cfg.training.evaluate_every = 0  # at the end only
    return cfg


def usable(board: TrainingDashboard) -> list[str]:
    return [name for name, button in board.buttons.items() if not button.disabled]


def watchers(path: Path) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == f"watch {path}"]


def test_a_folder_is_needed_and_what_a_button_cannot_do_is_said_in_the_panel(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"give the folder to train in"):
        TrainingDashboard(short())
    with pytest.raises(FileNotFoundError, match="holds no run"):
        TrainingDashboard(tmp_path)
    board = TrainingDashboard(short(), tmp_path / "run", processes=5)
    board.buttons["start"].click()
    board.look()
    assert "processes=5 cannot share" in board.log.value and board.state.name == "new"


def test_a_new_run_can_only_be_started_and_says_so(tmp_path) -> None:
    board = TrainingDashboard(short(), tmp_path / "run")
    assert usable(board) == ["start"] and board.state.name == "new"
    assert "data-state='new'" in board.status.value and "role='status'" in board.status.value
    assert not watchers(tmp_path / "run")
    assert np.asarray(board.snapshot().convert("L")).min() < 128  # there is text on it
    board.stop()  # nothing runs: nothing happens
    board.close()


def test_a_failure_is_shown_with_the_end_of_the_log(tmp_path) -> None:
    Run(tmp_path / "run", short())
    (tmp_path / "run" / "log.txt").write_text("Traceback\nerror: the <disk> is full\n")
    write_json(tmp_path / "run" / STATUS, {"state": "starting"})
    board = TrainingDashboard(tmp_path / "run")
    assert board.state.name == "failed" and usable(board) == ["resume"]
    assert "role='alert'" in board.log.value and "the &lt;disk&gt; is full" in board.log.value
    assert "the &lt;disk&gt; is full" in board.status.value
    assert board.progress.bar_style == "danger"


def test_a_run_whose_folder_is_gone_is_said_and_watched_on(tmp_path, monkeypatch) -> None:
    """Such as a network's folder that is away for a while."""
    monkeypatch.setattr(training_dashboard, "LOOK_EVERY", 0.01)
    run = tmp_path / "run"
    board = TrainingDashboard(short(), run)
    run.rename(tmp_path / "away")
    board._watch()
    wait_until(lambda: f"{run} is gone" in board.status.value, "it is said")
    assert usable(board) == [] and watchers(run)
    board.buttons["start"].click()
    assert "FileNotFoundError" in board.log.value
    (tmp_path / "away").rename(run)
    wait_until(lambda: not watchers(run), "it is seen again, and nothing runs")
    assert usable(board) == ["start"] and "new" in board.status.value


def checkpoint_without_weights(run: Path) -> None:
    folder = run / "checkpoints" / "000003"
    folder.mkdir(parents=True)
    for name in (WEIGHTS, OPTIMIZER):
        (folder / name).touch()


def test_a_picture_that_cannot_be_made_is_said_and_ends_no_watching(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training_dashboard, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(training_dashboard, "DRAW_EVERY", 0.0)
    monkeypatch.setattr(training_dashboard, "SHARE", 1e9)
    board = TrainingDashboard(short(), tmp_path / "run")
    states = iter([JobState("training"), JobState("training"), JobState("finished")])
    monkeypatch.setattr(board, "look", lambda: next(states))
    checkpoint_without_weights(tmp_path / "run")
    board._follow()
    assert next(states, None) is None
    assert "cannot be drawn" in board.detections.title and board.curves.title == ""


def test_an_autoencoder_s_run_has_curves_only(tmp_path) -> None:
    Run(tmp_path / "run", tiny_mae())
    checkpoint_without_weights(tmp_path / "run")
    board = TrainingDashboard(tmp_path / "run")
    assert board.curves.picture and not board.detections.picture and not board.detections.title


def test_start_stop_take_over_resume_end(tmp_path, monkeypatch, gate) -> None:
    monkeypatch.setattr(training_dashboard, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(training_dashboard, "SHARE", 1.0)
    run = tmp_path / "run"
    board = TrainingDashboard(short(), run, sampler=gated)
    empty = board.curves.picture
    board.buttons["start"].click()
    wait_until(lambda: board.progress.value == 3, "three steps are shown")
    assert usable(board) == ["stop"] and len(watchers(run)) == 1
    assert board.progress.max == STEPS and "left" in board.status.value

    # The notebook was closed, and opened again.
    second = TrainingDashboard(run, trust_code=True)
    assert second.state.running and usable(second) == ["stop"]
    assert len(watchers(run)) == 1 and second._thread in watchers(run)
    second.buttons["stop"].click()
    assert usable(second) == []  # asked already
    wait_until(lambda: not watchers(run), "the thread ends with the training")
    assert second.state.name == "stopped" and second.state.step == 3
    assert usable(second) == ["resume"]
    assert second.curves.picture != empty and "loss" in second.curves.label
    assert "of step 3" in second.detections.label
    shown = second.snapshot()
    assert isinstance(shown, Image.Image) and shown.height > 400

    gate.unlink()
    second.buttons["resume"].click()
    done = second.wait(300)
    assert done.name == "finished" and usable(second) == []
    assert second.progress.value == STEPS and second.progress.bar_style == "success"
    wait_until(lambda: not watchers(run), "the thread ends")
    assert f"of step {STEPS}" in second.detections.label and "AP" in second.status.value
    Job.prepare(short(), tmp_path / "undisturbed", sampler=gated)
    assert len(list(resume(tmp_path / "undisturbed", trust_code=True))) == STEPS
    expected, found = weights_of(tmp_path / "undisturbed"), weights_of(run)
    assert [k for k in expected if not torch.equal(expected[k], found[k])] == []
    last = TrainingDashboard(run)  # without trust in the code: no detections, everything else
    assert last.state.name == "finished" and "trust_code=True" in last.detections.title
