"""The text of parts that were written in a notebook cell."""

import importlib

import pytest
import torch

from mimdet.training.cell_code import (
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
from dataclasses import dataclass
from torch import Tensor, nn

@dataclass
class Twice(nn.Module):
    times: int = 2
    def __post_init__(self):
        super().__init__()
    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return self.times * y
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
    file.write_text(text.replace("self.times * y", "self.times + y"))
    with pytest.raises(ValueError, match="stem Twice was changed"):
        read_slots({"stem": parts.Twice})


def test_what_a_function_imports_inside_is_its_own_and_what_it_does_not_is_refused(tmp_path):
    names = {"os": object(), "SCALE": 2}  # the notebook has names of its own
    text = "def f(x):\n    import os\n    return [len(os.sep) * x * SCALE for _ in range(2)]\n"
    exec(text, names)
    with pytest.raises(ValueError, match="uses SCALE from outside itself"):
        _check_self_contained("sampler", names["f"])
    exec(text.replace("SCALE", "3"), names)
    _check_self_contained("sampler", names["f"])
    assert names["f"](1) == [3, 3]
