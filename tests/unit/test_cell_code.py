"""The text of parts that were written in a notebook cell."""

import importlib

import pytest
import torch
from torch import Generator, Tensor, nn

from mimdet.models.sampling import Grid
from mimdet.models.stem import StemFeatures
from mimdet.training.slots import (
    _check_self_contained,
    load_slots,
    read_slots,
    save_slots,
    source_of,
)

CELL = """
import torch
from torch import nn

class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x

def strongest(tokens, grid, generator):
    return tokens.norm(dim=1)
"""


@pytest.fixture
def cell():
    """What a cell defines, run by IPython as a notebook runs it."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    assert shell.run_cell(CELL).success
    return shell.user_ns


def test_classes_and_functions_of_a_cell_are_found_and_run_again(cell, tmp_path) -> None:
    assert source_of(cell["Doubling"]).startswith("class Doubling(nn.Module):")
    assert "return 2 * x" in source_of(cell["Doubling"])
    save_slots(tmp_path, {"stem": cell["Doubling"](), "sampler": cell["strongest"]})
    slots = load_slots(tmp_path, trust_code=True)
    assert slots["stem"](torch.ones(1)).item() == 2
    assert slots["sampler"](torch.ones(3, 4), (1, 3), None).tolist() == [2, 2, 2]


def test_a_part_without_text_is_refused(tmp_path) -> None:
    made = type("Made", (torch.nn.Module,), {})
    with pytest.raises(ValueError, match="define it with def or class"):
        save_slots(tmp_path, {"stem": made()})


def test_a_text_that_is_not_what_runs_is_refused(tmp_path, monkeypatch) -> None:
    """Lines put above the part, or another value in it, since the file was imported."""
    text = """from __future__ import annotations
import math
from torch import Tensor, nn

class Twice(nn.Module):
    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return self.times * math.ceil(1.5) * y
        return inner(x)

def largest(tokens, grid, generator):
    def inner(y: Tensor) -> Tensor:
        return y.amax(dim=1)
    return inner(tokens)
"""
    file = tmp_path / "parts_of_mine.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    parts = importlib.import_module(file.stem)
    for changed in (text.replace("amax(dim=1)", "amax(dim=-1)"), "\n\n" + text):
        file.write_text(text)
        assert len(read_slots({"stem": parts.Twice, "sampler": parts.largest})) == 2
        file.write_text(changed)
        with pytest.raises(ValueError, match="sampler largest was changed since it was imported"):
            read_slots({"sampler": parts.largest})
    file.write_text(text.replace("* y", "+ y"))
    with pytest.raises(ValueError, match="stem Twice was changed"):
        read_slots({"stem": parts.Twice})


ALPHA = 2.0


def annotated(tokens: Tensor, grid: Grid, generator: Generator | None) -> Tensor:
    return tokens.norm(dim=1)


def defaulted(tokens, grid, generator, alpha=ALPHA):
    return alpha * tokens.norm(dim=1)


class Power:
    """A sampler with a setting."""

    def __init__(self, p=1.0):
        self.p = p

    def __call__(self, tokens, grid, generator):
        return self.p * tokens.norm(dim=1)


class Scaled:
    def __call__(self, tokens, grid, generator):
        return ALPHA * tokens.norm(dim=1)


class Longer(Power):
    pass


def test_what_would_not_load_again_is_refused_and_what_would_is_not(tmp_path) -> None:
    save_slots(tmp_path, {"sampler": annotated})
    assert load_slots(tmp_path, trust_code=True)["sampler"](torch.ones(2, 4), (1, 2), None).sum()
    for part, outside in ((defaulted, "ALPHA"), (Scaled(), "ALPHA"), (Longer(), "Power")):
        with pytest.raises(ValueError, match=f"uses {outside} from outside itself"):
            read_slots({"sampler": part})
    assert read_slots({"sampler": Power()})["sampler"].kind == "class"
    with pytest.raises(ValueError, match=r"Power\(\) made without arguments differs in p"):
        read_slots({"sampler": Power(p=-1.0)})


def test_a_stem_of_other_sizes_than_its_class_makes_is_refused() -> None:
    assert read_slots({"stem": Wide()})
    with pytest.raises(ValueError, match=r"Wide\(\) made without arguments differs in "):
        read_slots({"stem": Wide(48)})


def test_reading_a_part_draws_no_numbers() -> None:
    part = Wide()
    state = torch.get_rng_state()
    read_slots({"stem": part})
    assert torch.equal(torch.get_rng_state(), state)


class Wide(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.c2 = nn.Conv2d(3, dim // 4, 4, 4)

    def forward(self, images: Tensor) -> StemFeatures:
        return StemFeatures(self.c2(images), images, images)


def test_what_a_function_imports_inside_is_its_own_and_what_it_does_not_is_refused(tmp_path):
    names = {"os": object(), "SCALE": 2}  # the notebook has names of its own
    text = "def f(x):\n    import os\n    return [len(os.sep) * x * SCALE for _ in range(2)]\n"
    exec(text, names)
    with pytest.raises(ValueError, match="uses SCALE from outside itself"):
        _check_self_contained("sampler", names["f"])
    exec(text.replace("SCALE", "3"), names)
    _check_self_contained("sampler", names["f"])
    assert names["f"](1) == [3, 3]
