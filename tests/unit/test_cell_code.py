"""The text of parts that were written in a notebook cell."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from mimdet.config import Config
from mimdet.models.sampling import Grid
from mimdet.models.stem import StemFeatures
from mimdet.training.slots import load_slots, read_slots, source_of, write_slots

CELL = """
import torch
from torch import nn
from mimdet.models.rcnn import Losses

class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x

class HalfBoxes(Losses):
    def boxes(self, deltas, truth):
        return super().boxes(deltas, truth) / 2

def strongest(tokens, grid, generator):
    return tokens.norm(dim=1)
"""


@pytest.fixture
def cell() -> dict[str, Any]:
    """What a cell defines, run by IPython as a notebook runs it."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    assert shell.run_cell(CELL).success
    return shell.user_ns


def kept(folder: Path, **parts: Any) -> dict[str, Any]:
    """The parts as a run makes them again."""
    write_slots(folder, read_slots(parts))
    return load_slots(folder, Config(), trust_code=True)


def test_classes_and_functions_of_a_cell_are_found_and_run_again(cell, tmp_path) -> None:
    assert source_of(cell["Doubling"]).startswith("class Doubling(nn.Module):")
    parts = {"stem": cell["Doubling"](), "sampler": cell["strongest"], "loss": cell["HalfBoxes"]()}
    slots = kept(tmp_path, **parts)
    assert slots["stem"](torch.ones(1)).item() == 2
    assert slots["sampler"](torch.ones(3, 4), (1, 3), None).tolist() == [2, 2, 2]
    assert slots["loss"].boxes(torch.ones(1, 4), torch.zeros(1, 4)) == 2
    with pytest.raises(PermissionError, match="trust_code=True"):
        load_slots(tmp_path, Config(), trust_code=False)


ALPHA = 2.0


def annotated(tokens: Tensor, grid: Grid, generator: Generator | None) -> Tensor:
    """What it imports inside is its own, whatever the notebook calls by that name."""
    import os

    def inner(x: Tensor) -> Tensor:
        return x.norm(dim=len(os.sep))

    return inner(tokens)


def defaulted(tokens, grid, generator, alpha=ALPHA):
    return alpha * tokens.norm(dim=1)


def inside(tokens, grid, generator):
    return [ALPHA * token.norm() for token in tokens]


def enclosing():
    beta = 3.0

    def closed(tokens, grid, generator):
        return beta * tokens

    return closed


class Power:
    """A sampler with a setting."""

    def __init__(self, p=1.0):
        self.p = p

    def __call__(self, tokens, grid, generator):
        return self.p * tokens.norm(dim=1)


class Longer(Power):
    pass


class Wide(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.c2 = nn.Conv2d(3, dim // 4, 4, 4)

    def forward(self, images: Tensor) -> StemFeatures:
        return StemFeatures(self.c2(images), images, images)


class Needy:
    def __init__(self, dim: int) -> None:
        self.dim = dim


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (defaulted, "uses ALPHA from outside itself"),
        (inside, "uses ALPHA from outside itself"),
        (enclosing(), "uses beta from outside itself"),
        (Longer(), "uses Power from outside itself"),
        (Needy(3), "'dim'.*give every constructor argument a default"),
        (Power(p=-1.0), r"Power\(\) made without arguments differs in p"),
        (Wide(48), r"Wide\(\) made without arguments differs in "),
        (type("Made", (nn.Module,), {})(), "define it with def or class"),
    ],
)
def test_what_would_not_load_again_as_it_is_is_refused(part, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_slots({"stem": part})


def test_what_stands_on_its_own_is_kept_and_reading_it_draws_no_numbers(tmp_path) -> None:
    parts = {"sampler": Power(), "stem": Wide()}
    state = torch.get_rng_state()
    assert read_slots(parts).keys() == parts.keys()
    assert torch.equal(torch.get_rng_state(), state)
    sampler = kept(tmp_path, sampler=annotated)["sampler"]
    assert sampler(torch.ones(2, 4), (1, 2), None).tolist() == [2, 2]
