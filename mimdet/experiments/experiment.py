"""`mimdet.experiment`: a grid of trainings with seeds that can be stopped and resumed."""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimdet.config import Config
from mimdet.console import Failed
from mimdet.experiments.results import Experiment, measured, read_known
from mimdet.experiments.runs import (
    GPU,
    ExperimentStopped,
    Grid,
    PlannedRun,
    places_for,
    plan,
    run_all,
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
    part: tuple[int, int] = (1, 1),
    known: Sequence[str | Path] = (),
    train: bool = True,
) -> Experiment:
    """Train every combination of the grid's values with every seed, and compare.

    grid: {"backbone.sample_ratio": [0.25, 0.5, 1.0]}, or a list of arms that set several fields
    each; {"preset": ["tiny", "tiny_swin"]} compares recipes, with what `base` changes in its own. A
    value of a slot (backbone.sampler, .stem, .decoder_fill, .kind, detector.neck, .loss,
    data.source) may be a function or class of your own, written in a cell; its source is kept with
    the runs. The first arm is the one that others are compared with. seeds: how many, counted from
    base.training.seed, or a list of them. Runs of one seed see the same data in the same order, and
    start with the same weights where their parts are alike.

    name: folder under `runs`; default: the fields of the grid. evaluate_ratios: shares of the
    tokens at which each finished training is evaluated (default: the configuration's own), with
    `draws` samplings below 1. processes: runs at a time; 0 = one per GPU, or one per core and
    thread of a run.

    part: (3, 8) = train every eighth run, beginning with the third; eight machines that are given
    one part each share the work, in one folder or in folders of their own. known: json files of the
    same experiment from elsewhere; the runs they hold are not trained again. train: False = train
    nothing. The result has every run that is complete, whichever part it belongs to.

    Each run is a run directory of its own, trained in a child process. Ctrl-C lets all of them save
    and raises ExperimentStopped; the same call resumes, and skips what is complete. So does a call
    with more seeds, values or evaluation ratios. A run that fails is reported and the others go on.
    Raises ValueError, before anything starts, for a grid that cannot be used or a folder that holds
    runs of another configuration; Failed when no run succeeds.
    """
    planned = plan(
        base, grid, seeds, name=name, runs=runs, evaluate_ratios=evaluate_ratios, draws=draws
    )
    folder = planned[0].path.parent
    first, parts = part
    if not 1 <= first <= parts:
        raise ValueError(f"part={first}/{parts}: which part of how many, from 1/{parts} on")
    found, done = join_known(known, base, planned)
    own = planned[first - 1 :: parts] if train else []
    waiting = [run for run in own if not run.complete() and (run.arm.label, run.seed) not in done]
    errors: dict[str, str] = {}
    if waiting:
        places = places_for(waiting, processes)
        print(
            f"{folder}: {len(own)} runs, {len(own) - len(waiting)} complete, "
            f"{len(waiting)} to train, {len(places)} at a time",
            flush=True,
        )
        gpus = {place[GPU] for place in places if GPU in place}
        if 0 < len(gpus) < len(places):
            shared = f"{len(places)} runs at a time share the memory of {len(gpus)} GPUs"
            print(f"{shared}; with processes=0 each has one of its own", flush=True)
        try:
            errors = run_all(waiting, places, folder / "logs")
        except KeyboardInterrupt:
            raise ExperimentStopped(own) from None
    if errors and not any(run.complete() for run in planned):
        failed, why = next(iter(errors.items()))
        raise Failed(f"no run succeeded; {failed}: {why} (output in {folder / 'logs'})")
    result = measured(base, planned, errors, found)
    result.command = (
        f"mimdet.experiment(base, {[arm.values for arm in result.arms]}, seeds={result.seeds}, "
        f"name={folder.name!r}, evaluate_ratios={evaluate_ratios}, draws={draws})"
    )
    return result


def join_known(
    files: Sequence[str | Path], base: Config, planned: Sequence[PlannedRun]
) -> tuple[list[Experiment], set[tuple[str, int]]]:
    """The results in these json files, and (arm, seed) of each run that they hold."""
    found = [read_known(file, base, planned) for file in files]
    rows = [row for other in found for row in other.table.to_dict("records")]
    return found, {(row["arm"], row["seed"]) for row in rows}


def read_grid(file: str | Path) -> dict[str, Any]:
    """Execute a grid file; returns the arguments of `mimdet.experiment` that it defines."""
    try:
        found = runpy.run_path(str(file))
    except OSError:
        raise
    except Exception as error:  # whatever the code of others may raise
        raise Failed(f"{file} does not run: {type(error).__name__}: {error}") from error
    given = isinstance(found.get("grid"), dict | list)
    if not given or not isinstance(found.get("base"), Config):
        raise ValueError(
            f"{file} must define `base`, a Config such as presets.tiny(), and `grid`, such as "
            '{"backbone.sample_ratio": [0.25, 1.0]}'
        )
    names = ("base", "grid", "seeds", "name", "evaluate_ratios", "draws")
    return {name: found[name] for name in names if name in found}
