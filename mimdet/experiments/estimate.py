"""How long an experiment will take: a few steps of every arm, really trained."""

import copy
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mimdet.data.coco import build_dataset
from mimdet.experiments.plan import (
    PlannedRun,
    evaluations_while_training,
    passes,
    read_clock,
    steps_done,
)
from mimdet.experiments.pool import count_processes, run_all

TIMED_STEPS = 6
TIMED_IMAGES = 8
START_SECONDS = 6.0
"""A process starts, imports PyTorch and opens the data."""
TRAINED = 1.3
"""A step of a trained model costs about this much more than one of a new model: its proposals find
more objects, so the mask head has more to do."""


@dataclass(slots=True)
class Estimate:
    """What is left of an experiment."""

    seconds: dict[str, float]
    """Run name -> seconds it still needs; 0 when it is complete. Runs of a failing arm are left
    out."""
    errors: dict[str, str]
    """Arm that cannot be trained -> why."""
    processes: int

    @property
    def total(self) -> float:
        """Seconds for all runs, several at a time; never less than the longest one."""
        return max([sum(self.seconds.values()) / self.processes, *self.seconds.values()], default=0)


def estimate(runs: Sequence[PlannedRun], processes: int = 0) -> Estimate:
    """Train a few steps of each arm that has work left, in a temporary folder, and reckon."""
    waiting = [run for run in runs if not run.complete()]
    if not waiting:
        return Estimate({run.name: 0.0 for run in runs}, {}, 1)
    processes = count_processes(waiting, processes)
    first = {run.arm.label: run for run in reversed(waiting)}
    with tempfile.TemporaryDirectory() as folder:
        trials = [_trial(run, Path(folder)) for run in first.values()]
        failed = run_all(trials, min(processes, len(trials)), Path(folder) / "logs")
        errors = {t.arm.label: failed[t.name] for t in trials if t.name in failed}
        speeds = {t.arm.label: _speed(t) for t in trials if t.name not in failed}
    seconds = {
        run.name: 0.0 if run.complete() else seconds_left(run, *speeds[run.arm.label])
        for run in runs
        if run.arm.label not in errors
    }
    return Estimate(seconds, errors, processes)


def seconds_left(run: PlannedRun, per_step: float, per_image: float) -> float:
    """Seconds of a run from where it is to its last evaluation.

    per_step, per_image: seconds of a new model's step and of evaluating one image.
    """
    done = steps_done(run.path)
    share = 1 - done / run.steps
    evaluated = {row["sample_ratio"] for row in run.rows()}
    repeats = round(share * evaluations_while_training(run))
    repeats += sum(passes(ratio, run.draws) for ratio in run.ratios if ratio not in evaluated)
    images = repeats * len(build_dataset(run.cfg.data, "val", run.seed))
    return START_SECONDS + TRAINED * ((run.steps - done) * per_step + images * per_image)


def _trial(run: PlannedRun, folder: Path) -> PlannedRun:
    """The same arm for a few steps, evaluated on a few images at its end only."""
    cfg = copy.deepcopy(run.cfg)
    cfg.training.steps = TIMED_STEPS
    cfg.training.evaluate_every = cfg.training.evaluate_every_steps = 0
    cfg.training.checkpoint_every_steps = TIMED_STEPS
    cfg.data.limit_val = min(TIMED_IMAGES, cfg.data.limit_val or TIMED_IMAGES)
    data = build_dataset(cfg.data, "val", run.seed).version
    path, ratios = folder / run.name, run.ratios[-1:]
    return replace(run, cfg=cfg, path=path, steps=TIMED_STEPS, ratios=ratios, draws=1, data=data)


def _speed(trial: PlannedRun) -> tuple[float, float]:
    """Seconds of a step, and of the evaluation of one image."""
    steps = [row["wall_seconds"] for row in read_clock(trial.path).values()]
    images = len(build_dataset(trial.cfg.data, "val", trial.seed))
    evaluation = trial.rows()[0]["seconds"]
    # The first steps pay for warming up, the last one ends with an evaluation.
    return statistics.median(steps[TIMED_STEPS // 3 : -1]), evaluation / images
