"""Real processes, really killed: what is on disk afterwards is whole, and the run goes on."""

import os
import pickle
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from mimdet import cli
from mimdet.training.run import CheckpointStore, load_detector
from tests.small import WORDS, assert_same_end, ended, rows_of, start, still_running, wait_until

SCENES = "--shapes-size 64 --shapes-train 16 --shapes-val 2 --batch-size 1 --evaluate-every 0"
STEPS, EVERY = 40, 5
"""Of a training by two processes, and of those between two checkpoints."""


def command(run: Path, steps: int, every: int = 2, accumulate: int = 2) -> list[str]:
    numbers = ["--steps", str(steps), "--checkpoint-every-steps", str(every)]
    numbers += ["--accumulate", str(accumulate)]
    return ["train", "tiny", str(run), *WORDS, *SCENES.split(), *numbers]


def start_several(run: Path, answer_minutes: float = 10, count: int = 2) -> subprocess.Popen:
    torchrun = f"torch.distributed.run --standalone --nproc-per-node={count} -m mimdet".split()
    words = [*command(run, STEPS, EVERY, count), "--answer-minutes", str(answer_minutes)]
    return start([*torchrun, *words])


def finish(process: subprocess.Popen, seconds: float = 120) -> str:
    return ended(process, seconds)[0]


def wait_for_step(run: Path, step: int) -> None:
    wait_until(lambda: len(rows_of(run)) >= step, f"step {step}", 120)


def last_step(run: Path) -> int:
    return CheckpointStore(run / "checkpoints").steps()[-1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + 15), (signal.SIGINT, 128 + 2), (signal.SIGKILL, -9)]
)
def test_killed_run_is_whole_and_resumes(tmp_path, number, code):
    run = tmp_path / "run"
    process = start(["mimdet", *command(run, 400)])
    wait_for_step(run, 3)
    process.send_signal(number)
    begin = time.monotonic()
    printed = finish(process)
    assert process.returncode == code, printed
    assert time.monotonic() - begin < 20
    if number != signal.SIGKILL:
        assert "run the same command again to resume" in printed
    stopped_at = last_step(run)
    assert stopped_at >= 2
    load_detector(run)
    before = rows_of(run)[:stopped_at]

    resumed = start(["mimdet", *command(run, 400)])
    wait_for_step(run, stopped_at + 3)
    resumed.send_signal(signal.SIGTERM)
    finish(resumed)
    after = rows_of(run)
    assert [row["step"] for row in after] == list(range(1, len(after) + 1))
    assert after[:stopped_at] == before


# ------------------------------------------------------------------------------- of two processes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert "done: " in finish(start_several(run))
    assert last_step(run) == STEPS
    return run


def family(torchrun: subprocess.Popen) -> dict[int, psutil.Process]:
    """Rank -> process."""
    children = psutil.Process(torchrun.pid).children()
    return {int(child.environ()["RANK"]): child for child in children}


@pytest.mark.parametrize("victim", ["first", "second", "torchrun, politely", "the terminal"])
def test_two_processes_end_together_and_the_run_goes_on(tmp_path, undisturbed, victim):
    run = tmp_path / "run"
    torchrun = start_several(run)
    wait_for_step(run, EVERY + 3)
    members = family(torchrun)
    begin = time.monotonic()
    if victim == "torchrun, politely":
        torchrun.send_signal(signal.SIGTERM)
    elif victim == "the terminal":  # what it started hears of that, torchrun's processes from it
        os.killpg(torchrun.pid, signal.SIGHUP)
    else:
        members[victim == "second"].kill()
    printed = finish(torchrun, seconds=60)
    assert torchrun.returncode != 0
    assert still_running(members.values()) == []
    assert "run the same command again to resume" in printed
    stopped_at = last_step(run)
    if victim == "first":
        assert stopped_at % EVERY == 0 and EVERY <= stopped_at < STEPS
    else:  # the first process lives and saves the last full step
        assert stopped_at == len(rows_of(run)) < STEPS
    if victim in ("torchrun, politely", "the terminal"):
        assert time.monotonic() - begin < 20
        assert printed.count(f": step {stopped_at} is saved in {run}") == 1
    else:
        assert printed.count("another process of this run has ended or failed") == 1
    load_detector(run)
    assert "done: " in finish(start_several(run))
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("politely", [False, True])
def test_a_process_that_does_not_answer_ends_the_run_and_is_named(tmp_path, undisturbed, politely):
    """SIGSTOP: it neither answers nor ends. SIGTERM is obeyed while the first one waits for it."""
    run = tmp_path / "run"
    torchrun = start_several(run, answer_minutes=10 if politely else 0.1)
    wait_for_step(run, EVERY + 3)
    stopped = family(torchrun)[1]
    stopped.suspend()
    begin = time.monotonic()
    if politely:
        time.sleep(2)  # the first process waits by now
        torchrun.send_signal(signal.SIGTERM)
    printed = finish(torchrun, seconds=200)
    assert torchrun.returncode != 0 and still_running([stopped]) == []
    assert f"process 1 ({stopped.pid} on " in printed and "did not answer for" in printed
    assert "run the same command again to resume" in printed
    assert time.monotonic() - begin < 150  # of which torchrun waits 30 before it kills
    assert last_step(run) == len(rows_of(run)) < STEPS
    assert "done: " in finish(start_several(run))
    assert_same_end(run, undisturbed)


# ------------------------------------------------------------------------------- damaged files


def test_damaged_files_are_named_and_a_pickle_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    run = tmp_path / "run"
    cli.main(command(run, 2))
    checkpoint = run / "checkpoints" / "000002"
    optimizer = checkpoint / "optimizer.pt"
    optimizer.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SystemExit, match=r"000002.optimizer.pt holds something else than numbers"):
        cli.main(command(run, 2))
    assert not (tmp_path / "exploded").exists()
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"000002.model\.safetensors is cut off or damaged"):
        load_detector(run)
