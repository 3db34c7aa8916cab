"""What an experiment found: tables, paired differences, curves, a json file."""

import copy
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mimdet.analysis.cost import cost_of
from mimdet.config import Config, from_dict, to_dict
from mimdet.experiments.grid import SLOTS, Arm, field_of, short_names, value_text
from mimdet.experiments.runs import PlannedRun, read_clock, read_lines
from mimdet.files import read_json, write_json

SCORES = {
    f"{kind}_{suffix}": (kind, name)
    for kind in ("box", "mask")
    for suffix, name in {
        "ap": "AP",
        "ap50": "AP50",
        "ap75": "AP75",
        "ap_small": "AP_small",
        "ap_medium": "AP_medium",
        "ap_large": "AP_large",
    }.items()
}
"""Column of a table -> where its number stands in a metrics dictionary."""


def result_rows(run: PlannedRun, per_image: float) -> list[dict[str, Any]]:
    """One row per sample ratio of a complete run: arm, seed, ratio, APs x 100, cost.

    per_image: FLOPs of training on one image.

    Below ratio 1 an AP is the mean over the draws and `box_draw_sd`, `mask_draw_sd` their standard
    deviation. NaN where there are no objects of a size, or no masks. Times are of the training,
    with its own evaluations; CPU seconds leave loader processes out.
    """
    clock = [row for step, row in read_clock(run.path).items() if step <= run.steps]
    t = run.cfg.training
    images = run.steps * t.batch_size * t.accumulate
    cost = {
        "steps": run.steps,
        "images": images,
        "wall_seconds": math.fsum(row["wall_seconds"] for row in clock),
        "cpu_seconds": math.fsum(row["cpu_seconds"] for row in clock),
        "flops": per_image * images,
    }
    key = {"arm": run.arm.label, **run.arm.values, "seed": run.seed}
    rows = []
    for row in run.rows():
        scores = {name: _mean(row["metrics"], *place) for name, place in SCORES.items()}
        spread = {f"{k}_draw_sd": 100 * row.get(f"{k}_ap_sd", math.nan) for k in ("box", "mask")}
        at = {"evaluate_ratio": row["sample_ratio"]}
        rows.append({**key, **at, **scores, **spread, "draws": row["draws"], **cost})
    return rows


def curve_rows(run: PlannedRun, per_image: float) -> list[dict[str, Any]]:
    """One row per step: epoch, seconds and FLOPs until then, loss, and AP x 100 where evaluated.

    per_image: FLOPs of training on one image. Seconds are the wall time of the steps alone.
    """
    key = {"arm": run.arm.label, **run.arm.values, "seed": run.seed}
    rows: dict[int, dict[str, Any]] = {}
    images, seconds = 0, 0.0
    for line in read_lines(run.path / "metrics.jsonl"):
        if "loss" in line:
            images += line["images"]
            seconds += line["time"]["seconds"]
            rows[line["step"]] = {
                **key,
                "step": line["step"],
                "epoch": images / run.images,
                "seconds": seconds,
                "flops": per_image * images,
                "loss": line["loss"],
                "box_ap": math.nan,
                "mask_ap": math.nan,
            }
        elif line["step"] in rows:
            for kind in ("box", "mask"):
                rows[line["step"]][f"{kind}_ap"] = _mean([line["evaluation"]], kind, "AP")
    return list(rows.values())


def training_flops(cfg: Config, size: tuple[int, int]) -> float:
    """FLOPs of training on one image of `size` = (height, width); NaN for a part of your own.

    Forward and backward pass take three times the forward pass; a multiply-add is two operations.
    The forward pass is counted at the ratio of the training, with the heads as in evaluation
    (`mimdet.analysis.cost`). A sampler is not counted, so one of your own is no obstacle.
    """
    cfg = copy.deepcopy(cfg)
    cfg.backbone.sampler = "random"
    if any(":" in field_of(cfg, name) for name in SLOTS):  # it need not run without numbers
        return math.nan
    return 6.0 * cost_of(cfg, size, cfg.backbone.sample_ratio).detector


def _mean(metrics: list[dict[str, Any]], kind: str, name: str) -> float:
    """Mean over the draws, x 100. None (no such object) and a missing kind are NaN."""
    values = [draw.get(kind, {}).get(name) for draw in metrics]
    known = [value for value in values if value is not None]
    return 100 * math.fsum(known) / len(known) if known else math.nan


LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the t-interval around it. NaN where there are too few values."""

    mean: float
    low: float
    high: float
    sd: float
    """Standard deviation of the values, with n - 1."""
    n: int


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean, t-interval and standard deviation of independent values; NaN values are left out."""
    known = [value for value in values if not math.isnan(value)]
    n = len(known)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0)
    mean = math.fsum(known) / n
    if n == 1:
        return Interval(mean, math.nan, math.nan, math.nan, 1)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1))
    half = t_quantile(n - 1, level) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], level: float = LEVEL
) -> Interval:
    """Mean of value - baseline over the seeds that both have, with its t-interval.

    What a seed does to both of them (order of the data, initial weights) cancels.
    """
    seeds = sorted(set(values) & set(baseline))
    return mean_interval([values[seed] - baseline[seed] for seed in seeds], level)


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t for which a Student variable of `degrees` lies in -t..t with probability `level`.

    The probability is a finite sum for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)
    and grows with the angle arctan(t / sqrt(degrees)), which is found by bisection.
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"degrees={degrees}, level={level}: need at least 1, and inside (0, 1)")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _probability(angle: float, degrees: int) -> float:
    """Share of Student's distribution within -t..t, where t = sqrt(degrees) x tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 + odd, degrees, 2):  # terms in cos, cos^3, ... or in 1, cos^2, ...
        total += term
        term *= power / (power + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


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
