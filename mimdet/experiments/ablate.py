"""`mimdet ablate GRID.py`: an experiment that stands in a file."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from mimdet.config import Config
from mimdet.experiments.estimate import estimate
from mimdet.experiments.experiment import experiment, plan
from mimdet.experiments.results import Experiment

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
