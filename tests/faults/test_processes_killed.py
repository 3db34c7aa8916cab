"""One of several processes dies, or all are asked to stop: nothing hangs, nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mimdet.training.checkpoints import CheckpointStore
from mimdet.training.run import load_detector

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="finds the processes of torchrun under /proc"
)

STEPS = 40
EVERY = 5
"""Steps between two checkpoints."""
WORDS = (
    "--embed-dim 32 --depth 1 --num-heads 2 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 "
    "--channels 16 --box-fc-dim 32 --short-sides 64 --test-short-side 64 --shapes-size 64 "
    f"--shapes-train 16 --shapes-val 2 --batch-size 1 --accumulate 2 --steps {STEPS} "
    f"--checkpoint-every-steps {EVERY} --evaluate-every 0"
).split()
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node=2 -m mimdet train tiny".split()


def start(run: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *TORCHRUN, str(run), *WORDS],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(torchrun: subprocess.Popen, seconds: float = 120) -> str:
    """What it printed; fails where it is not over in time."""
    try:
        return torchrun.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        torchrun.terminate()  # it then ends its processes, within 30 s
        torchrun.wait()
        raise


def processes_of(torchrun: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id."""
    found = {}
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
        found |= dict.fromkeys(ranks, int(child))
    return found


def rows(run: Path) -> list[dict]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if len(rows(run)) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached in 120 s")


def state(run: Path) -> dict[str, torch.Tensor]:
    """Every number of the last checkpoint."""
    last = CheckpointStore(run / "checkpoints").load_last(torch.device("cpu"))
    assert last is not None and last.step == STEPS
    moments = last.optimizer["optimizer"]["state"]
    named = {f"{i}.{name}": v for i, values in moments.items() for name, v in values.items()}
    return last.weights | named


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    printed = finish(start(run))
    assert "done: " in printed, printed
    return run


def assert_goes_on_to_the_same_end(run: Path, undisturbed: Path) -> None:
    printed = finish(start(run))
    assert "done: " in printed, printed
    assert rows(run) == rows(undisturbed)
    expected, actual = state(undisturbed), state(run)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_is_killed(tmp_path, undisturbed, victim):
    run = tmp_path / "run"
    torchrun = start(run)
    wait_for_step(run, EVERY + 3)
    pids = processes_of(torchrun)
    os.kill(pids[victim], signal.SIGKILL)
    printed = finish(torchrun, seconds=60)
    assert torchrun.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert f"Signal 9 (SIGKILL) received by PID {pids[victim]}" in printed
    assert printed.count("another process of this run has ended or failed") == 1
    assert "run the same command again to resume" in printed

    stopped_at = CheckpointStore(run / "checkpoints").steps()[-1]
    if victim == 1:  # the first process is left and saves the last full step
        assert stopped_at == len(rows(run)) < STEPS
    else:
        assert stopped_at % EVERY == 0 and EVERY <= stopped_at < STEPS
    load_detector(run)
    assert_goes_on_to_the_same_end(run, undisturbed)


def test_torchrun_is_asked_to_stop(tmp_path, undisturbed):
    run = tmp_path / "run"
    torchrun = start(run)
    wait_for_step(run, EVERY + 3)
    pids = processes_of(torchrun)
    begin = time.monotonic()
    torchrun.send_signal(signal.SIGTERM)
    printed = finish(torchrun, seconds=60)
    assert time.monotonic() - begin < 20
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    stopped_at = CheckpointStore(run / "checkpoints").steps()[-1]
    assert stopped_at == len(rows(run)) < STEPS
    assert printed.count(f"stopped by SIGTERM: step {stopped_at} is saved in {run}") == 1
    assert_goes_on_to_the_same_end(run, undisturbed)
