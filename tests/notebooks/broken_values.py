"""Wrong values of the kinds that conditions of sanity checks are made of."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def broken(value: Any, signed: bool = True) -> Iterator[Any]:
    """Values of the same kind, nearly all of them wrong. signed: also other signs."""
    if isinstance(value, (bool, np.bool_)):
        yield not value
    elif isinstance(value, (int, float, np.number)):
        yield from (value + 1, 2 * value + 1, 0 * value)
        yield from (value - 1, -value - 1) if signed or value < 0 else ()
    elif isinstance(value, (str, bytes)):
        yield from (value + (b"?" if isinstance(value, bytes) else "?"), value[:-1], value[:0])
    elif isinstance(value, torch.Tensor):
        yield from _tensors(value.detach(), signed)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield from (t.numpy() for t in _tensors(torch.from_numpy(value.copy()), signed))
    elif hasattr(value, "_replace"):  # a named tuple
        for name, own in value._asdict().items():
            yield from (value._replace(**{name: wrong}) for wrong in broken(own))
    elif isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        yield from map(kind, _lists(list(value)))
    elif isinstance(value, (set, frozenset)):
        yield from (value | {object()}, set(list(value)[1:]), set())
    elif isinstance(value, dict):
        yield from ({}, {**value, "?": None}, dict.fromkeys(value, next(iter(value.values()), 0)))
        for key in list(value)[:50]:
            yield from ({**value, key: wrong} for wrong in broken(value[key]))
    else:
        yield object()
        yield from _objects(value)


def _tensors(value: torch.Tensor, signed: bool) -> Iterator[torch.Tensor]:
    if value.dtype == torch.bool:
        yield ~value
    elif value.dtype != torch.uint8:
        yield from (2 * value + 1, 0 * value, *([-value - 1] if signed else []))
    if value.numel():
        one = value.clone(memory_format=torch.contiguous_format)
        first = one.view(-1)
        first[0] = ~first[0] if value.dtype == torch.bool else first[0] + 1
        yield one
    if value.is_floating_point():
        far = torch.arange(value.numel()).view(value.shape)
        yield from (value + far, *([value - 1000 * far] if signed else []))
    if value.dim():
        yield from (value[1:], torch.cat([value, value[:1]]))


def _lists(items: list[Any]) -> Iterator[list[Any]]:
    yield from ([], items + (items[:1] or [None]))
    if items:
        yield from (items[1:], items[:-1], items[::-1], items[:1] * len(items))
        for i in {0, len(items) - 1}:
            yield from ([*items[:i], wrong, *items[i + 1 :]] for wrong in broken(items[i]))


def _objects(value: Any) -> Iterator[Any]:
    """Of a data class, each field broken; of what has a length and places, its reverse."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            for wrong in broken(getattr(value, field.name)):
                changed = copy.copy(value)
                object.__setattr__(changed, field.name, wrong)
                yield changed
    elif hasattr(value, "iloc"):  # a table, or a column of one
        yield from (value.iloc[1:], value.iloc[::-1])
        with contextlib.suppress(TypeError):  # not of numbers
            yield value + 1
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__") and len(value) <= 64:
        with contextlib.suppress(LookupError, TypeError):  # its places are no numbers
            yield [value[i] for i in reversed(range(len(value)))]
