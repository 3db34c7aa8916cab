"""A finished experiment read back from its json, for tables and figures without its runs."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from mimdet.config import from_dict
from mimdet.experiments.grid import Arm
from mimdet.experiments.results import Experiment
from mimdet.files import read_json


class StoredExperiment(Experiment):
    """What `Experiment.to_json` wrote; every table and figure of an experiment works.

    Its curves hold the evaluations only: the losses stay with the runs.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ValueError naming the file when it is not the json of an experiment."""
        content = read_json(path)
        needed = {"rows", "arms", "seeds", "base", "command", "errors"}
        missing = sorted(needed - set(content)) if isinstance(content, dict) else sorted(needed)
        if missing:
            raise ValueError(f"{path} is not the result of an experiment: it has no {missing}")
        base = from_dict(content["base"])
        arms = [Arm(label, _tuples(values), base) for label, values in content["arms"].items()]
        errors, command = content["errors"], content["command"]
        super().__init__(Path(path).parent, base, arms, content["seeds"], [], errors, command)
        self.content: dict[str, Any] = content
        """The whole file: hardware, versions, data."""

    @property
    def ratios(self) -> list[float]:
        return sorted(self.table["evaluate_ratio"].unique())

    @cached_property
    def table(self) -> pd.DataFrame:
        return _numbers(self.content["rows"])

    @cached_property
    def curves(self) -> pd.DataFrame:
        return _numbers(self.content.get("curves", []))

    def ratios_of(self, arm: Arm) -> list[float]:
        """Of an arm whose every run failed: those of the others."""
        own = self.table[self.table["arm"] == arm.label]["evaluate_ratio"]
        return sorted(own.unique()) or self.ratios


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Values of an arm, whose tuples the json holds as lists."""
    return {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}


def _numbers(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows of the json, whose None stands for NaN in columns of numbers."""
    table = pd.DataFrame(rows)
    known = table.infer_objects()
    return known.where(known.notna(), float("nan")) if len(table) else table
