"""Work done ahead of time in other processes, in order.

PyTorch's DataLoader does it. What is added: a result travels as one block of shared memory, because
every shared tensor holds a file descriptor, and a step of 64 images (pixels, boxes, labels, masks)
would use up the usual 1,024 of them; and loader processes leave Ctrl-C to the training process.
"""

import io
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

Packed = tuple[Tensor, list[tuple[torch.dtype, torch.Size]], bytes]
"""All bytes of all tensors; their types and shapes; everything else, pickled."""


def stream(keys: Iterable[Any], task: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    """task(key) for every key, in order, computed here (workers=0) or in `workers` processes.

    task must be picklable, and so must keys and results. Keys are taken as they are needed.
    """
    if not workers:
        yield from map(task, keys)
        return
    loader: DataLoader[Any] = DataLoader(
        _PackedTask(task),  # type: ignore[arg-type]  # [key] is all that is asked of a data set
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start,
        generator=torch.Generator(),  # else a number is drawn from the global generator
    )
    for packed in loader:
        yield unpack(packed)


def pack(value: Any) -> Packed:
    """Any picklable object -> its tensors in one (n,) uint8 block, and the rest."""
    rest = io.BytesIO()
    pickler = _Pickler(rest, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dump(value)
    parts = []
    for tensor in pickler.tensors:
        flat = tensor.contiguous().flatten().view(torch.uint8)
        parts += [flat, torch.zeros(-len(flat) % 8, dtype=torch.uint8)]  # keeps 8-byte alignment
    block = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
    return block, [(tensor.dtype, tensor.shape) for tensor in pickler.tensors], rest.getvalue()


def unpack(packed: Packed) -> Any:
    """The object again; its tensors are views of the block."""
    block, kinds, rest = packed
    tensors = []
    start = 0
    for dtype, shape in kinds:
        size = shape.numel() * dtype.itemsize
        tensors.append(block[start : start + size].view(dtype).view(shape))
        start += size + -size % 8
    return _Unpickler(io.BytesIO(rest), tensors).load()


class _Pickler(pickle.Pickler):
    """Sets tensors aside and leaves their number in their place."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        return self.tensors[pid]


class _PackedTask:
    def __init__(self, task: Callable[[Any], Any]) -> None:
        self.task = task

    def __getitem__(self, key: Any) -> Packed:
        return pack(self.task(key))


def _start(_: int) -> None:
    """Ctrl-C reaches the whole process group: the training process alone decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not a handler inherited from training


def _as_it_is(value: Any) -> Any:
    return value
