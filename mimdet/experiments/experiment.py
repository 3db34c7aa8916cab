"""`mimdet.experiment`: a grid of trainings with seeds that can be stopped and goes on."""

import copy
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mimdet.config import Config
from mimdet.data.coco import build_dataset
from mimdet.experiments.grid import Arm, Grid, arms_of, short_names
from mimdet.experiments.results import Experiment
from mimdet.experiments.runs import (
    ExperimentStopped,
    PlannedRun,
    count_processes,
    evaluations_while_training,
    passes,
    plan_runs,
    read_clock,
    run_all,
    steps_done,
)


def experiment(
    base: Config,
    grid: Grid,
    seeds: int | Sequence[int] = 3,
    *,
    name: str = "",
    runs: str | Path = "runs",
    evaluate_ratios: Sequence[float] | None = None,
    draws: int = 2,
    processes: int = 0,
) -> Experiment:
    """Train every combination of the grid's values with every seed, and compare.

    grid: {"backbone.sample_ratio": [0.25, 0.5, 1.0]}, or a list of arms that set several fields
    each; {"preset": ["tiny", "tiny_swin"]} compares recipes, with what `base` changes in its own. A
    value of backbone.sampler, backbone.stem or backbone.kind may be a function or class of your
    own, written in a cell; its source is kept with the runs. The first arm is the one that others
    are compared with. seeds: how many, counted from base.training.seed, or a list of them. Runs of
    one seed see the same data in the same order, and start with the same weights where
    their parts are alike.

    name: folder under `runs`; default: the fields of the grid. evaluate_ratios: shares of the
    tokens at which each finished training is evaluated (default: the configuration's own), with
    `draws` samplings below 1. processes: runs at a time; 0 = one per GPU, or one per core and
    thread of a run.

    Each run is a run directory of its own, trained in a child process. Ctrl-C lets all of them save
    and raises ExperimentStopped; the same call goes on, and skips what is complete. So does a call
    with more seeds, values or evaluation ratios. A run that fails is reported and the others go on.
    Raises ValueError, before anything starts, for a grid that cannot be used or a folder that holds
    runs of another configuration; RuntimeError when no run succeeds.
    """
    arms, numbers, planned = plan(
        base, grid, seeds, name=name, runs=runs, evaluate_ratios=evaluate_ratios, draws=draws
    )
    folder = planned[0].path.parent
    waiting = [run for run in planned if not run.complete()]
    errors: dict[str, str] = {}
    if waiting:
        count = count_processes(waiting, processes)
        print(_opening(planned, waiting, count), flush=True)
        try:
            errors = run_all(waiting, count, folder / "logs")
        except KeyboardInterrupt:
            done = sum(run.complete() for run in planned)
            raise ExperimentStopped(done, len(planned), folder) from None
    if not any(run.complete() for run in planned):
        first = next(iter(errors))
        raise RuntimeError(
            f"no run succeeded; {first}: {errors[first]} (output in {folder / 'logs'})"
        )
    command = (
        f"mimdet.experiment(base, {_grid_text(arms)}, seeds={numbers}, name={folder.name!r}, "
        f"evaluate_ratios={evaluate_ratios}, draws={draws})"
    )
    return Experiment(folder, base, arms, numbers, planned, errors, command)


def plan(
    base: Config,
    grid: Grid,
    seeds: int | Sequence[int] = 3,
    *,
    name: str = "",
    runs: str | Path = "runs",
    evaluate_ratios: Sequence[float] | None = None,
    draws: int = 2,
) -> tuple[list[Arm], list[int], list[PlannedRun]]:
    """Arms, seeds and runs of the same call of `experiment`; nothing is trained or written."""
    arms = arms_of(base, grid)
    if isinstance(seeds, int):
        seeds = range(base.training.seed, base.training.seed + seeds)
    seeds = [int(seed) for seed in seeds]  # those of NumPy are no numbers for json
    name = name or "-".join(short_names(list(arms[0].values)).values()) or "base"
    planned = plan_runs(arms, seeds, Path(runs) / name, evaluate_ratios, draws)
    return arms, seeds, planned


def _opening(planned: Sequence[PlannedRun], waiting: Sequence[PlannedRun], count: int) -> str:
    complete = len(planned) - len(waiting)
    return (
        f"{planned[0].path.parent}: {len(planned)} runs, {complete} complete, "
        f"{len(waiting)} to train, {min(count, len(waiting))} at a time"
    )


def _grid_text(arms: Sequence[Arm]) -> str:
    """The grid with functions by their names."""
    return repr([arm.values for arm in arms])


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


NEEDED = ("base", "grid")
OPTIONS = ("seeds", "name", "evaluate_ratios", "draws")
"""Names a grid file must and may define; they are the arguments of `mimdet.experiment`."""


def ablate(
    file: str | Path,
    *,
    runs: str | Path = "runs",
    seeds: int = 0,
    processes: int = 0,
    dry_run: bool = False,
    out: str | Path = "",
) -> Experiment | None:
    """Run the experiment that the Python file describes; print its table, write it as json.

    The file defines `base` (a Config) and `grid`, and may define `seeds`, `name` (default: the
    file's name), `evaluate_ratios` and `draws`, as `mimdet.experiment` takes them; it is executed.
    seeds: another number than the file's. out: the json; default RUNS/NAME/result.json. dry_run:
    only list the runs, time a few steps of each arm, and return None.
    """
    arguments = read_grid(file)
    arguments.setdefault("name", Path(file).stem)
    arguments["runs"] = runs
    if seeds:
        arguments["seeds"] = seeds
    if dry_run:
        show_plan(arguments, processes)
        return None
    result = experiment(**arguments, processes=processes)
    result.command = f"mimdet ablate {file}" + (f" --seeds {seeds}" if seeds else "")
    place = Path(out) if out else result.folder / "result.json"
    result.to_json(place)
    print(f"{result.markdown()}\n\nresult: {place}")
    return result


def read_grid(file: str | Path) -> dict[str, Any]:
    """Execute a grid file; the arguments it defines. ValueError naming the file and what is wrong.

    It becomes a module, so that functions and classes in it can be a grid's values.
    """
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(f"{file} is not a Python file that defines `base` and `grid`")
    name = f"mimdet_grid_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    found = {key: getattr(module, key) for key in (*NEEDED, *OPTIONS) if hasattr(module, key)}
    missing = [key for key in NEEDED if key not in found]
    if missing:
        raise ValueError(
            f"{path} does not define {' and '.join(missing)}: `base` is a Config, for example "
            'presets.tiny(), and `grid` {"backbone.sample_ratio": [0.25, 1.0]}'
        )
    if not isinstance(found["base"], Config):
        raise ValueError(f"{path}: base is {found['base']!r}; it must be a Config")
    return found


def show_plan(arguments: dict[str, Any], processes: int) -> None:
    """Print every run with what it still needs, and the time for all of them."""
    _, _, planned = plan(**arguments)
    print("Timing a few steps of each arm ...", flush=True)
    found = estimate(planned, processes)
    for run in planned:
        if run.name in found.seconds:
            left = found.seconds[run.name]
            text = f"about {left / 60:.1f} min" if left else "complete"
        else:
            text = f"would fail: {found.errors[run.arm.label]}"
        print(f"{run.path}  {run.steps} steps, evaluated at {list(run.ratios)}: {text}")
    print(
        f"{len(planned)} runs, {found.processes} at a time: about {found.total / 60:.0f} min, "
        "at the speed of this moment"
    )
