"""Several processes that train or evaluate one model together (`torchrun -m mimdet ...`).

Each process holds the whole model and works on its share of the data; what they exchange is sums.
Alone (no torchrun) every function here does nothing, so callers need no special case. With several
processes all of them must call the same functions in the same order.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class ProcessLost(ConnectionError):
    """Another process ended, or cannot be reached, while this one waited for its answer."""


def join() -> None:
    """Join the other processes that torchrun started; nothing to do without torchrun."""
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
    # Each tensor takes the way of its device; plain Python objects take the CPU's.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """0 for the process that prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_of_torchrun() -> bool:
    """Whether this process reports to the user; known before and after the others are joined."""
    return os.environ.get("RANK", "0") == "0"


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def _answers() -> Iterator[None]:
    """Turns the many errors of a broken connection into one."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split(". ")[0]  # the rest is general advice
        raise ProcessLost(f"another process of this run has ended or failed ({reason})") from None


def wait_for_all() -> None:
    if world() > 1:
        with _answers():
            dist.barrier()


def in_turn(make: Callable[[], T]) -> T:
    """Call `make` in the first process, then in all the others."""
    if rank() == 0:
        made = make()
        wait_for_all()
        return made
    wait_for_all()
    return make()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in one exchange a step.

    A parameter that one process did not use counts as zero there; one that no process used keeps no
    gradient, as in a single process. This is what DistributedDataParallel does, but without a
    wrapper around the model, hooks in the backward pass, or a flag for unused parameters (custom
    stems and backbones may have some), and a step can be abandoned anywhere. Measured on the tiny
    preset, both take the same time; DDP would gain where the gradients take as long to travel as
    the last backward pass takes to compute.
    """
    if world() == 1:
        return
    parameters = list(parameters)
    used = torch.tensor([float(p.grad is not None) for p in parameters]).to(parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    sum_in_place([*gradients, used])
    for parameter, gradient, users in zip(parameters, gradients, used.tolist(), strict=True):
        parameter.grad = gradient if users else None


def sum_in_place(tensors: list[Tensor]) -> None:
    """Replace every tensor by its sum over the processes."""
    if world() == 1:
        return
    flat = torch.cat([t.detach().flatten() for t in tensors])
    with _answers():
        dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def gather_rows(row: Tensor) -> Tensor:
    """(n,) -> (world, n): the rows of all processes in rank order, the same everywhere."""
    if world() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(world())]
    with _answers():
        dist.all_gather(rows, row)
    return torch.stack(rows)


def copy_first(tensors: Iterable[Tensor]) -> None:
    """Make every tensor equal to the first process's."""
    if world() == 1:
        return
    for tensor in tensors:
        first = tensor.detach().contiguous()
        with _answers():
            dist.broadcast(first, src=0)
        tensor.detach().copy_(first)


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
    with _answers():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_lists(values: list[Any]) -> list[Any]:
    """The processes' lists joined in rank order, in the first process; empty in the others."""
    if world() == 1:
        return values
    parts: list[Any] = [None] * world()
    with _answers():
        dist.gather_object(values, parts if rank() == 0 else None, dst=0)
    return [value for part in parts for value in part] if rank() == 0 else []


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
