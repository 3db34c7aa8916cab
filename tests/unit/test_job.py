"""Trainings in processes of their own: watched, stopped, resumed, killed, attached to again."""

import json
import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from mimdet.config import Config, load_config
from mimdet.files import write_json
from mimdet.training import job as jobs
from mimdet.training.job import JOB, Child, Job, JobFailed, job_state, last_lines
from mimdet.training.owner import (
    STATUS,
    RunInUse,
    alone_in,
    in_use,
    process_of,
    process_record,
    read_status,
)
from mimdet.training.run import CheckpointStore, MetricsFile, Run, TrainingStopped, stored_config
from mimdet.training.train import resume, train
from tests.small import assert_same_end, gated, small, wait_until

STEPS = 8


def few_scenes(cfg, split):
    """A data set of six classes."""
    from mimdet import ShapesCOCO

    return ShapesCOCO("shapes-v1-easy", cfg.shapes_size, 10 if split == "train" else 3, split)


PARTS = {"sampler": gated, "dataset": few_scenes}


def easy() -> Config:
    """Eight steps of seconds; its class count is not that of its data, as a preset's may be."""
    cfg = small(STEPS)
    cfg.data.shapes_level = "shapes-v1-easy"
    cfg.data.workers = 0
    cfg.training.evaluate_every_steps = 4
    return cfg


# ------------------------------------------------------------------------------- the lock


def test_two_trainings_of_one_run_are_refused(tmp_path) -> None:
    steps = train(easy(), tmp_path / "run")
    next(steps)
    said = f"process {os.getpid()} on .* already trains in .*: wait for it, stop it, or use another"
    with pytest.raises(RunInUse, match=said):
        next(train(easy(), tmp_path / "run"))
    assert in_use(tmp_path / "run")
    steps.close()
    assert not in_use(tmp_path / "run")
    assert read_status(tmp_path / "run")["state"] == "stopped"
    assert next(train(easy(), tmp_path / "run")).number == 2


def test_a_lock_ends_with_its_process_and_is_not_kept_by_forks(tmp_path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from mimdet.training.owner import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: time.sleep(60); os._exit(0)\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with pytest.raises(RunInUse), alone_in(tmp_path, wait=0.2):
        pass
    child.kill()
    child.wait()
    assert not in_use(tmp_path)  # at once, although the fork lives on
    os.killpg(child.pid, signal.SIGKILL)


def test_a_process_is_known_by_its_start_not_by_its_number() -> None:
    own = process_record(psutil.Process())
    assert process_of(own).pid == os.getpid()
    for other in ({"started": 1.0}, {"host": "elsewhere"}):
        assert process_of(own | other) is None
    child = psutil.Popen([sys.executable, "-c", "pass"])
    record = process_record(child)
    wait_until(lambda: process_of(record) is None, "a process that has ended counts as none")
    child.wait()
    assert process_of(record) is None


# ------------------------------------------------------------------------------- children


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("pass", ""),
        ("print('error: no such file'); exit(1)", "no such file"),
        ("exit(3)", "ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed"),
        ("import os; os.kill(os.getpid(), 15)", "stopped from outside"),
    ],
)
def test_a_child_says_how_it_ended(tmp_path, code, why) -> None:
    (tmp_path / "log.txt").write_text("error: of an earlier one\n")
    child = Child(["-c", code], tmp_path / "log.txt")
    wait_until(lambda: child.ended() is not None, "its end")
    assert why in child.ended() and bool(why) == bool(child.ended())


@pytest.mark.parametrize("handler", ["lambda *_: sys.exit(143)", "lambda *_: None"])
def test_a_child_is_asked_to_end_then_killed(tmp_path, handler) -> None:
    code = f"import signal, sys, time; signal.signal(signal.SIGTERM, {handler})\n"
    code += "print('up', flush=True)\nfor _ in range(60): time.sleep(1)"
    child = Child(["-c", code], tmp_path / "log.txt")
    wait_until(lambda: last_lines(child.log, 1) == ["up"], "its start")
    assert child.ended() is None
    child.stop(0.5)
    assert ("was killed" if "None" in handler else "stopped from outside") in child.ended()


# ------------------------------------------------------------------------------- what files say


def test_metrics_are_read_while_they_are_written(tmp_path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    times = {"seconds": 2.0, "images_per_second": 2.0, "gpu_memory_gb": 0.0}
    rows = [
        {"step": s, "loss": 5.0 - s, "loss_cls": 1.0, "images": 4, "time": times} for s in (1, 2)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    file.path.write_text(lines[0] + lines[1][:9])
    assert [row["step"] for row in file.read()] == [1]
    with file.path.open("a") as stream:
        stream.write(lines[1][9:])
    assert [row["step"] for row in file.read()] == [1, 2]
    state = job_state("training", file.rows, 5, "")
    assert (file.step, state.losses) == (2, {"loss": 3.0, "loss_cls": 1.0})
    assert str(state) == "training, step 2 of 5, loss 3, 2.0 images/s, about 00:06 left"
    evaluated = {"step": 2, "evaluation": {"box": {"AP": 0.5}}, "time": {"seconds": 6.0}}
    state = job_state("training", [*file.rows, evaluated], 5, "")
    assert state.seconds_left == 3 * 5.0 and state.images_per_second == 2.0  # 10 s for two steps
    assert job_state("starting", [], 0, "").seconds_left is None
    os.replace(file.path, tmp_path / "old")
    file.path.write_text(lines[0])  # a training that resumes writes it anew, without step 2
    assert [row["step"] for row in file.read()] == [1]
    assert last_lines(tmp_path / "log.txt", 3) == []
    (tmp_path / "log.txt").write_text("first\n\n 1/8 steps\r 2/8 steps\r\nerror: no\n")
    assert last_lines(tmp_path / "log.txt", 2) == [" 2/8 steps", "error: no"]


# ------------------------------------------------------------------------------- before it starts


def test_what_cannot_be_started_is_said_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(jobs.psutil, "Popen", lambda *_, **__: pytest.fail("it was started"))
    Job.prepare(easy(), tmp_path / "run")
    with (
        monkeypatch.context() as working,
        pytest.raises(ValueError, match=r"another configuration.*\n.*training.steps: 8 -> 9"),
    ):
        working.setattr("mimdet.training.run.at_work", lambda _: True)  # somebody works there
        other = easy()
        other.training.steps = 9
        Job.start(other, tmp_path / "run")
    with pytest.raises(ValueError, match="accumulate=2 micro-batches of a step: use a divisor"):
        Job.start(easy(), tmp_path / "run", processes=3)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match="not empty and holds no run"):
        Job.start(easy(), tmp_path / "photos")
    for use in (Job.attach, lambda folder: next(resume(folder))):
        with pytest.raises(FileNotFoundError, match="holds no run"):
            use(tmp_path / "photos")


def test_code_of_a_cell_is_kept_compared_and_only_trusted_here(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Job, "resume", lambda self, processes=0: None)
    job = Job.start(easy(), tmp_path / "run", sampler=gated)
    assert job.words()[-1] == "--trust-code"
    Job.start(easy(), tmp_path / "run", sampler=gated)
    job._note(process_record(psutil.Process()))  # it is at work
    with pytest.raises(ValueError, match="other code for: sampler"):
        Job.start(easy(), tmp_path / "run")
    (tmp_path / "run" / JOB).unlink()
    monkeypatch.undo()
    with pytest.raises(PermissionError, match="trust_code=True"):
        Job.attach(tmp_path / "run").resume()
    assert "torch.distributed.run" in job.words(2) and "--nproc-per-node=2" in job.words(2)


def test_nothing_to_stop_a_number_that_another_process_has_now_and_a_copy(tmp_path) -> None:
    Run(tmp_path / "run", easy())
    job = Job.attach(tmp_path / "run")
    assert job.stop() is False and job.wait(0).name == "new" and not job.running()
    own = process_record(psutil.Process())
    job._note(own | {"started": 1.0})
    assert not job.running() and job.stop() is False
    job._note(own)
    assert job.running()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = Job.attach(tmp_path / "copy")
    assert not copy.running() and copy.stop() is False and copy.state().name == "new"


def test_what_is_said_while_the_process_lives(tmp_path) -> None:
    """Between the last word of a training and the end of its process, it is not starting.

    Nor finished: who starts another training then would find this one.
    """
    Run(tmp_path / "run", easy())
    Job(tmp_path / "run")._note(process_record(psutil.Process()))
    said = {"starting": "starting", "training": "training"}
    for last, name in (said | {"finished": "stopping", "stopped": "stopping"}).items():
        write_json(tmp_path / "run" / STATUS, {"state": last})
        assert Job.attach(tmp_path / "run").state().name == name


def test_ctrl_c_while_waiting_stops_the_job_in_one_line(tmp_path, monkeypatch) -> None:
    Run(tmp_path / "run", easy())
    job = Job.attach(tmp_path / "run")
    asked = []
    monkeypatch.setattr(job, "running", lambda: not asked)
    monkeypatch.setattr(job, "stop", lambda: asked.append(1))
    monkeypatch.setattr(jobs.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(TrainingStopped, match="stopped by SIGINT: step 0 is saved") as stopped:
        job.wait()
    assert asked and len(stopped.value._render_traceback_()) == 1


def test_a_training_of_a_terminal_is_asked_and_the_next_one_is_not(tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    steps = train(easy(), run)
    next(steps)
    job = Job.attach(run)
    assert job.state().name == "training" and job.state().total == STEPS
    sent = []
    monkeypatch.setattr(jobs, "ask_to_end", lambda process: sent.append(process.pid))
    assert job.stop() and sent == [os.getpid()]
    assert job.state().name == "stopping"
    steps.close()
    assert job.state().name == "stopped" and job.state().step == 1
    steps = train(easy(), run)
    next(steps)
    assert job.state().name == "training"
    steps.close()


# ------------------------------------------------------------------------------- real ones


def test_stopped_attached_to_and_resumed_it_is_the_undisturbed_run(tmp_path, gate) -> None:
    run = tmp_path / "run"
    job = Job.start(easy(), run, **PARTS)
    again = Job.start(easy(), run, **PARTS)  # attaches
    attached = Job.attach(run, trust_code=True)
    assert again.running() and attached.running()
    assert attached.state().name in ("starting", "training")
    child = json.loads((run / JOB).read_text())
    wait_until(lambda: attached.state().step == 3, "three steps")
    seen = attached.state()
    assert seen.total == STEPS and seen.seconds_left is not None and "loss" in seen.losses
    assert attached.stop() is True
    stopped = job.wait(200)
    assert stopped.name == "stopped" and stopped.step == 3
    assert attached.state().name == "stopped" and not again.running()
    assert CheckpointStore(run / "checkpoints").steps()[-1] == stopped.step
    assert process_of(child) is None and not in_use(run)
    stored = stored_config(run)
    assert stored.detector.num_classes == 6 and stored.data.source.endswith(":few_scenes")

    gate.unlink()
    attached.resume()
    assert json.loads((run / JOB).read_text())["pid"] != child["pid"]
    done = attached.wait(300)
    assert done.name == "finished" and done.step == STEPS and "step 8 of 8" in str(done)
    assert [step for step, _ in done.evaluations] == [4, 8]
    Job.prepare(easy(), tmp_path / "undisturbed", **PARTS)
    assert len(list(resume(tmp_path / "undisturbed", trust_code=True))) == STEPS
    assert_same_end(run, tmp_path / "undisturbed")
    assert load_config(run / "config.json").training == easy().training
    assert any("is saved in" in line for line in job.log())


def test_a_child_that_dies_says_why(tmp_path) -> None:
    broken = easy()
    broken.training.init_from = str(tmp_path / "missing.pth")
    job = Job.start(broken, tmp_path / "run")
    with pytest.raises(JobFailed, match=r"missing.pth[\s\S]*The end of .*log.txt"):
        job.wait(200)
    state = job.state()
    assert state.name == "failed" and "missing.pth" in state.error and state.step == 0
    assert Job.attach(tmp_path / "run").state().error == state.error
    broken.data.source, broken.data.train_json = "coco", "missing.json"
    with pytest.raises((ValueError, FileNotFoundError), match=r"missing\.json|train_images"):
        Job.start(broken, tmp_path / "other")  # at once


def test_a_killed_child_is_noticed_and_another_continues(tmp_path, gate) -> None:
    run = tmp_path / "run"
    job = Job.start(easy(), run, sampler=gated)
    wait_until(lambda: job.state().step == 3, "three steps")
    os.kill(json.loads((run / JOB).read_text())["pid"], signal.SIGKILL)
    with pytest.raises(JobFailed, match="was killed"):
        job.wait(60)
    assert read_status(run)["state"] == "training"  # it had no time to say anything
    assert Job.attach(run).state().name == "failed"
    job = Job.start(easy(), run, sampler=gated)
    wait_until(lambda: job.state().name == "training", "it trains again")
    assert job.stop() and job.wait(200).name == "stopped"
    assert 2 <= job.state().step < STEPS  # from the checkpoint of step 2
