"""Two processes compute what one process computes by accumulation."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mimdet import processes
from mimdet.training.checkpoints import CheckpointStore

WORDS = (
    "--embed-dim 32 --depth 2 --num-heads 2 --decoder-dim 32 --decoder-depth 1 --decoder-heads 2 "
    "--channels 16 --box-fc-dim 32 --short-sides 64 96 --test-short-side 64 --shapes-size 64 "
    "--shapes-train 10 --shapes-val 5 --steps 4 --batch-size 2 --accumulate 2 --drop-path 0.1"
).split()


def train(path, count: int) -> None:
    shared = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    words = [*(shared if count > 1 else []), "mimdet", "train", "tiny", str(path), *WORDS]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for count in (1, 2):
        train(folder / str(count), count)
    return [folder / "1", folder / "2"]


def test_two_processes_equal_one(runs):
    one, two = (
        CheckpointStore(run / "checkpoints").load_last(torch.device("cpu")).weights for run in runs
    )
    for name, value in one.items():
        if "running_" in name or "num_batches" in name:
            continue  # two processes average their statistics, one updates them twice
        torch.testing.assert_close(value, two[name], atol=2e-6, rtol=1e-4, msg=name)


def test_losses_equal_and_every_step_is_written_once(runs):
    one, two = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    )
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["images"] == b["images"] == 4


def test_alone_nothing_is_exchanged():
    assert (processes.rank(), processes.world()) == (0, 1)
    layer = torch.nn.Linear(2, 2)
    processes.sum_gradients(layer.parameters())
    assert layer.weight.grad is None
    assert processes.gather_lists([1, 2]) == [1, 2]
    assert processes.from_first("x") == "x"
    assert not processes.any_process(False, torch.device("cpu"))
