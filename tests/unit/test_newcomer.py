"""A newcomer's six changes, as notebook 10 shows them: few lines, trained, kept, compared."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mimdet
from mimdet.config import Config
from mimdet.experiments.experiment import experiment
from tests.small import small

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "py" / "10_your_own_idea.py"
LINES = 10
EXAMPLES = {
    "sampler": "strongest",
    "stem": "PoolStem",
    "neck": "TopDown",
    "fill": "MeanFill",
    "loss": "SmoothBoxes",
    "dataset": "foggy",
}
"""Slot -> the notebook's function or class."""
IMPORTS = """
import torch
import torch.nn.functional as F
from torch import nn
from mimdet.models.rcnn import Losses
from mimdet.models.stem import StemFeatures
"""


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Slot -> the text of the notebook's example."""
    source = NOTEBOOK.read_text(encoding="utf-8")
    nodes = (ast.FunctionDef, ast.ClassDef)
    found = {node.name: node for node in ast.parse(source).body if isinstance(node, nodes)}
    return {
        slot: ast.get_source_segment(source, found[name]) or "" for slot, name in EXAMPLES.items()
    }


@pytest.fixture(scope="module")
def cell(texts, tmp_path_factory) -> ModuleType:
    """The examples in a file, where their text is found again as it is in a notebook."""
    folder = tmp_path_factory.mktemp("cell")
    (folder / "newcomer_cell.py").write_text("\n\n\n".join([IMPORTS, *texts.values()]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module("newcomer_cell")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[float]:
    """The losses with the library's own parts."""
    return [step.loss for step in mimdet.train(config(), tmp_path_factory.mktemp("plain") / "run")]


def config() -> Config:
    """The small one with the widths that the examples have by default."""
    cfg = small(2)
    cfg.backbone.embed_dim, cfg.backbone.decoder_dim, cfg.detector.channels = 128, 96, 48
    cfg.data.short_sides = (64,)
    cfg.training.evaluate_every_steps = 0
    return cfg


@pytest.mark.parametrize("slot", EXAMPLES)
def test_an_example_is_short_trains_and_comes_back(slot, texts, cell, plain, tmp_path) -> None:
    assert sum(bool(line.strip()) for line in texts[slot].splitlines()) <= LINES
    part = getattr(cell, EXAMPLES[slot])
    made = part() if isinstance(part, type) else part
    losses = [step.loss for step in mimdet.train(config(), tmp_path / "own", **{slot: made})]
    assert len(losses) == 2 and losses != plain  # it is used
    with pytest.raises(PermissionError, match="trust_code=True"):
        mimdet.load_detector(tmp_path / "own")
    model = mimdet.load_detector(tmp_path / "own", trust_code=True)
    again = mimdet.train(config(), tmp_path / "own", **{slot: made})
    assert list(again) == []  # the same code is the same run
    assert torch.isfinite(model.detect([torch.zeros(3, 64, 64, dtype=torch.uint8)])[0].boxes).all()


def test_examples_are_arms_of_an_experiment_on_own_data(cell, tmp_path) -> None:
    """Each against the library's part, on the data set from the cell."""
    fields = {
        "backbone.sampler": ("random", cell.strongest),
        "backbone.stem": ("conv", cell.PoolStem),
        "detector.neck": ("fpn", cell.TopDown),
        "backbone.decoder_fill": ("stem", cell.MeanFill),
        "detector.loss": ("mask_rcnn", cell.SmoothBoxes),
    }
    arms = [{"data.source": cell.foggy}]
    arms += [{"data.source": cell.foggy, name: own} for name, (_, own) in fields.items()]
    result = experiment(config(), arms, seeds=1, name="own", runs=tmp_path)
    assert result.errors == {} and len(result.table) == 6
    rows = result.table.set_index("arm")
    for arm, (name, (ours, own)) in zip(result.arms[1:], fields.items(), strict=True):
        assert rows.loc[arm.label, name] == own.__name__
        assert result.arms[0].values[name] == ours
    assert set(rows["data.source"]) == {"foggy"}
    final = result.curves.groupby("arm")["loss"].last()
    assert final.nunique() == 6  # six trainings
