"""Several processes that train or evaluate one model together (`torchrun -m mimdet ...`).

Each process holds the whole model and works on its share of the data; what they exchange is sums.
Alone (no torchrun) every function here does nothing, so callers need no special case.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def join() -> None:
    """Join the other processes that torchrun started; nothing to do without torchrun."""
    if "RANK" in os.environ and not dist.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo")


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


def wait_for_all() -> None:
    if world() > 1:
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
    """Add up the gradients of all processes, in one exchange. A missing gradient counts as zero."""
    if world() == 1:
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_in_place([p.grad for p in parameters if p.grad is not None])


def average_buffers(model: nn.Module) -> None:
    """Make the running statistics of BatchNorm the mean over all processes."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if world() > 1 and buffers:
        sum_in_place(buffers)
        for buffer in buffers:
            buffer /= world()


def sum_in_place(tensors: list[Tensor]) -> None:
    """Replace every tensor by its sum over the processes."""
    if world() == 1:
        return
    flat = torch.cat([t.detach().flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


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
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_lists(values: list[Any]) -> list[Any]:
    """The processes' lists joined in rank order, in the first process; empty in the others."""
    if world() == 1:
        return values
    parts: list[Any] = [None] * world()
    dist.gather_object(values, parts if rank() == 0 else None, dst=0)
    return [value for part in parts for value in part] if rank() == 0 else []
