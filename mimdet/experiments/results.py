"""What an experiment found: tables, paired differences, curves, a json file."""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from mimdet.config import Config, to_dict
from mimdet.experiments.grid import Arm, short_names, value_text
from mimdet.experiments.intervals import LEVEL, Interval, mean_interval, paired_difference
from mimdet.experiments.measures import SCORES, curve_rows, result_rows, training_flops
from mimdet.experiments.plan import PlannedRun
from mimdet.files import write_json

TITLES = {"box_ap": "box AP", "mask_ap": "mask AP"}


@dataclass
class Experiment:
    """A finished call of `experiment`. All APs are x 100."""

    folder: Path
    """Holds one run directory per arm and seed."""
    base: Config
    arms: list[Arm]
    seeds: list[int]
    runs: list[PlannedRun]
    errors: dict[str, str]
    """Run that failed -> why. It is missing in the tables."""
    command: str
    """The call, for the record."""

    @property
    def fields(self) -> list[str]:
        """Dotted names of the fields in which the arms differ."""
        return list(self.arms[0].values)

    @property
    def ratios(self) -> list[float]:
        """Sample ratios of the evaluation."""
        return sorted({ratio for run in self.runs for ratio in run.ratios})

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per complete run and evaluation ratio; columns as `measures.result_rows` says."""
        complete = [run for run in self.runs if run.complete()]
        rows = [row for run in complete for row in result_rows(run, self._flops[run.arm.label])]
        return pd.DataFrame(rows)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """One row per step of every complete run; columns as `measures.curve_rows` says."""
        complete = [run for run in self.runs if run.complete()]
        rows = [row for run in complete for row in curve_rows(run, self._flops[run.arm.label])]
        return pd.DataFrame(rows)

    @cached_property
    def _flops(self) -> dict[str, float]:
        """Arm with a complete run -> FLOPs of training on one image."""
        first = {run.arm.label: run for run in self.runs if run.complete()}
        return {label: training_flops(run.cfg, run.size) for label, run in first.items()}

    # -------------------------------------------------------------- statistics

    def scores(self, arm: str, ratio: float, metric: str = "box_ap") -> dict[int, float]:
        """Seed -> score of one arm at one evaluation ratio."""
        if metric not in self.table:
            raise ValueError(f"metric={metric!r}: use one of {[*SCORES, 'wall_seconds']}")
        if arm not in [known.label for known in self.arms]:
            raise ValueError(f"no arm {arm!r}; there are {[known.label for known in self.arms]}")
        chosen = self.table[(self.table["arm"] == arm) & (self.table["evaluate_ratio"] == ratio)]
        return dict(zip(chosen["seed"].tolist(), chosen[metric].tolist(), strict=True))

    def difference(
        self, one: tuple[str, float], other: tuple[str, float], metric: str = "box_ap"
    ) -> Interval:
        """Paired over seeds: `one` - `other`, each an arm's label and an evaluation ratio."""
        return paired_difference(self.scores(*one, metric), self.scores(*other, metric))

    def summary(self, metric: str = "box_ap") -> pd.DataFrame:
        """One row per arm and evaluation ratio.

        mean, low, high, sd, n: over seeds, with the 95 % t-interval of the mean. difference,
        difference_low, difference_high, pairs: to the first arm at the same ratio, paired by seed
        (NaN for the first arm itself). An arm without a complete run has n = 0.
        """
        first = self.arms[0]
        rows = []
        for arm in self.arms:
            for ratio in self.ratios_of(arm):
                own = mean_interval(list(self.scores(arm.label, ratio, metric).values()))
                row = {"arm": arm.label, **arm.values, "evaluate_ratio": ratio, **own._asdict()}
                change = Interval(math.nan, math.nan, math.nan, math.nan, 0)
                if arm is not first:
                    change = self.difference((arm.label, ratio), (first.label, ratio), metric)
                row |= {
                    "difference": change.mean,
                    "difference_low": change.low,
                    "difference_high": change.high,
                    "pairs": change.n,
                }
                rows.append(row)
        return pd.DataFrame(rows)

    def ratios_of(self, arm: Arm) -> list[float]:
        return sorted({ratio for run in self.runs if run.arm is arm for ratio in run.ratios})

    # -------------------------------------------------------------- text and files

    def markdown(self, metrics: Sequence[str] = ("box_ap", "mask_ap")) -> str:
        """The summary as a Markdown table, and below it what failed."""
        short = short_names(self.fields)
        summaries = [self.summary(metric) for metric in metrics]
        heads = [*short.values(), "evaluated at"]
        heads += [title_of(metric) for metric in metrics]
        heads += [f"difference in {title_of(metric)}" for metric in metrics]
        heads += ["seeds", "minutes a run"]
        lines = [_line(heads), _line(["---"] * len(heads))]
        for i in range(len(summaries[0])):
            rows = [summary.iloc[i] for summary in summaries]
            cells = [value_text(rows[0][name]) for name in short]
            cells.append(f"{rows[0]['evaluate_ratio']:g}")
            cells += [mean_text(row["mean"], row["sd"]) for row in rows]
            cells += [difference_text(row) for row in rows]
            cells += [str(rows[0]["n"]), self._minutes(str(rows[0]["arm"]))]
            lines.append(_line(cells))
        lines += ["", self._legend()]
        lines += [f"\nFailed: {name}: {error}" for name, error in self.errors.items()]
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def to_json(self, path: str | Path) -> None:
        """Everything behind the tables: call, configuration, machine, versions, data, results."""
        environments = {run.name: _environment(run) for run in self.runs}
        known = [environment for environment in environments.values() if environment]
        content = {
            "command": self.command,
            "hardware": hardware_text(known[0] if known else {}),
            "environment": known[0] if known else {},
            "data": sorted({str(environment["data"]) for environment in known}),
            "seeds": self.seeds,
            "base": to_dict(self.base),
            "arms": {arm.label: arm.values for arm in self.arms},
            "rows": _plain(self.table),
            "summary": {m: _plain(self.summary(m)) for m in TITLES},
            "curves": _plain(self.curves[self.curves["box_ap"].notna()]),
            "errors": self.errors,
        }
        write_json(path, content)

    def _minutes(self, arm: str) -> str:
        seconds = self.table[self.table["arm"] == arm]["wall_seconds"]
        return f"{seconds.mean() / 60:.1f}" if len(seconds) else "-"

    def _legend(self) -> str:
        return (
            "AP × 100, mean ± standard deviation over seeds. Difference: to "
            f"{self.arms[0].label} at the same evaluation ratio, paired by seed, with its "
            f"{LEVEL:.0%} t-interval."
        )


# ------------------------------------------------------------------------------- small parts


def title_of(metric: str) -> str:
    """`mask_ap_small` -> `mask AP small`."""
    return TITLES.get(metric, metric.replace("_", " ").replace(" ap", " AP"))


def mean_text(mean: float, sd: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.1f}" if math.isnan(sd) else f"{mean:.1f} ± {sd:.1f}"


def difference_text(row: Any) -> str:
    """`+1.2 [+0.4, +2.0]`; without the interval where there is one pair only."""
    if math.isnan(row["difference"]):
        return "-"
    mean, low, high = (
        f"{round(row[name], 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0
        for name in ("difference", "difference_low", "difference_high")
    )
    return mean if math.isnan(row["difference_low"]) else f"{mean} [{low}, {high}]"


def hardware_text(environment: dict[str, Any]) -> str:
    """`2 CPU cores (name); NVIDIA H100`, of this machine and the GPUs a run saw."""
    information = Path("/proc/cpuinfo")  # Linux; elsewhere Python's own word
    name = platform.processor() or platform.machine()
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    return "; ".join([f"{os.cpu_count()} CPU cores ({name})", *environment.get("gpus", [])])


def _environment(run: PlannedRun) -> dict[str, Any]:
    """What the run recorded when it began; empty when it never did."""
    file = run.path / "environment.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for json: NaN becomes None."""
    rows = table.to_dict("records")
    return [
        {str(k): None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
