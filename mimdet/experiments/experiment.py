"""`mimdet.experiment`: a grid of trainings with seeds that can be stopped and goes on."""

from collections.abc import Sequence
from pathlib import Path

from mimdet.config import Config
from mimdet.experiments.grid import Arm, Grid, arms_of, short_names
from mimdet.experiments.plan import PlannedRun, plan_runs
from mimdet.experiments.pool import ExperimentStopped, count_processes, run_all
from mimdet.experiments.results import Experiment


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
