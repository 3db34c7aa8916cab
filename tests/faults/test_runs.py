"""What becomes of a run: killed, damaged, moved, changed, shared; it goes on, or says why not."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import mimdet
from mimdet import presets
from mimdet.config import load_config
from mimdet.files import append_text, read_json
from mimdet.training.checkpoints import Checkpoint, best_step
from mimdet.training.job import Job
from mimdet.training.owner import STATUS, RunInUse, alone_in, in_use, read_status
from mimdet.training.run import CheckpointStore, MetricsFile, Run, TrainingStopped, load_detector
from mimdet.training.slots import load_slots, read_slots
from mimdet.training.train import DetectorTrainer, resume, train
from tests.small import assert_same_end, rows_of, small, wait_until, write_coco


def own_sampler(tokens, grid, generator):
    return tokens.norm(dim=1)


def quick(steps: int = 4):
    cfg = small(steps)
    cfg.data.workers = 0
    cfg.training.batch_size, cfg.training.accumulate = 1, 2
    cfg.training.evaluate_every_steps = steps
    return cfg


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with a checkpoint after each of its four steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    cfg = quick()
    cfg.training.checkpoint_every_steps = 1
    list(train(cfg, run))
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


# ------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("pointer", [None, "", "000099\n", "\0\0\0", "000001\n"])
def test_the_newest_checkpoint_is_found_whatever_the_pointers_say(run, pointer) -> None:
    for name in ("last", "best"):
        (run / "checkpoints" / name).unlink()
        if pointer is not None:
            (run / "checkpoints" / name).write_text(pointer)
    store = CheckpointStore(run / "checkpoints")
    assert store.find("last").name == "000004"
    assert store.find("best").name == ("000001" if pointer == "000001\n" else "000004")
    assert load_detector(run) and load_detector(run, checkpoint="best")


def test_the_best_checkpoint_stays_although_nothing_points_to_it(tmp_path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    rows = [{"step": s, "evaluation": {"box": {"AP": ap}}} for s, ap in ((1, None), (2, 0.5))]
    lines = [json.dumps(row) + "\n" for row in [*rows, {"step": 3, "loss": 1.0}]]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    for step in (1, 2, 3, 4):
        store.save(Checkpoint(step, {"w": torch.zeros(2)}, {}), keep=1)
    assert store.steps() == [2, 4] and store.find("best").name == "000002"
    # The best step is the first of the highest AP.
    found = [(1, 0.1), (2, 0.3), (3, None), (4, 0.3), (5, 0.2)]
    rows = [{"step": step, "evaluation": {"box": {"AP": ap}}} for step, ap in found]
    assert best_step([{"step": 9, "loss": 1.0}, *rows, {"step": 6, "evaluation": {}}]) == 2
    assert best_step([]) is None


@pytest.mark.parametrize(
    "lead",
    [
        lambda last, other: last.write_text(f"{other / '000004'}\n"),
        lambda last, other: last.write_text("../../other/checkpoints/000004\n"),
        lambda last, other: last.symlink_to(other / "000004"),
        lambda last, other: last.symlink_to(other / "last"),
        lambda last, other: (last.parent / "000004").symlink_to(other / "000004"),
    ],
    ids=["absolute", "dots", "link to a folder", "link to a pointer", "link in its place"],
)
def test_no_checkpoint_lies_outside_of_the_run(run, lead) -> None:
    """The pointer `last`, or the checkpoint itself, leads to a run beside it."""
    other = shutil.copytree(run, run.parent / "other") / "checkpoints"
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    lead(run / "checkpoints/last", other)
    with pytest.raises(ValueError, match=r"leads out of the run, to .*other"):
        load_detector(run)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("left", [0, 7, 5000])
def test_of_a_damaged_checkpoint_the_one_before_is_used(run, whole, capsys, file, left) -> None:
    path = run / "checkpoints/000004" / file
    path.write_bytes(path.read_bytes()[:left])
    assert load_detector(run)
    said = capsys.readouterr().out
    assert ("step 3 is used instead" in said) == (file == "model.safetensors")
    assert [step.number for step in resume(run)] == [4]
    said = capsys.readouterr().out
    why = "(is cut off or damaged|holds something else)"
    assert re.search(rf"000004.{re.escape(file)} {why}.*: step 3 is used", said)
    assert_same_end(run, whole)


def test_where_no_checkpoint_is_whole_it_is_said_what_to_do(run) -> None:
    for path in (run / "checkpoints").glob("0*/model.safetensors"):
        path.write_bytes(b"")
    for use in (load_detector, lambda folder: next(resume(folder))):
        with pytest.raises(ValueError, match=r"000004.model.safetensors.*copy one back") as error:
            use(run)
        assert "download" not in str(error.value)
    with pytest.raises(ValueError, match=r"000003.model.safetensors is cut off or damaged") as one:
        load_detector(run, checkpoint=3)
    assert "remove" not in str(one.value)


# ------------------------------------------------------------------------------- leftovers


def test_a_run_that_was_killed_before_it_had_a_configuration_begins(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json.partial-4999999-1", "environment.json.partial-4999999", "lock"):
        (run / name).write_text('{"back')
    assert next(train(quick(), run)).number == 1
    assert not list(run.rglob("*partial*"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    with pytest.raises(ValueError, match="not empty and holds no run"):
        next(train(quick(), tmp_path / "photos"))


def test_leftovers_of_dead_processes_go_others_stay(run, tmp_path, monkeypatch) -> None:
    living = f"eval.json.partial-{os.getppid()}-1"
    dead = ["eval.json.partial-4999999-1", f"metrics.jsonl.partial-{os.getpid()}-1"]
    for name in (living, *dead):
        (run / name).touch()
    (run / "checkpoints/000002.partial-4999999-3-old").mkdir()
    list(resume(run))
    assert [path.name for path in run.rglob("*.partial-*")] == [living]
    # A half-made table of annotations goes, too.
    monkeypatch.setenv("MIMDET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/coco-1-a.arrow.partial-4999999-1").touch()
    mimdet.CocoDataset(write_coco(tmp_path, [[[8, 8, 24, 24]]]), tmp_path / "images")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".arrow"]


# ------------------------------------------------------------------------------- other inputs


def with_data(folder: Path):
    """A configuration of data in `folder`, by relative paths."""
    (folder / "data").mkdir(parents=True)
    write_coco(folder / "data", [[[8, 8, 24, 24]], [[20, 10, 30, 30]]] * 2)
    cfg = quick()
    cfg.data.source = "coco"
    for split in ("train", "val"):
        setattr(cfg.data, f"{split}_json", "data/annotations.json")
        setattr(cfg.data, f"{split}_images", "data/images")
    return cfg


def begin(cfg, run: Path | str, **parts) -> None:
    """A training that is left after a step."""
    training = train(cfg, run, **parts)
    next(training)
    training.close()


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_annotations_are_refused(tmp_path, monkeypatch, split) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = with_data(tmp_path)
    shutil.copy("data/annotations.json", "data/copy.json")
    setattr(cfg.data, f"{split}_json", "data/copy.json")
    begin(cfg, "run")
    text = Path("data/copy.json").read_text()
    Path("data/copy.json").write_text(text.replace('"area": 576', '"area": 577', 1))
    for again in (train(cfg, "run"), resume("run")):
        said = r"copy.json sha256:\w+ -> copy.json sha256:\w+\nPut the old ones back"
        with pytest.raises(ValueError, match=said):
            next(again)
    Path("data/copy.json").write_text(text)
    assert next(resume("run")).number == 2


def test_other_class_names_are_refused_although_the_data_call_themselves_the_same(tmp_path) -> None:
    scenes = mimdet.ShapesCOCO(size=64, length=4)
    begin(quick(), tmp_path / "run", train_data=scenes, val_data=scenes)
    scenes.categories = scenes.categories[::-1]
    with pytest.raises(ValueError, match=r"the classes: \['.*'\] -> \['.*'\]"):
        next(train(quick(), tmp_path / "run", train_data=scenes, val_data=scenes))


def test_other_initial_weights_are_refused_and_missing_ones_are_not_needed(tmp_path, whole) -> None:
    cfg, weights = quick(), tmp_path / "start.safetensors"
    shutil.copy(whole / "checkpoints/000004/model.safetensors", weights)
    cfg.training.init_from = str(weights)
    begin(cfg, tmp_path / "run")
    shutil.copy(whole / "checkpoints/000003/model.safetensors", weights)
    with pytest.raises(ValueError, match=r"initial weights: .*sha256:\w+ -> .*sha256:\w+"):
        next(train(cfg, tmp_path / "run"))
    weights.unlink()
    begin(cfg, tmp_path / "run")
    moved = tmp_path / "moved.safetensors"
    shutil.copy(whole / "checkpoints/000004/model.safetensors", moved)
    cfg.training.init_from = str(moved)
    assert next(train(cfg, tmp_path / "run")).number == 3


def test_another_class_count_changes_a_run_only_before_its_first_step(tmp_path) -> None:
    cfg = quick()
    Run(tmp_path / "run", cfg)
    easy = mimdet.ShapesCOCO("shapes-v1-easy", size=64, length=4)
    begin(quick(), tmp_path / "run", train_data=easy, val_data=easy)
    assert load_config(tmp_path / "run/config.json").detector.num_classes == 6
    with pytest.raises(ValueError, match="the classes"):
        next(train(quick(), tmp_path / "run"))
    assert load_config(tmp_path / "run/config.json").detector.num_classes == 6


# ------------------------------------------------------------------------------- elsewhere


def test_relative_paths_are_found_from_elsewhere_and_after_a_move(tmp_path, monkeypatch) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    cfg = with_data(home)
    monkeypatch.chdir(home)
    begin(cfg, "run")
    stored = (home / "run/config.json").read_text()
    (away / "data").mkdir(parents=True)
    (away / "data/annotations.json").write_text("another file of that name")
    monkeypatch.chdir(away)
    assert next(resume(home / "run")).number == 2
    assert (home / "run/config.json").read_text() == stored
    found = load_detector(home / "run").config.data
    assert found.val_json == str(home / "data/annotations.json")
    shutil.copytree(home / "run", away / "deep/copy")
    assert next(resume("deep/copy")).number == 3  # its data stayed where they were
    shutil.move(home, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert next(train(cfg, "run")).number == 3  # all moved together
    monkeypatch.chdir(away)
    with pytest.raises(FileNotFoundError, match=r"home.data.annotations.json.*config.json"):
        next(resume("deep/copy"))
    for split in ("train", "val"):
        setattr(cfg.data, f"{split}_json", str(tmp_path / "moved/data/annotations.json"))
        setattr(cfg.data, f"{split}_images", str(tmp_path / "moved/data/images"))
    assert next(train(cfg, "deep/copy")).number == 4  # said where they are now
    assert load_config(away / "deep/copy/config.json").data.val_json == cfg.data.val_json


# ------------------------------------------------------------------------------- what may change


def exact(steps: int = 4):
    """Rounding aside, its numbers depend on nothing but what is trained."""
    cfg = quick(steps)
    cfg.training.precision, cfg.detector.norm = "fp64", "GN"
    return cfg


def images_of(monkeypatch) -> dict[int, list]:
    """Step -> the images that trainings from now on see in it, sorted."""
    seen: dict[int, list] = {}

    def losses(self, batch):
        seen[self.done + 1] = sorted([*seen.get(self.done + 1, []), *batch.image_ids])
        return self.model(batch.images, batch.targets)

    monkeypatch.setattr(DetectorTrainer, "losses", losses)
    return seen


def test_what_decides_no_result_may_change_on_the_way(tmp_path) -> None:
    cfg = exact()
    whole = list(train(cfg, tmp_path / "whole"))
    cut = train(cfg, tmp_path / "cut")
    next(cut), next(cut)
    cut.close()
    cfg.data.workers, cfg.training.checkpoint_every_steps = 1, 3
    cfg.backbone.checkpointing = "on"
    for step, same in zip(train(cfg, tmp_path / "cut"), whole[2:], strict=True):
        assert step.number == same.number
        assert step.losses == pytest.approx(same.losses, rel=1e-9)
    (change,) = read_json(tmp_path / "cut" / "environment.json")["changes"]
    assert len(change["changed"]) == 3  # and nothing about what differs


@pytest.mark.parametrize("batch_size", [1, 4])
def test_other_micro_batches_leave_each_step_its_images_and_are_noted(
    tmp_path, monkeypatch, capsys, batch_size
) -> None:
    run, cfg, seen = tmp_path / "run", exact(), images_of(monkeypatch)
    cfg.training.batch_size, cfg.training.accumulate = 2, 2
    list(train(cfg, tmp_path / "whole"))
    undisturbed = dict(seen)
    assert len(set(map(str, undisturbed.values()))) == 4
    seen.clear()
    cut = train(cfg, run)
    next(cut), next(cut)
    cut.close()
    cfg.training.batch_size, cfg.training.accumulate = batch_size, 4 // batch_size
    assert [step.number for step in train(cfg, run)] == [3, 4]
    assert seen == undisturbed
    printed = capsys.readouterr().out
    assert (
        f"training.batch_size: 2 -> {batch_size}" in printed and "as with another seed" in printed
    )
    assert load_config(run / "config.json") == cfg
    (change,) = read_json(run / "environment.json")["changes"]
    assert change["after"] == 2 and change["changed"][-1] in printed
    cfg.training.batch_size = 8  # another number of images a step
    with pytest.raises(ValueError, match=rf"training.batch_size: {batch_size} -> 8\nUse another"):
        next(train(cfg, run))


def test_a_failed_start_does_not_keep_its_name(tmp_path, monkeypatch) -> None:
    """Whatever failed before the first checkpoint: other sizes, other code, too much memory."""

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = tmp_path / "run"
    with monkeypatch.context() as failing:
        failing.setattr("mimdet.training.trainer.Trainer.forward", too_much)
        with pytest.raises(torch.OutOfMemoryError):
            next(train(quick(), run, sampler=own_sampler))
    assert CheckpointStore(run / "checkpoints").steps() == []
    begun = Run(run, quick())
    begun.store.save(Checkpoint(0, {"w": torch.zeros(2)}, {}))  # stopped in its first step
    begun.keep(read_slots({"sampler": own_sampler}))
    assert begun.store.steps() == [0]
    other = quick(3)
    other.detector.channels = 8
    steps = train(other, run)
    assert next(steps).number == 1 and load_config(run / "config.json") == other
    with pytest.raises(ValueError, match=r"another configuration:\n.*channels: 8 -> 16"):
        next(train(quick(), run))  # somebody works here
    assert [step.number for step in steps] == [2, 3]
    assert load_slots(run, other, trust_code=False) == {}
    with pytest.raises(ValueError, match=r"another configuration:\n.*channels: 8 -> 16"):
        next(train(quick(), run))


def test_a_recipe_that_starts_from_an_autoencoder_asks_for_one(tmp_path, capsys) -> None:
    cfg = presets.mimdet_base()
    cfg.data.source = "shapes"
    for begin in (
        lambda: next(train(cfg, tmp_path / "run")),
        lambda: Job.start(cfg, tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=r"--init-from FILE.*init_from='random'"):
            begin()
        assert not (tmp_path / "run").exists()
    deliberate = quick()
    deliberate.preset, deliberate.training.init_from = "mimdet_base", "random"
    assert next(train(deliberate, tmp_path / "run")).number == 1
    assert "mimdet_base begins with random weights. Its schedule" in capsys.readouterr().out
    assert next(train(deliberate, tmp_path / "run")).number == 2
    assert "random weights" not in capsys.readouterr().out  # it is no longer to be decided


# ------------------------------------------------------------------------------- two at once


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_where_nothing_guards_a_run_it_is_said_and_rows_do_not_double(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    first = train(quick(), tmp_path / "run")
    with pytest.warns(UserWarning, match=r"no file locks in .*run .*: see that no other process"):
        next(first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = train(quick(), tmp_path / "run")
        next(second)
    with pytest.raises(RunInUse, match=r"another training has begun in .*: this one writes"):
        next(first)
    assert read_status(tmp_path / "run")["state"] == "training"
    assert [step.number for step in second] == [2, 3, 4]
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


def start(run: Path, steps: int, **options) -> subprocess.Popen:
    words = "--shapes-size 64 --short-sides 64 --test-short-side 64 --shapes-val 2 --batch-size 1"
    words += f" --threads 1 --evaluate-every 0 --steps {steps} --checkpoint-every-steps {steps}"
    command = [sys.executable, "-m", "mimdet", "train", "tiny", str(run), *words.split()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)


def test_a_training_whose_lock_was_removed_is_still_alone(tmp_path) -> None:
    run = tmp_path / "run"
    child = start(run, 4000)
    wait_until(lambda: len(rows_of(run)) >= 2, "two steps")
    (run / "lock").unlink()
    assert in_use(run)
    with pytest.raises(RunInUse, match=f"process {child.pid} on .* already trains in"):
        list(resume(run))
    copy = shutil.copytree(run, tmp_path / "copy")
    assert not in_use(copy)
    child.terminate()
    child.wait(60)
    assert not in_use(run) and read_status(run)["state"] == "stopped"


def test_a_damaged_status_says_as_much_as_none(run) -> None:
    (run / STATUS).write_text('{"state": "trai')
    assert read_status(run)["state"] == "new" and not in_use(run)
    list(resume(run))
    assert read_status(run)["state"] == "finished"


# ------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("raised", "done", "state", "error"),
    [
        (None, 3, "finished", ""),
        (KeyboardInterrupt(), 2, "stopped", ""),
        (KeyboardInterrupt(), 3, "finished", ""),  # the last step was done
        (RuntimeError("the cat sat on it"), 2, "failed", "RuntimeError: the cat sat on it"),
    ],
)
def test_a_run_says_how_its_training_ended(tmp_path, raised, done, state, error) -> None:
    run = Run(tmp_path / "run", quick())
    with suppress(KeyboardInterrupt, RuntimeError), run.in_training(3, lambda: done):
        during = read_status(run.path)
        assert (during["state"], during["step"], during["total"]) == ("training", done, 3)
        assert during["run"] == str(run.path.resolve()) and during["pid"] == os.getpid()
        if raised is not None:
            raise raised
    after = read_status(run.path)
    assert (after["state"], after["step"], after["error"]) == (state, done, error)
    assert after["began"] == during["began"] > 0 and not in_use(run.path)


def test_a_run_is_in_use_with_a_lock_or_without(tmp_path) -> None:
    cfg = quick()
    run = Run(tmp_path / "run", cfg, locked=True)
    with alone_in(run.path), run.in_training(3, lambda: 0):  # who holds the lock may train
        with pytest.raises(RunInUse), Run(run.path, cfg).in_training(3, lambda: 0):
            pass
        (run.path / "lock").unlink()
        assert in_use(run.path)
        assert not in_use(shutil.copytree(run.path, tmp_path / "copy"))
    assert not in_use(run.path)


def test_what_changes_on_the_way_is_noted(tmp_path, capsys) -> None:
    cfg = quick()
    Run(tmp_path / "run", cfg).keep({})
    about = read_json(tmp_path / "run" / "environment.json")
    assert about == {"folder": str(Path.cwd()), "run": str((tmp_path / "run").resolve())}
    assert capsys.readouterr().out == ""
    cfg.data.workers = 1
    run = Run(tmp_path / "run", cfg)
    run.keep({})
    run.store.save(Checkpoint(7, {"w": torch.zeros(2)}, {}))
    cfg.data.workers = 2
    Run(tmp_path / "run", cfg).keep({})
    assert "goes on with data.workers: 0 -> 1" in capsys.readouterr().out
    noted = read_json(tmp_path / "run" / "environment.json")
    assert noted.pop("changes") == [
        {"after": 0, "changed": ["data.workers: 0 -> 1"]},
        {"after": 7, "changed": ["data.workers: 1 -> 2"]},
    ]
    assert noted == about and load_config(tmp_path / "run/config.json").data.workers == 2


def test_steps_that_will_be_done_again_are_forgotten(tmp_path) -> None:
    run = Run(tmp_path / "run", quick())
    for step in (1, 2, 3):
        run.store.save(Checkpoint(step, {"w": torch.zeros(2)}, {}), keep=3)
        run.append({"step": step, "loss": float("nan")})
    run.append({"step": 3, "evaluation": {"box": {"AP": 0.1}}})
    assert run.rows.step == 0 and len(run.evaluations()) == 1 and run.rows.step == 3
    run.forget_after(2)
    assert run.metrics() == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert run.store.steps() == [1, 2] and run.rows.step == 2
    run.rows.path.write_text('{"step": 1}\n')  # in place: the same file, and shorter
    assert run.metrics() == [{"step": 1}] and run.rows.step == 1
    run.rows.path.unlink()
    assert run.metrics() == [] and run.rows.step == 0
    run.append({"step": 5})
    assert run.metrics() == [{"step": 5}]


# ------------------------------------------------------------------------------- how it ends


def test_a_closed_terminal_saves(tmp_path) -> None:
    """The terminal goes with all that was to be printed to it."""
    ours, theirs = os.openpty()
    run = tmp_path / "run"
    child = start(run, 4000, stderr=theirs, start_new_session=True)
    os.close(theirs)
    wait_until(lambda: len(rows_of(run)) >= 3, "three steps")
    os.close(ours)
    os.killpg(child.pid, signal.SIGHUP)
    assert child.wait(60) == 128 + signal.SIGHUP
    last = CheckpointStore(run / "checkpoints").steps()[-1]
    assert last >= 3 and last == len(rows_of(run)) and read_status(run)["state"] == "stopped"


def test_sighup_is_left_to_nohup(tmp_path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        steps = train(quick(), tmp_path / "run")
        next(steps)
        os.kill(os.getpid(), signal.SIGHUP)
        assert next(steps).number == 2
        steps.close()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        steps = train(quick(), tmp_path / "run")
        next(steps)
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(TrainingStopped, match="stopped by SIGHUP: step 3 is saved"):
            next(steps)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_unexpected_error_says_where_the_last_checkpoint_is(tmp_path, monkeypatch) -> None:
    steps = train(quick(), tmp_path / "run")
    next(steps)
    monkeypatch.setattr("mimdet.training.trainer.Trainer.clip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        next(steps)
    (note,) = error.value.__notes__
    assert str(tmp_path / "run/checkpoints/000001") in note
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    steps = train(quick(), tmp_path / "run")
    next(steps)
    monkeypatch.setattr("mimdet.training.run.append_text", full)
    monkeypatch.setattr("mimdet.training.run.write_json", full)
    monkeypatch.setattr("mimdet.training.checkpoints.write_folder", lambda *_: 1 / 0)
    with pytest.raises(OSError, match=r"No space left on device: 'metrics.jsonl'") as error:
        next(steps)
    assert "Nor could step 3 be saved" in error.value.__notes__[0]  # the first failure is told


def test_a_row_that_the_disk_refused_once_is_there_after_all(tmp_path, monkeypatch) -> None:
    """The checkpoint that is saved on the way out has the rows of all steps before it."""
    undisturbed = tmp_path / "undisturbed"
    list(train(quick(), undisturbed))
    steps = train(quick(), tmp_path / "run")
    next(steps)
    calls = []

    def failing_once(path, text):
        calls.append(text)
        if len(calls) == 1:
            append_text(path, text[:20])
            raise OSError(errno.EIO, "Input/output error", str(path))
        append_text(path, text)

    monkeypatch.setattr("mimdet.training.run.append_text", failing_once)
    with pytest.raises(OSError, match="Input/output error"):
        next(steps)
    monkeypatch.undo()
    list(train(quick(), tmp_path / "run"))
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_told_with_the_file_s_name() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        append_text(Path("/dev/full"), "a row\n")


def test_steps_that_fp16_skipped_are_counted_and_rows_stay_strict_json(tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60)
    monkeypatch.setattr("mimdet.training.trainer.torch.amp.GradScaler", scaler)
    cfg = quick()
    cfg.training.precision = "fp16"
    model = mimdet.build_detector(cfg)
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert all(step.skipped for step in train(cfg, tmp_path / "run", model=model))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not json")

    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["skipped"] for row in rows if "loss" in row] == [True] * 4
    assert rows[0]["grad_norm"] is None


def test_a_damaged_row_is_named_each_time_and_hides_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    path.write_text('{"step": 1}\n{"step" 2}\n{"step": 3}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is damaged"):
            file.read()
    path.write_text('{"step": 1}\n{"step": 2, "x": 0}\n{"step": 3}\n')
    assert [row["step"] for row in file.read()] == [1, 2, 3]
