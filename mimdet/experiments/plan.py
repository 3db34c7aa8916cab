"""The runs of an experiment, each with its folder, and what of them is already on the disk."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimdet.config import Config, flat
from mimdet.data.augment import test_size
from mimdet.data.coco import build_dataset
from mimdet.data.loader import Dataset
from mimdet.experiments.grid import Arm
from mimdet.models.backbones import BASELINES
from mimdet.training.run import Run
from mimdet.training.train import adapt_to_data

RATIOS = "ratios.json"
"""In the folder of a run: its evaluations, {"data", "rows" of `evaluate_ratios`}. It exists only
when the training is complete."""
CLOCK = "clock.jsonl"
"""In the folder of a run: {"step", "wall_seconds", "cpu_seconds"} of every step."""


@dataclass(slots=True)
class PlannedRun:
    """One arm with one seed."""

    arm: Arm
    seed: int
    cfg: Config
    """As the run's folder stores it: the class count is that of the data."""
    path: Path
    images: int
    """Training images in an epoch."""
    size: tuple[int, int]
    """(height, width) of a typical one as the network sees it, in pixels."""
    steps: int
    """Steps of the whole training."""
    ratios: tuple[float, ...]
    """Sample ratios at which it is evaluated."""
    draws: int
    """Samplings of the tokens per ratio below 1."""
    data: str
    """Version of the evaluation data; evaluations on other data do not count."""

    @property
    def name(self) -> str:
        return self.path.name

    def rows(self) -> list[dict[str, Any]]:
        """The evaluations this plan asks for, as far as they are done, in the order of `ratios`."""
        done = {row["sample_ratio"]: row for row in read_ratios(self.path, self.data)}
        found = [done[ratio] for ratio in self.ratios if ratio in done]
        return [row for row in found if row["draws"] == passes(row["sample_ratio"], self.draws)]

    def complete(self) -> bool:
        return len(self.rows()) == len(self.ratios)


def plan_runs(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    folder: Path,
    ratios: Sequence[float] | None,
    draws: int,
) -> list[PlannedRun]:
    """All arms of the first seed, then all of the next: what is done at any time can be compared.

    Opens the data, and checks that a folder that exists holds the same configuration, and that no
    two arms train the same. A baseline that sees every token is evaluated at ratio 1 alone.
    """
    _check_numbers(seeds, ratios, draws)
    ready = {}
    for arm in arms:
        cfg = copy.deepcopy(arm.cfg)
        data = build_dataset(cfg.data, "train", cfg.training.seed)
        adapt_to_data(cfg, data)
        version = build_dataset(cfg.data, "val", cfg.training.seed).version
        ready[arm.label] = (cfg, len(data), typical_size(cfg, data), version)
    _check_different({label: cfg for label, (cfg, *_) in ready.items()})
    runs = []
    for seed in seeds:
        for arm in arms:
            cfg, images, size, version = copy.deepcopy(ready[arm.label])
            cfg.training.seed = seed
            path = folder / f"{arm.label}-s{seed}"
            _check_same(path, cfg)
            at = tuple(map(float, ratios or (cfg.backbone.sample_ratio_eval,)))
            at = (1.0,) if cfg.backbone.kind in BASELINES else at
            steps = total_steps(cfg, images)
            runs.append(PlannedRun(arm, seed, cfg, path, images, size, steps, at, draws, version))
    return runs


def typical_size(cfg: Config, data: Dataset) -> tuple[int, int]:
    """Mean (height, width) of the first hundred images, resized as for a test."""
    count = min(100, len(data))
    sizes = [test_size(cfg.data, *data.image_size(i)) for i in range(count)]
    return round(sum(h for h, _ in sizes) / count), round(sum(w for _, w in sizes) / count)


def total_steps(cfg: Config, images: int) -> int:
    """Optimiser steps of a training on this many images, as the trainer counts them."""
    t = cfg.training
    return t.steps or max(1, round(t.epochs * images / (t.batch_size * t.accumulate)))


def evaluations_while_training(run: PlannedRun) -> int:
    """How often a run is evaluated before its training ends, the last time included."""
    t = run.cfg.training
    per_epoch = run.images / (t.batch_size * t.accumulate)
    every = t.evaluate_every_steps or round(t.evaluate_every * per_epoch)
    return -(-run.steps // every) if every else 1


def passes(ratio: float, draws: int) -> int:
    """Passes over the evaluation data: at ratio 1 nothing is drawn, so one is enough."""
    return draws if ratio < 1 else 1


# ------------------------------------------------------------------------------- on the disk


def read_ratios(path: Path, data: str) -> list[dict[str, Any]]:
    """The rows of a run's RATIOS file; none when there is none, or it is of other data."""
    file = path / RATIOS
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = found["rows"] if found["data"] == data else []
    return rows


def read_clock(path: Path) -> dict[int, dict[str, float]]:
    """Step -> its seconds; a step that was done again after a kill counts once."""
    return {row["step"]: row for row in read_lines(path / CLOCK)}


def steps_done(path: Path) -> int:
    """The last step of a run's metrics, read from the end of the file only."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 20_000))  # an evaluation's line has 5,000
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that is being written, or whose beginning was not read
    return 0


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a jsonl file."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # cut short by a kill


def _check_same(path: Path, cfg: Config) -> None:
    """Raises ValueError with the difference when the folder holds another run."""
    if not (path / "config.json").exists():
        return
    try:
        Run(path, cfg)
    except ValueError as error:
        raise ValueError(f"{error}\nAn experiment takes another folder by name=.") from None


def _check_different(configurations: dict[str, Config]) -> None:
    known: dict[str, str] = {}
    for label, cfg in configurations.items():
        text = repr({**flat(cfg), "preset": ""})  # the name of a recipe changes nothing
        if text in known:
            raise ValueError(
                f"the arms {known[text]} and {label} train the same, so they cannot be compared: "
                "leave one out"
            )
        known[text] = label


def _check_numbers(seeds: Sequence[int], ratios: Sequence[float] | None, draws: int) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds={list(seeds)}: give at least one, none twice, none negative")
    if ratios is not None and not ratios:
        raise ValueError("evaluate_ratios is empty: give at least one share of tokens, such as 1.0")
    for ratio in ratios or ():
        if not 0 < ratio <= 1:
            raise ValueError(f"evaluate_ratios has {ratio}: it is the share of tokens kept, (0, 1]")
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one sampling per ratio")
