"""Real processes, really killed: what is on disk afterwards is whole, and the run goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimdet import cli
from mimdet.training.checkpoints import CheckpointStore
from mimdet.training.run import load_detector

WORDS = (
    "--embed-dim 32 --depth 1 --num-heads 2 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 "
    "--channels 16 --box-fc-dim 32 --short-sides 64 --test-short-side 64 --shapes-size 64 "
    "--shapes-train 16 --shapes-val 2 --batch-size 2 --accumulate 2 "
    "--checkpoint-every-steps 2 --evaluate-every 0"
).split()


def command(run: Path, steps: int) -> list[str]:
    return ["train", "tiny", str(run), *WORDS, "--steps", str(steps)]


def start(run: Path, steps: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mimdet", *command(run, steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached in {seconds} s")


def losses(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + 15), (signal.SIGINT, 128 + 2), (signal.SIGKILL, -9)]
)
def test_killed_run_is_whole_and_resumes(tmp_path, number, code):
    process = start(tmp_path / "run", 400)
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(number)
    begin = time.monotonic()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    assert time.monotonic() - begin < 20
    if number != signal.SIGKILL:
        assert "run the same command again to resume" in printed
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    stopped_at = store.steps()[-1]
    assert stopped_at >= 2
    load_detector(tmp_path / "run")
    before = losses(tmp_path / "run")[:stopped_at]

    resumed = start(tmp_path / "run", 400)
    wait_for_step(tmp_path / "run", stopped_at + 3)
    resumed.send_signal(signal.SIGTERM)
    resumed.communicate(timeout=120)
    after = losses(tmp_path / "run")
    assert [row["step"] for row in after] == list(range(1, len(after) + 1))
    assert after[:stopped_at] == before


def test_damaged_checkpoint_is_named(tmp_path):
    run = tmp_path / "run"
    cli.main(command(run, 2))
    weights = run / "checkpoints" / "000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"000002.model\.safetensors cannot be read"):
        load_detector(run)


def test_pickle_that_would_run_code_is_refused(tmp_path):
    import os
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    run = tmp_path / "run"
    cli.main(command(run, 2))
    (run / "checkpoints" / "000002" / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError):
        cli.main(command(run, 2))
    assert not (tmp_path / "exploded").exists()
