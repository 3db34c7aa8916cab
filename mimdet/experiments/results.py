"""What an experiment found: tables, paired differences, curves, a json file."""

import copy
import math
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mimdet.analysis.cost import cost_of, markdown_table
from mimdet.config import Config, flat, from_dict, to_dict
from mimdet.console import Failed
from mimdet.experiments.runs import Arm, PlannedRun, passes, short_names, value_text
from mimdet.files import read_json, write_json
from mimdet.training.checkpoints import MetricsFile

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
SCORES = {f"{kind}_{name.lower()}": (kind, name) for kind in ("box", "mask") for name in NAMES}
"""Column of a table -> where its number is in a metrics dictionary."""
TITLES = {"box_ap": "box AP", "mask_ap": "mask AP"}
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the t-interval around it. NaN where there are too few values."""

    mean: float
    low: float
    high: float
    sd: float
    """Standard deviation of the values, with n - 1."""
    n: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean, 95 % t-interval and standard deviation of independent values; NaN is left out."""
    known = [value for value in values if not math.isnan(value)]
    n = len(known)
    mean = statistics.fmean(known) if known else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, math.nan, n)
    sd = statistics.stdev(known)
    half = t_quantile(n - 1) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def t_quantile(degrees: int) -> float:
    """The t for which a Student variable of `degrees` lies in -t..t with probability LEVEL.

    With t = sqrt(degrees) x tan(angle), the density is cos(angle)^(degrees - 1), summed up here.
    Right to 7 digits.
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    middles = (angles[1:] + angles[:-1]) / 2
    share = np.append(0, np.cumsum(np.cos(middles) ** (degrees - 1)))
    angle = float(np.interp(LEVEL, share / share[-1], angles))
    return math.sqrt(degrees) * math.tan(angle)


# ------------------------------------------------------------------------------- the result


@dataclass
class Experiment:
    """What a call of `experiment` found, or the json that it wrote. All APs are x 100."""

    folder: Path
    """Holds one run directory per arm and seed; of a json, the folder in which it lies."""
    base: Config
    arms: list[Arm]
    seeds: list[int]
    table: pd.DataFrame
    """One row per complete run and evaluation ratio; columns as `result_rows` says."""
    curves: pd.DataFrame
    """One row per step of every complete run; columns as `curve_rows` says. A json holds the
    evaluations only: the losses stay with the runs."""
    errors: dict[str, str]
    """Run that failed -> why. It is missing in the tables."""
    command: str
    """The call, for the record."""
    about: dict[str, Any]
    """{"hardware", "environment", "data"} of the trainings, "code": label -> slot -> text's address
    of arms with code of your own."""

    @property
    def fields(self) -> list[str]:
        """Dotted names of the fields in which the arms differ."""
        return list(self.arms[0].values)

    @property
    def ratios(self) -> list[float]:
        """Sample ratios of the evaluation."""
        return sorted(set(self.table["evaluate_ratio"].tolist()))

    # -------------------------------------------------------------- statistics

    def scores(self, arm: str, ratio: float, metric: str = "box_ap") -> dict[int, float]:
        """Seed -> score of one arm at one evaluation ratio."""
        labels = [known.label for known in self.arms]
        if arm not in labels:
            raise ValueError(f"no arm {arm!r}; there are {labels}")
        chosen = self.table[(self.table["arm"] == arm) & (self.table["evaluate_ratio"] == ratio)]
        return dict(zip(chosen["seed"].tolist(), chosen[metric].tolist(), strict=True))

    def difference(
        self, one: tuple[str, float], other: tuple[str, float], metric: str = "box_ap"
    ) -> Interval:
        """`one` - `other`, each an arm's label and an evaluation ratio, over the seeds of both.

        Paired: what a seed does to both of them (order of the data, initial weights) cancels.
        """
        values, baseline = self.scores(*one, metric), self.scores(*other, metric)
        return mean_interval([values[seed] - baseline[seed] for seed in values if seed in baseline])

    def summary(self, metric: str = "box_ap") -> pd.DataFrame:
        """One row per arm and evaluation ratio.

        mean, low, high, sd, n: over seeds, with the 95 % t-interval of the mean. difference,
        difference_low, difference_high, pairs: to the first arm at the same ratio, paired by seed
        (NaN for the first arm itself). An arm without a complete run has n = 0.
        """
        first = self.arms[0].label
        rows = []
        for arm in self.arms:
            own_rows = self.table[self.table["arm"] == arm.label]
            for ratio in sorted(set(own_rows["evaluate_ratio"].tolist())) or self.ratios:
                own = mean_interval(list(self.scores(arm.label, ratio, metric).values()))
                change = mean_interval([])
                if arm.label != first:
                    change = self.difference((arm.label, ratio), (first, ratio), metric)
                rows.append(
                    {"arm": arm.label, **arm.values, "evaluate_ratio": ratio, **own._asdict()}
                    | {"difference": change.mean, "difference_low": change.low}
                    | {"difference_high": change.high, "pairs": change.n}
                )
        return pd.DataFrame(rows)

    # -------------------------------------------------------------- text and files

    def markdown(self, metrics: Sequence[str] = ("box_ap", "mask_ap")) -> str:
        """The summary as a Markdown table, and below it what failed."""
        minutes = self.table.groupby("arm")["wall_seconds"].mean() / 60
        summaries = [self.summary(metric).to_dict("records") for metric in metrics]
        rows = []
        for of_metrics in zip(*summaries, strict=True):
            own = of_metrics[0]
            row = {short: value_text(own[name]) for name, short in short_names(self.fields).items()}
            row["evaluated at"] = f"{own['evaluate_ratio']:g}"
            titled = dict(zip(map(title_of, metrics), of_metrics, strict=True))
            row |= {title: mean_text(of) for title, of in titled.items()}
            row |= {f"difference in {title}": difference_text(of) for title, of in titled.items()}
            row["seeds"] = str(own["n"])
            row["minutes a run"] = f"{minutes[own['arm']]:.1f}" if own["arm"] in minutes else "-"
            rows.append(row)
        lines = [
            markdown_table(rows),
            "",
            "AP × 100, mean ± standard deviation over seeds. Difference: to "
            f"{self.arms[0].label} at the same evaluation ratio, paired by seed, with its "
            f"{LEVEL:.0%} t-interval.",
        ]
        lines += [f"\nFailed: {name}: {error}" for name, error in self.errors.items()]
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def to_json(self, path: str | Path) -> None:
        """Everything behind the tables: call, configuration, machine, versions, data, results."""
        content = {
            "command": self.command,
            **self.about,
            "seeds": self.seeds,
            "base": to_dict(self.base),
            "arms": {arm.label: arm.values for arm in self.arms},
            "rows": _plain(self.table),
            "summary": {metric: _plain(self.summary(metric)) for metric in TITLES},
            "curves": _plain(self.curves[self.curves["box_ap"].notna()]),
            "errors": self.errors,
        }
        write_json(path, content)

    @classmethod
    def from_json(cls, path: str | Path) -> "Experiment":
        """What `to_json` wrote. ValueError naming the file when it is not the json of one."""
        content = read_json(path)
        try:
            base = from_dict(content["base"])
            arms = [Arm(label, _from_json(row), base) for label, row in content["arms"].items()]
            table, curves = (
                pd.DataFrame([_from_json(row) for row in content[name]])
                for name in ("rows", "curves")
            )
            seeds, errors, command = content["seeds"], content["errors"], content["command"]
            about = {name: content[name] for name in ("hardware", "environment", "data", "code")}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the result of an experiment: {error!r}") from error
        return cls(Path(path).parent, base, arms, seeds, table, curves, errors, command, about)


# ------------------------------------------------------------------------------- from the runs


def measured(
    base: Config,
    runs: Sequence[PlannedRun],
    errors: dict[str, str],
    known: Sequence[Experiment] = (),
) -> Experiment:
    """The tables of all complete runs, here or in `known`; errors: run that failed -> why.

    known: results from elsewhere as `read_known` gives them; a run that is complete here and there
    is taken from here. Raises Failed when there is none at all.
    """
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    flops: dict[str, float] = {}
    environments = []
    complete = [run for run in runs if run.complete()]
    for run in complete:
        label = run.arm.label
        if label not in flops:
            flops[label] = training_flops(run.cfg, run.size)
        key = {"arm": label, **run.arm.values, "seed": run.seed}
        lines = MetricsFile(run.path / "metrics.jsonl").read()
        rows += [key | row for row in result_rows(run, lines, flops[label])]
        curves += [key | row for row in curve_rows(run, lines, flops[label])]
        environments.append(read_json(run.path / "environment.json"))
    hardware = [hardware_text(environments[0]["gpus"])] if environments else []
    data = {environment["data"] for environment in environments}
    for other in known:
        new = {(run.arm.label, run.seed) for run in runs} - {(r["arm"], r["seed"]) for r in rows}
        for table, of_other in ((curves, other.curves), (rows, other.table)):
            table += [r for r in of_other.to_dict("records") if (r["arm"], r["seed"]) in new]
        hardware += other.about["hardware"].split(" and ")
        environments.append(other.about["environment"])
        data |= set(other.about["data"])
    if not rows:
        raise Failed(f"{runs[0].path.parent}: no run is complete yet, so there is no table")
    order = {(run.arm.label, run.seed): i for i, run in enumerate(runs)}
    for table in (rows, curves):
        table.sort(key=lambda row: order[row["arm"], row["seed"]])
    arms = [run.arm for run in runs if run.seed == runs[0].seed]
    about = {
        "hardware": " and ".join(dict.fromkeys(hardware)),
        "environment": {k: v for k, v in environments[0].items() if k not in ("folder", "run")},
        "data": sorted(data),
        "code": code_of(arms),
    }
    seeds = list(dict.fromkeys(run.seed for run in runs))
    table, curve = pd.DataFrame(rows), pd.DataFrame(curves)
    return Experiment(runs[0].path.parent, base, arms, seeds, table, curve, errors, "", about)


def code_of(arms: Sequence[Arm]) -> dict[str, dict[str, str]]:
    """Label -> slot -> address of its text, of the arms that have code of your own."""
    own = {arm.label: {slot: text.address for slot, text in arm.code.items()} for arm in arms}
    return {label: texts for label, texts in own.items() if texts}


def read_known(file: str | Path, base: Config, runs: Sequence[PlannedRun]) -> Experiment:
    """The runs among `runs` that a json of the same experiment holds, whole, from elsewhere.

    Raises ValueError naming the file, and the field or arm, when it is of another base, of arms or
    code of the same name that differ, or was evaluated on other data.
    """
    found = Experiment.from_json(file)
    theirs, ours = flat(found.base), flat(from_dict(to_dict(base)))
    changed = sorted(name for name in ours if theirs.get(name) != ours[name])
    if changed:
        raise ValueError(f"{file} is of another base: {', '.join(changed)} differ")
    arms = {arm.label: arm.values for arm in found.arms}
    code = code_of([run.arm for run in runs])
    whole: set[tuple[str, int]] = set()
    for run in runs:
        label = run.arm.label
        rows = found.table[(found.table["arm"] == label) & (found.table["seed"] == run.seed)]
        if not len(rows):
            continue
        same = [value_text(v) for v in arms[label].values()]
        if same != [value_text(v) for v in run.arm.values.values()]:
            raise ValueError(f"{file}: its arm {label} has other values than that of this grid")
        if found.about["code"].get(label) != code.get(label):
            raise ValueError(f"{file}: its arm {label} was trained with other code")
        if set(rows["data"]) != {run.data}:
            raise ValueError(f"{file}: {label} was evaluated on {rows['data'].iloc[0]}")
        wanted = {(ratio, passes(ratio, run.draws)) for ratio in run.ratios}
        if wanted <= set(zip(rows["evaluate_ratio"], rows["draws"], strict=True)):
            whole.add((label, run.seed))
    for name in ("table", "curves"):
        table = getattr(found, name)
        keys = zip(table["arm"], table["seed"], strict=True)
        setattr(found, name, table[[key in whole for key in keys]])
    return found


Rows = list[dict[str, Any]]


def result_rows(run: PlannedRun, lines: Rows, per_image: float) -> Rows:
    """One row per sample ratio of a complete run: ratio, APs x 100, cost.

    lines: of its metrics.jsonl; per_image: FLOPs of training on one image.

    Below ratio 1 an AP is the mean over the draws and `box_draw_sd`, `mask_draw_sd` their standard
    deviation. NaN where there are no objects of a size, or no masks. Times are of the training,
    with its own evaluations; CPU seconds leave loader processes out.
    """
    images = run.steps * run.cfg.training.step_images
    cost = {
        "steps": run.steps,
        "images": images,
        "wall_seconds": math.fsum(line["time"]["seconds"] for line in lines),
        "cpu_seconds": math.fsum(line["time"]["cpu_seconds"] for line in lines),
        "flops": per_image * images,
    }
    rows = []
    for row in run.rows():
        scores = {name: mean_score(row["metrics"], *at) for name, at in SCORES.items()}
        spread = {f"{k}_draw_sd": 100 * row.get(f"{k}_ap_sd", math.nan) for k in ("box", "mask")}
        at = {"evaluate_ratio": row["sample_ratio"], "data": run.data}
        rows.append({**at, **scores, **spread, "draws": row["draws"], **cost})
    return rows


def curve_rows(run: PlannedRun, lines: Rows, per_image: float) -> Rows:
    """One row per step: epoch, seconds and FLOPs until then, loss, and AP x 100 where evaluated.

    lines: of its metrics.jsonl; per_image: FLOPs of training on one image. Seconds are the wall
    time of the steps alone.
    """
    evaluations = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    rows = []
    images, seconds = 0, 0.0
    for line in (line for line in lines if "loss" in line):
        images += line["images"]
        seconds += line["time"]["seconds"]
        row = {"step": line["step"], "epoch": images / run.images, "seconds": seconds}
        row |= {"flops": per_image * images, "loss": line["loss"]}
        scores = [evaluations.get(line["step"], {})]
        rows.append(row | {name: mean_score(scores, *SCORES[name]) for name in TITLES})
    return rows


def training_flops(cfg: Config, size: tuple[int, int]) -> float:
    """FLOPs of training on one image of `size` = (height, width); NaN for a part of your own.

    Forward and backward pass take three times the forward pass; a multiply-add is two operations.
    The forward pass is counted at the ratio of the training, with the heads as in evaluation
    (`mimdet.analysis.cost`). Sampler and loss are not counted: own ones are no obstacle.
    """
    cfg = copy.deepcopy(cfg)
    cfg.backbone.sampler, cfg.detector.loss = "random", "mask_rcnn"
    values = flat(cfg)
    parts = ("backbone.kind", "backbone.stem", "backbone.decoder_fill", "detector.neck")
    if any(":" in values[name] for name in parts):  # it need not run without numbers
        return math.nan
    return 6.0 * cost_of(cfg, size, cfg.backbone.sample_ratio).detector


def mean_score(metrics: Sequence[dict[str, Any]], kind: str, name: str) -> float:
    """Mean over the draws, x 100. None (no such object) and a missing kind are NaN."""
    values = [draw.get(kind, {}).get(name) for draw in metrics]
    known = [value for value in values if value is not None]
    return 100 * statistics.fmean(known) if known else math.nan


# ------------------------------------------------------------------------------- small parts


def title_of(metric: str) -> str:
    """`mask_ap_small` -> `mask AP small`."""
    return TITLES.get(metric, metric.replace("_", " ").replace(" ap", " AP"))


def mean_text(row: dict[str, Any]) -> str:
    """`31.2 ± 0.4`."""
    if math.isnan(row["mean"]):
        return "-"
    return f"{row['mean']:.1f}" if math.isnan(row["sd"]) else f"{row['mean']:.1f} ± {row['sd']:.1f}"


def difference_text(row: dict[str, Any]) -> str:
    """`+1.2 [+0.4, +2.0]`; without the interval where there is one pair only."""
    if math.isnan(row["difference"]):
        return "-"
    text = f"{row['difference']:+z.1f}"  # z: never -0.0
    if math.isnan(row["difference_low"]):
        return text
    return f"{text} [{row['difference_low']:+z.1f}, {row['difference_high']:+z.1f}]"


def hardware_text(gpus: Sequence[str]) -> str:
    """`2 CPU cores (name); NVIDIA H100`, of this machine and the GPUs a run saw."""
    information = Path("/proc/cpuinfo")  # Linux; elsewhere Python's own word
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    model = re.search(r"^model name\s*: (.+)", text, re.MULTILINE)
    name = model[1] if model else platform.processor() or platform.machine()
    return "; ".join([f"{os.cpu_count()} CPU cores ({name})", *gpus])


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for json: NaN becomes None."""
    rows: list[dict[str, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")
    return rows


def _from_json(row: dict[str, Any]) -> dict[str, Any]:
    """A json holds tuples as lists, and None for NaN."""
    known = {name: math.nan if value is None else value for name, value in row.items()}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
