"""Several processes that train or evaluate one model together (`torchrun -m mimdet ...`).

Each process holds the whole model and works on its share of the data; what they exchange is sums.
Gradients travel while the backward pass goes on (`replicate`), everything else between steps. Alone
(no torchrun) every function here does nothing, so callers need no special case. With several
processes all of them must call the same functions in the same order.
"""

import atexit
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimdet.config import TrainingConfig
from mimdet.console import Failed

T = TypeVar("T")


ANSWER_MINUTES = 10.0
HURRIED = 12.0
"""Seconds to wait for the others once this process was asked to stop; torchrun kills after 30."""


class ProcessLost(ConnectionError):
    """Another process ended, or does not answer any more, while this one waited for it."""


def join(answer_minutes: float = ANSWER_MINUTES) -> None:
    """Join the other processes that torchrun started, until this one ends; nothing without it.

    answer_minutes: so long one of them may keep the others waiting; then they end with ProcessLost.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus and local >= gpus:
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: start torchrun with "
            f"--nproc-per-node {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if gpus:
        torch.cuda.set_device(local)
    # Each tensor takes the way of its device; plain Python objects take the CPU's. The limit of
    # the group is for exchanges of a GPU. Those of the CPU are watched here, and given up before
    # it; a process that has given one up ends when this limit is reached, not earlier.
    limit = timedelta(minutes=answer_minutes, seconds=5)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=limit)
    _waiting.seconds = 60 * answer_minutes
    _store().set(f"process {rank()}", f"process {rank()} ({os.getpid()} on {platform.node()})")
    atexit.register(dist.destroy_process_group)


def set_up(cfg: TrainingConfig) -> None:
    """What every training begins with: the other processes, the seed, the CPU threads.

    Failed in a process that imports the user's script again, as those do that are not forked.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise Failed(
            "this script starts a training when another process only imports it: put the training "
            'under `if __name__ == "__main__":`'
        )
    join(cfg.answer_minutes)
    pick_device(cfg.device)
    seed_all(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)


def seed_all(*numbers: int) -> None:
    """Seed PyTorch's generators from a tuple of numbers, on every device."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    torch.manual_seed(mixed)


def pick_device(name: str) -> torch.device:
    """The device of this name. ValueError, with those that there are, where it cannot be used."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        there = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(
            f"device={name!r} (--device) is not on this machine; there are {', '.join(there)}"
        ) from error
    return device


def rank() -> int:
    """0 for the process that prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass(slots=True)
class _Waiting:
    seconds: float = 60 * ANSWER_MINUTES
    """This process waits so long for the others."""
    exchange: int = 0
    """Number of the exchange it is at, which is the same in all of them."""


_waiting = _Waiting()


def hurry() -> None:
    """Wait HURRIED seconds at most from now on: somebody wants this process to stop."""
    _waiting.seconds = min(_waiting.seconds, HURRIED)


def _exchange(start: Callable[..., dist.Work | None], *args: Any, **options: Any) -> None:
    """Do an exchange of tensors. ProcessLost where one of the others fails or does not answer."""
    with _others_lost():
        work = start(*args, **options, async_op=True)
        assert work is not None
    _wait_for(work, any(_on_gpu(value) for value in args))


def _wait_for(work: dist.Work, on_gpu: bool) -> None:
    """Until an exchange is over. On the CPU the wait is cut in pieces, between which Python handles
    signals."""
    _waiting.exchange += 1
    begin = time.monotonic()
    with _others_lost():
        if on_gpu:
            work.wait()
            return
        while not _done(work):
            # Seen by those that give up on a silent process.
            _store().set(f"waits {rank()}", str(_waiting.exchange))
            if time.monotonic() - begin > _waiting.seconds:
                raise ProcessLost(f"{_silent()} did not answer for {_waiting.seconds:.0f} s")


@contextmanager
def _others_lost() -> Iterator[None]:
    """An exchange that fails has lost one of the others."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split(". ")[0]  # the rest is general advice
        raise ProcessLost(f"another process of this run has ended or failed ({reason})") from None


def _on_gpu(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(v, Tensor) and v.is_cuda for v in values)


def _done(work: dist.Work) -> bool:
    """Wait a second for an exchange; whether it is over."""
    try:
        work.wait(timedelta(seconds=1))
    except RuntimeError:
        if not work.is_completed():
            return False
        # It may have ended well while the wait ran out: asked again, it fails only if it has.
        work.wait()
    return True


def _store() -> dist.Store:
    """Where processes leave notes for each other: torchrun itself keeps it."""
    return dist.distributed_c10d._get_default_store()


def _silent() -> str:
    """The processes that do not wait for this exchange, by name."""
    store, silent = _store(), []
    for other in range(world()):
        key = f"waits {other}"
        if not store.check([key]) or int(store.get(key)) < _waiting.exchange:
            silent.append(store.get(f"process {other}").decode())
    return ", ".join(silent) or "another process"


def wait_for_all() -> None:
    """Until all processes are here."""
    if world() > 1:
        _exchange(dist.all_reduce, torch.zeros(1))


def in_turn(make: Callable[[], T]) -> T:
    """Call `make` in the first process, then in all the others."""
    if rank() > 0:
        wait_for_all()
    made = make()
    if rank() == 0:
        wait_for_all()
    return made


def replicate(model: nn.Module) -> nn.Module:
    """`model` in DistributedDataParallel: its backward pass adds up the gradients of all processes,
    bucket after bucket while it goes on. Alone, `model` itself.

    All weights and buffers become the first process's. A parameter that one process did not use
    counts as zero there; one that no process used keeps no gradient, as in a single process (stems
    and backbones of your own may have some). The buffers are not sent again: BatchNorm keeps its
    own in step. It is no static graph: PyTorch would then sort the buckets anew after the first
    step, and three or more processes add up in the order of a bucket, so that a resumed run would
    not be, bit for bit, the one that never stopped.
    """
    if world() == 1:
        return model
    # A group of its own: a bucket may be ready before or after the exchange of a BatchNorm.
    group = dist.new_group(timeout=timedelta(seconds=_waiting.seconds + 5))
    assert isinstance(group, dist.ProcessGroup)
    replica = DistributedDataParallel(
        model,
        process_group=group,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    replica.broadcast_buffers = False  # after the first time
    replica.register_comm_hook(_Sums(group, []), _sum_bucket)
    return replica


def kept_back(replica: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Where that is wanted, passes of `replica` in here leave their gradients with this process, to
    be added up with those of its next pass."""
    if wanted and isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return nullcontext()


@dataclass(slots=True)
class _Sums:
    group: dist.ProcessGroup
    on_their_way: list[dist.Work]


def _sum_bucket(sums: _Sums, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Start to add up a bucket, in its place; after the last one wait for all of them.

    DistributedDataParallel would wait where Python handles no signals. The sum is not divided:
    every process has divided its losses already.
    """
    buffer = bucket.buffer()
    with _others_lost():
        work = dist.all_reduce(buffer, group=sums.group, async_op=True)
        assert work is not None
        sums.on_their_way.append(work)
    while bucket.is_last() and sums.on_their_way:
        _wait_for(sums.on_their_way.pop(0), buffer.is_cuda)
    summed = torch.futures.Future[Tensor](devices=[buffer.device] if buffer.is_cuda else None)
    summed.set_result(buffer)
    return summed


def sum_in_place(tensors: list[Tensor]) -> None:
    """Replace every tensor by its sum over the processes."""
    if world() == 1:
        return
    flat = torch.cat([t.detach().flatten() for t in tensors])
    _exchange(dist.all_reduce, flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def gather_rows(row: Tensor) -> Tensor:
    """(n,) -> (world, n): the rows of all processes in rank order, the same everywhere."""
    if world() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(world())]
    _exchange(dist.all_gather, rows, row)
    return torch.stack(rows)


def any_process(flag: bool, device: torch.device) -> bool:
    """True everywhere when it is true anywhere."""
    value = torch.tensor([float(flag)], device=device)
    sum_in_place([value])
    return bool(value.item() > 0)


def from_first(value: Any) -> Any:
    """The first process's value, in every process."""
    if world() == 1:
        return value
    box = [value]
    wait_for_all()  # what follows cannot be interrupted
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_lists(values: list[Any]) -> list[Any]:
    """The processes' lists joined in rank order, in the first process; empty in the others."""
    if world() == 1:
        return values
    parts: list[Any] = [None] * world()
    wait_for_all()
    dist.gather_object(values, parts if rank() == 0 else None, dst=0)
    return [value for part in parts for value in part] if rank() == 0 else []


def fast_precision() -> Literal["auto", "bf16"]:
    """bf16 where the CPU computes with it and there is no GPU, which decides by itself."""
    # Newer than the oldest PyTorch that is supported.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = known.get("avx512_bf16") or known.get("amx_bf16")
    return "bf16" if native and not torch.cuda.is_available() else "auto"


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
