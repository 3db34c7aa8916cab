"""Several processes compute what one process computes by accumulation, and speak with one voice."""

import json
import re
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mimdet
from mimdet import ShapesCOCO, cli, processes
from mimdet.analysis.evaluate import evaluate
from mimdet.config import load_config
from mimdet.models.detector import build_roi_heads
from mimdet.structures import Crops, Target
from mimdet.training.run import CheckpointStore, load_detector
from mimdet.training.train import train
from tests.small import (
    WORDS,
    ended,
    rows_of,
    small,
    start,
    wait_until,
    weights_of,
    write_coco,
)

SIZES = [*WORDS, *"--depth 2 --short-sides 64 96 --evaluate-every 0".split()]
SHAPES = "--shapes-size 64 --shapes-train 10 --shapes-val 5 --batch-size 2".split()
OPTIONS = [*SIZES, *SHAPES, *"--drop-path 0.1 --sample-ratio 0.5".split()]
# Without BatchNorm a micro-batch stands alone, whichever process computes it. Four of them are
# added up in another order by two processes than by one: float64 shows that this is all.
EXACT = "--norm GN --precision fp64 --accumulate 4 --steps 10".split()


def torchrun(launcher: list[str], words: list[str]) -> subprocess.Popen:
    """A torchrun with these options; `words` are those of the mimdet command."""
    command = ["torch.distributed.run", *launcher, "-m", "mimdet", *words]
    return start(command, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> str:
    """What it printed, once it has ended well."""
    printed, errors = ended(process, 240)
    assert process.returncode == 0, errors
    return printed


def in_two_processes(*words: str) -> str:
    return finish(torchrun(["--standalone", "--nproc-per-node=2"], list(words)))


def steps(run: Path) -> list[dict]:
    return [row for row in rows_of(run) if "loss" in row]


# ------------------------------------------------------------------ the same training


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    cli.main(["train", "tiny", str(run), *OPTIONS, *EXACT])
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """The same training in two processes, and what they printed."""
    run = tmp_path_factory.mktemp("two") / "run"
    return run, in_two_processes("train", "tiny", str(run), *OPTIONS, *EXACT)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> tuple[Path, str]:
    """The same training on two machines of one process each, both of them this one."""
    run = tmp_path_factory.mktemp("nodes") / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=rehearsal"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command = ["train", "tiny", str(run), *OPTIONS, *EXACT]
    agents = [torchrun(launcher, command) for _ in range(2)]
    quiet, first = sorted((finish(agent) for agent in agents), key=len)
    assert "done: " in first and quiet == ""
    return run, first


@pytest.mark.parametrize("other", ["two", "nodes"])
def test_two_processes_equal_one(one, other, request):
    run, _ = request.getfixturevalue(other)
    expected, actual = steps(one), steps(run)
    assert [row["step"] for row in actual] == list(range(1, 11))
    for a, b in zip(expected, actual, strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-9)
        assert a["images"] == 8
    ours, theirs = weights_of(run), weights_of(one)
    assert {value.dtype for value in ours.values()} == {torch.float64}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-9, rtol=0, msg=name)
    assert torch.get_default_dtype() == torch.float32


def test_a_run_of_one_process_goes_on_with_two_and_with_four(one, tmp_path):
    """Steps 1 to 3 by one, 4 to 6 by two, 7 to 10 by four: the run that one process did alone."""
    run, command = tmp_path / "run", ["train", "tiny", str(tmp_path / "run"), *OPTIONS, *EXACT]
    stopped = train(load_config(one / "config.json"), run)
    for step in stopped:
        if step.number == 3:
            break
    stopped.close()
    two = torchrun(["--standalone", "--nproc-per-node=2"], command)
    wait_until(lambda: len(steps(run)) >= 6, "step 6", 120)
    two.terminate()
    assert "to resume" in "".join(ended(two, 60))
    at = len(steps(run))
    assert 6 <= at < 10
    finish(torchrun(["--standalone", "--nproc-per-node=4"], command))
    for a, b in zip(steps(one), steps(run), strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-9)
    ours, theirs = weights_of(run), weights_of(one)
    assert list(ours) == list(theirs)  # no "module." in front of a name
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-9, rtol=0, msg=name)


def test_one_micro_batch_a_process_is_bit_identical_and_starts_from_given_weights(tmp_path, two):
    """a + b = b + a: nothing is rounded otherwise, in float32 too."""
    words = [*OPTIONS, "--norm", "GN", "--accumulate", "2", "--steps", "3"]
    words += ["--init-from", str(two[0])]
    cli.main(["train", "tiny", str(tmp_path / "one"), *words])
    printed = in_two_processes("train", "tiny", str(tmp_path / "two"), *words)
    assert printed.count("warm start from") == 1
    assert steps(tmp_path / "two") == steps(tmp_path / "one")
    ours, theirs = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_only_the_first_process_prints_and_writes(two):
    printed = two[1]
    lines = [line for line in re.split(r"[\r\n]+", printed) if line.strip()]
    told = [line for line in lines if "step/s" not in line and "s/step" not in line]  # not the bar
    assert len(told) == len(set(told))
    assert sum(line.startswith("done: ") for line in told) == 1
    assert sum(line.startswith("step 10: box AP") for line in told) == 1


# ------------------------------------------------------------------ evaluation


def evaluation(run: Path) -> tuple[list[dict], list[dict]]:
    """Metrics at every ratio, and the detections in the order of the images."""
    rows = json.loads((run / "evaluation.json").read_text())["ratios"]
    for row in rows:
        del row["seconds"]
    found = json.loads((run / "predictions.json").read_text())
    return rows, sorted(found, key=lambda result: result["image_id"])


def numbers(value: object) -> list:
    """The leaves of nested lists, tuples and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return [value]
    return [leaf for item in value for leaf in numbers(item)]


def test_evaluation_is_shared_and_equal(one):
    words = ["evaluate", str(one), "--ratios", "0.5", "1", "--draws", "1", "--batch-size", "2"]
    cli.main(words)
    rows, found = evaluation(one)
    (one / "evaluation.json").unlink()
    in_two_processes(*words)
    rows_of_two, found_by_two = evaluation(one)
    assert numbers(rows_of_two) == pytest.approx(numbers(rows), abs=1e-9, nan_ok=True)
    assert found_by_two == found
    assert len({result["image_id"] for result in found}) == 5


def test_evaluation_of_fewer_images_than_processes(one, seen):
    alone = evaluate(load_detector(one), ShapesCOCO(size=64, length=1, split="val"))
    assert len(alone.results) > 0
    for part in seen:
        expected = numbers(alone.metrics.to_dict())
        assert numbers(part["metrics"]) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert [part["results"] for part in seen] == [alone.results, []]


# ------------------------------------------------------------------ images without objects


@pytest.fixture(scope="module")
def mostly_empty(tmp_path_factory) -> list[str]:
    """Four images, an object on one of them: with two images a step, some process has none."""
    file = write_coco(tmp_path_factory.mktemp("data"), [[], [], [[8, 8, 32, 40]], []])
    words = ["--source", "coco", "--no-skip-empty", "--batch-size", "1", "--accumulate", "2"]
    for part in ("train", "val"):
        words += [f"--{part}-json", str(file), f"--{part}-images", str(file.parent / "images")]
    return words


def test_processes_without_objects_keep_up(tmp_path, mostly_empty):
    """With BatchNorm every process must take part in every exchange of every norm."""
    run = tmp_path / "run"
    words = [*SIZES, *mostly_empty, "--norm", "BN", "--steps", "4"]
    in_two_processes("train", "tiny", str(run), *words)
    rows = steps(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert np.isfinite([value for row in rows for value in row.values()]).all()
    assert sorted(row["loss_mask"] > 0 for row in rows) == [False, False, True, True]
    assert all(value.isfinite().all() for value in weights_of(run).values())


def test_unequal_work_adds_up_to_that_of_one(tmp_path, mostly_empty):
    """One process has objects, masks to learn and proposals to draw, the other one has none."""
    words = [*SIZES, *mostly_empty, "--norm", "GN", "--precision", "fp64", "--steps", "4"]
    cli.main(["train", "tiny", str(tmp_path / "one"), *words])
    in_two_processes("train", "tiny", str(tmp_path / "two"), *words)
    for a, b in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-9)
    ours, theirs = weights_of(tmp_path / "two"), weights_of(tmp_path / "one")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("norm", ["BN", "GN", "LN"])
def test_heads_without_a_single_roi_stay_in_the_graph(norm):
    cfg = small().detector
    cfg.norm = norm
    heads = build_roi_heads(cfg)
    features = [torch.rand(1, 16, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16, 32)]
    masks = Crops(torch.zeros(0, 4), torch.zeros(0, 112, 112, dtype=torch.uint8))
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), masks)
    losses = heads.losses(features, [torch.zeros(0, 4)], [nothing])
    found = {name: value.item() for name, value in losses.items()}
    assert found == {"loss_cls": 0, "loss_box_reg": 0, "loss_mask": 0}
    sum(losses.values()).backward()
    for tensor in [*features, *heads.parameters()]:
        assert tensor.grad is not None and tensor.grad.abs().sum() == 0


# ------------------------------------------------------------------ one fails, all fail


class Parts(torch.nn.Module):
    """Three parameters: one that every process uses, one for the first alone, one for none."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("statistics", torch.full((2,), 3.0 + rank))
        self.both, self.first, self.none = (
            torch.nn.Parameter(torch.full((2,), 5.0 + rank)) for _ in range(3)
        )

    def forward(self, factor: float) -> torch.Tensor:
        loss = (self.both * factor * (self.rank + 1)).sum()
        return loss + self.first.sum() if self.rank == 0 else loss


def gradients_of(parts: Parts) -> list:
    found = [parameter.grad for parameter in (parts.both, parts.first, parts.none)]
    return [None if gradient is None else gradient.tolist() for gradient in found]


def work(rank: int, folder: str, run: str) -> None:
    """What each of two processes does: exchanges by hand, an evaluation, a training that breaks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    seen = {}
    parts = Parts(rank)
    replica = processes.replicate(parts)
    with processes.kept_back(replica, True):
        replica(10.0).backward()
    seen["kept back"] = gradients_of(parts)
    replica(1.0).backward()
    seen["gradients"] = gradients_of(parts)
    seen["equal"] = [parts.both.tolist(), parts.statistics.tolist()]
    parts.statistics += rank
    replica(1.0)
    seen["kept apart"] = parts.statistics.tolist()
    seen["rows"] = processes.gather_rows(torch.tensor([rank, 5])).tolist()
    seen["lists"] = processes.gather_lists([rank] * rank)
    seen["any"] = processes.any_process(rank == 1, torch.device("cpu"))

    evaluated = evaluate(load_detector(run), ShapesCOCO(size=64, length=1, split="val"))
    seen["metrics"], seen["results"] = evaluated.metrics.to_dict(), evaluated.results

    cfg = small()
    cfg.detector.norm = "GN"
    torch.manual_seed(rank)  # whoever builds a model without a seed
    model = mimdet.build_detector(cfg)
    trained = train(cfg, Path(folder) / "run", model=model)
    next(trained)
    seen["weights"] = {name: value.clone() for name, value in model.state_dict().items()}
    if rank == 1:
        model.neck.register_forward_hook(
            lambda *args: {k: v * float("nan") for k, v in args[2].items()}
        )
    try:
        next(trained)
    except FloatingPointError as error:
        seen["error"] = str(error)
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(one, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("together")
    mp.spawn(work, (str(folder), str(one)), nprocs=2)
    assert CheckpointStore(folder / "run" / "checkpoints").steps() == [1]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_exchanges_by_hand_and_equal_weights_at_the_start(seen):
    assert [part["kept back"] for part in seen] == [
        [[10, 10], [1, 1], None],
        [[20, 20], None, None],
    ]
    for part in seen:  # 10 + 20 and 1 + 2; missing only where all miss it
        assert part["gradients"] == [[33, 33], [2, 2], None]
        assert part["equal"] == [[5, 5], [3, 3]]
        assert part["rows"] == [[0, 5], [1, 5]]
        assert part["any"]
    assert [part["kept apart"] for part in seen] == [[3, 3], [4, 4]]  # BatchNorm's own exchange
    assert [part["lists"] for part in seen] == [[1], []]
    first, second = (part["weights"] for part in seen)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_loss_that_is_not_finite_stops_all_and_names_the_images_of_one(seen):
    first, second = (part["error"] for part in seen)
    assert first == second
    named = re.search(r"step 2: the loss is not finite .* for the images \[(.*?)\]", first)
    assert named is not None and len(named[1].split(",")) == 2  # of the step's four


def test_alone_nothing_is_exchanged_and_more_processes_than_gpus_are_refused(monkeypatch):
    assert (processes.rank(), processes.world()) == (0, 1)
    layer = torch.nn.Linear(2, 2)
    assert processes.replicate(layer) is layer
    assert processes.gather_rows(torch.ones(3)).tolist() == [[1, 1, 1]]
    assert processes.gather_lists([1, 2]) == [1, 2]
    assert processes.from_first("x") == "x"
    assert not processes.any_process(False, torch.device("cpu"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc-per-node 1"):
        processes.join()


class SlowWork:
    """An exchange that ends, well or not, at the moment in which the wait for it runs out."""

    def __init__(self, ends_well: bool) -> None:
        self.ends_well, self.over = ends_well, False

    def wait(self, timeout=None) -> None:
        if timeout is not None and not self.over:
            self.over = True
            raise RuntimeError("Timed out waiting for 1000 ms for recv operation to complete")
        if not self.ends_well:
            raise RuntimeError("Connection closed by peer")

    def is_completed(self) -> bool:
        return self.over


def test_an_exchange_that_ends_as_the_wait_runs_out_is_no_lost_process():
    assert processes._done(SlowWork(ends_well=True))
    with pytest.raises(RuntimeError, match="Connection closed"):
        processes._done(SlowWork(ends_well=False))
