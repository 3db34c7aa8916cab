"""Two processes with SyncedBatchNorm compute what one nn.BatchNorm2d computes on both batches."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mimdet.models.batchnorm import SyncedBatchNorm

STEPS = 3
COUNTS = ((3, 2), (1, 4), (4, 0), (0, 1), (0, 0))  # images, or RoIs, of the two processes
SHAPES = ((5, 4, 6), (3, 2, 5))  # C, H, W
CASES = list(itertools.product(COUNTS, SHAPES, (torch.float32, torch.float64)))
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

Numbers = dict[str, Tensor]


def draw(counts: tuple[int, int], shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """(sum of counts, C, H, W): every channel with a mean and a deviation of its own."""
    channel = torch.arange(shape[0], dtype=dtype)[:, None, None]
    return torch.randn(sum(counts), *shape, dtype=dtype) * (channel + 1) + 3 * channel


def assert_equal_but_for_rounding(ours: Tensor, theirs: Tensor, what: str) -> None:
    scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    tolerance = TOLERANCE.get(theirs.dtype, 0) * scale
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0, msg=lambda m: f"{what}: {m}")


def train(norm: nn.BatchNorm2d, case: tuple, part: slice = slice(None)) -> list[Numbers]:
    """Train `norm` on `part` of each step's batch; every number of every step."""
    counts, shape, dtype = case
    torch.manual_seed(CASES.index(case))
    norm = norm.to(dtype)
    steps = []
    for _ in range(STEPS):
        x = draw(counts, shape, dtype)[part].requires_grad_()
        pull = torch.randn(sum(counts), *shape, dtype=dtype)[part]
        output = norm(x)
        x_grad, *rest = torch.autograd.grad((output * pull).sum(), [x, norm.weight, norm.bias])
        with torch.no_grad():
            norm.weight += 0.1  # the same everywhere, so that the next step is another one
        buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        steps.append({"output": output, "x": x_grad, "weight": rest[0], "bias": rest[1], **buffers})
    return [{name: value.detach() for name, value in step.items()} for step in steps]


def work(rank: int, folder: str) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    results: dict = {}
    for case in CASES:
        counts, shape, _ = case
        part = slice(None, counts[0]) if rank == 0 else slice(counts[0], None)
        results[case] = train(SyncedBatchNorm(shape[0]), case, part)

    torch.manual_seed(0)
    far = draw((6, 6), (2, 5, 5), torch.float32) + 1000
    results["far"] = SyncedBatchNorm(2)(far[6 * rank : 6 * rank + 6]).detach()

    norm = SyncedBatchNorm(4)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 4, 5, 5).bfloat16().requires_grad_()
        output = norm(x)
    output.float().square().sum().backward()
    results["bfloat16"] = (output.dtype, x.grad.dtype, norm.weight.grad.dtype, norm.running_var)

    norm.eval()
    results["alone"] = norm(torch.randn(2, 4, 3, 3)) if rank == 0 else None
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("batchnorm")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one_batchnorm_on_both_batches(results, case):
    expected = train(nn.BatchNorm2d(case[1][0]), case)
    for step, one in enumerate(expected):
        first, second = results[0][case][step], results[1][case][step]
        both = {name: torch.cat([first[name], second[name]]) for name in ("output", "x")}
        # Summed with all other gradients at the end of a step.
        both |= {name: first[name] + second[name] for name in ("weight", "bias")}
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(first[name], second[name]), f"step {step}, {name}"
            both[name] = first[name]
        for name, value in both.items():
            assert_equal_but_for_rounding(value, one[name], f"step {step}, {name}")


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(results):
    """A variance from sums of squares would be off by a tenth here."""
    torch.manual_seed(0)
    far = draw((6, 6), (2, 5, 5), torch.float32) + 1000
    exact = nn.BatchNorm2d(2).double()(far.double()).float()
    both = torch.cat([results[0]["far"], results[1]["far"]])
    torch.testing.assert_close(both, exact, atol=2e-4, rtol=1e-4)  # float32 steps of 6e-5 at 1000


def test_bfloat16_has_float32_statistics_and_evaluation_waits_for_nobody(results):
    for part in results:
        *dtypes, running = part["bfloat16"]
        assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
        assert running.dtype == torch.float32
        assert torch.equal(running, results[0]["bfloat16"][-1])
    assert results[0]["alone"].shape == (2, 4, 3, 3) and results[1]["alone"] is None


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_batchnorm_bit_for_bit(training):
    theirs, ours = nn.BatchNorm2d(5).train(training), SyncedBatchNorm(5).train(training)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for x in (torch.randn(4, 5, 6, 7), torch.randn(0, 5, 6, 7)):
        given = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = theirs(given[0]), ours(given[1])
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().sum().backward()
        assert torch.equal(given[0].grad, given[1].grad)
        assert torch.equal(theirs.weight.grad, ours.weight.grad)
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name]), name
