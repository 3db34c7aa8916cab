"""The runs of an experiment: arms (what differs) times seeds (what does not), planned; several
trained at once in child processes, evaluated."""

import copy
import itertools
import os
import re
import sys
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from mimdet.config import SLOTS, Config, flat, from_dict, set_field, to_dict
from mimdet.console import Stopped, open_console, told
from mimdet.data.augment import resize_of
from mimdet.data.coco import build_dataset
from mimdet.data.loader import Dataset
from mimdet.files import read_json, write_json
from mimdet.models.backbones import BASELINES
from mimdet.presets import PRESETS, STEPS_FOR
from mimdet.processes import usable_cores
from mimdet.training.checkpoints import MetricsFile, has_checkpoint
from mimdet.training.job import Child, end_with_parent
from mimdet.training.optim import Schedule
from mimdet.training.owner import alone_in
from mimdet.training.run import Run, load_detector
from mimdet.training.slots import SlotText, check_slots, read_slots
from mimdet.training.train import adapt_to_data, resume

Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
"""{field: values} for all combinations, or a list of arms {field: value}."""

NOT_IN_A_GRID = {
    "training.seed": "give seeds=, so that every arm has the same ones",
    "backbone.sample_ratio_eval": "it does not change a training: give evaluate_ratios=(...), and "
    "one training is evaluated at all of them",
}
LONGEST_LABEL = 80
"""Characters; the file systems' limit for a name is 255 bytes."""
RATIOS = "ratios.json"
"""In the folder of a run: its evaluations, {"data", "rows" of `evaluate_ratios`}. It exists only
when the training is complete."""
LOCK_SECONDS = 60.0
"""How long to wait for a process that still works on the same run; one that stops needs 20 s."""
STOP_SECONDS = 30.0
"""A run has this long to save and end; then, or on a second Ctrl-C, it is killed."""
LOOK_EVERY = 0.2
GPU = "CUDA_VISIBLE_DEVICES"
"""Environment variable: the GPUs that a process sees."""


@dataclass(slots=True)
class Arm:
    """One way to set the fields of the grid."""

    label: str
    """Readable and unique, also as a part of a folder's name: `sample_ratio=0.25`."""
    values: dict[str, Any]
    """Field -> value; code of your own stands here with its name."""
    cfg: Config
    code: dict[str, SlotText] = field(default_factory=dict)
    """Slot -> the text of the part that was given, as it was then."""


def arms_of(base: Config, grid: Grid) -> list[Arm]:
    """The arms of a grid, in its order; the first one is what the others are compared with.

    The values of `preset` are names of recipes: such an arm is that recipe with what `base` changes
    in its own. Raises ValueError naming the field, with near matches, for a name the configuration
    lacks, and for values that cannot be used or have no effect.
    """
    combinations = _combinations(grid)
    fields = list(dict.fromkeys(name for combination in combinations for name in combination))
    known = flat(Config())
    for name in fields:
        if name in NOT_IN_A_GRID:
            raise ValueError(f"{name} cannot be in a grid: {NOT_IN_A_GRID[name]}")
        if name not in known:
            near = " or ".join(get_close_matches(name, known))
            hint = f": did you mean {near}?" if near else ""
            raise ValueError(f"the configuration has no field {name!r}{hint}")
    short = short_names(fields)
    arms: dict[str, Arm] = {}
    for combination in combinations:
        arm = _arm(base, combination, fields)
        text = ",".join(f"{short[name]}={value_text(value)}" for name, value in arm.values.items())
        arm.label = re.sub(r"[^\w.=,+-]+", "-", text) or "base"
        if len(arm.label) > LONGEST_LABEL:
            arm.label = f"{arm.label[: LONGEST_LABEL - 9]}-{zlib.crc32(text.encode()):08x}"
        if arm.label in arms:
            raise ValueError(
                f"two arms are both called {arm.label}: give each value once, and functions "
                "different names"
            )
        arms[arm.label] = arm
    return list(arms.values())


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Field -> its last part, or the whole of it where two fields end alike."""
    ends = [name.rpartition(".")[2] for name in fields]
    return {
        name: end if ends.count(end) == 1 else name for name, end in zip(fields, ends, strict=True)
    }


def value_text(value: Any) -> str:
    """A value in a label or a table: 0.25, on, 64-96, random."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "-".join(value_text(part) for part in value) or "none"
    return str(value) or "none"


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    if not isinstance(grid, Mapping):
        if not grid:
            raise ValueError("the grid is empty: give {field: [values]}, or [{field: value}, ...]")
        return [dict(arm) for arm in grid]
    for name, values in grid.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{name}: give the values as a list, not {values!r}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _arm(base: Config, combination: Mapping[str, Any], fields: Sequence[str]) -> Arm:
    """An arm that has no label yet; fields: of the whole grid."""
    cfg = _in_recipe(base, combination.get("preset", base.preset))
    names: dict[str, str] = {}
    code: dict[str, SlotText] = {}
    for name, value in combination.items():
        if name in SLOTS and not isinstance(value, str):
            if getattr(value, "__name__", "") == "<lambda>":
                raise ValueError(f"{name} is a lambda: write it with def, so that it has a name")
            text = code[SLOTS[name]] = read_slots({SLOTS[name]: value})[SLOTS[name]]
            names[name], value = text.object, text.address
        set_field(cfg, name, value)
    cfg = from_dict(to_dict(cfg))  # its error names a field of another type
    values = flat(cfg)
    for names_of in STEPS_FOR.items():
        name, other = (f"training.{field}" for field in names_of)
        if name in fields and values[other]:
            raise ValueError(
                f"{name} has no effect while {other}={values[other]}: put {other} in the grid, or "
                "set it to 0 in the base"
            )
    return Arm("", {name: values[name] for name in fields} | names, cfg, code)


def _in_recipe(base: Config, preset: str) -> Config:
    """The recipe `preset`, with every field that `base` sets otherwise than its own recipe does.

    For another kind of backbone, what `base` changes in its own is left out.
    """
    if preset == base.preset:
        return copy.deepcopy(base)
    for name in (preset, base.preset):
        if name not in PRESETS:
            raise ValueError(
                f"preset={name!r}: recipes can be compared where the base and every value are one "
                f"of {', '.join(PRESETS)}"
            )
    cfg, own = PRESETS[preset](), flat(PRESETS[base.preset]())
    same_kind = cfg.backbone.kind == base.backbone.kind
    for name, value in flat(base).items():
        if value != own[name] and name != "preset" and (same_kind or "backbone." not in name):
            set_field(cfg, name, value)
    return cfg


# ------------------------------------------------------------------------------- the plan


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
        done = read_ratios(self.path, self.data)
        found = [done[ratio] for ratio in self.ratios if ratio in done]
        return [row for row in found if row["draws"] == passes(row["sample_ratio"], self.draws)]

    def complete(self) -> bool:
        return len(self.rows()) == len(self.ratios)


def plan(
    base: Config,
    grid: Grid,
    seeds: int | Sequence[int] = 3,
    *,
    name: str = "",
    runs: str | Path = "runs",
    evaluate_ratios: Sequence[float] | None = None,
    draws: int = 2,
) -> list[PlannedRun]:
    """The runs of the same call of `mimdet.experiment`; nothing is trained or written.

    All arms of the first seed, then all of the next: what is done at any time can be compared.
    Opens the data, and checks that a folder that exists holds the same configuration, and that no
    two arms train the same. A baseline that sees every token is evaluated at ratio 1 alone.
    """
    if isinstance(seeds, int):
        seeds = range(base.training.seed, base.training.seed + seeds)
    numbers = [int(seed) for seed in seeds]  # those of NumPy are no numbers for json
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds={numbers}: give at least one, and none twice")
    for ratio in evaluate_ratios or ():
        if not 0 < ratio <= 1:
            raise ValueError(f"evaluate_ratios has {ratio}: it is the share of tokens kept, (0, 1]")
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one sampling per ratio")
    arms = arms_of(base, grid)
    folder = Path(runs) / (name or "-".join(short_names(list(arms[0].values)).values()) or "base")
    first: dict[str, PlannedRun] = {}
    for arm in arms:
        cfg = copy.deepcopy(arm.cfg)
        train = build_dataset(cfg.data, "train", cfg.training.seed, cfg.detector.masks)
        held_out = build_dataset(cfg.data, "val", cfg.training.seed, cfg.detector.masks)
        adapt_to_data(cfg, train)
        at = tuple(map(float, evaluate_ratios or (cfg.backbone.sample_ratio_eval,)))
        at = (1.0,) if cfg.backbone.kind in BASELINES else at
        steps, size = Schedule(cfg.training, len(train)).total, typical_size(cfg, train)
        run = PlannedRun(
            arm, numbers[0], cfg, folder, len(train), size, steps, at, draws, held_out.version
        )
        text = repr({**flat(cfg), "preset": ""})  # the name of a recipe changes nothing
        other = first.setdefault(text, run)
        if other is not run:
            raise ValueError(
                f"the arms {other.arm.label} and {arm.label} train the same, so they cannot be "
                "compared: leave one out"
            )
    planned = []
    for seed in numbers:
        for run in first.values():
            run = copy.copy(run)
            run.seed, run.path = seed, folder / f"{run.arm.label}-s{seed}"
            run.cfg = copy.deepcopy(run.cfg)
            run.cfg.training.seed = seed
            _check_folder(run)
            planned.append(run)
    return planned


def typical_size(cfg: Config, data: Dataset) -> tuple[int, int]:
    """Mean (height, width) of the first hundred images, resized as for a test."""
    resize = resize_of(cfg.data)
    sizes = [resize.size(*data.image_size(i)) for i in range(min(100, len(data)))]
    height, width = np.mean(sizes, axis=0).round()
    return int(height), int(width)


def _check_folder(run: PlannedRun) -> None:
    """Raises ValueError with the difference when the folder holds another run, or other code."""
    if not (run.path / "config.json").exists():
        return
    try:
        Run(run.path, run.cfg)
        if has_checkpoint(run.path, after=0):
            check_slots(run.path, run.arm.code)
    except ValueError as error:
        raise ValueError(f"{error}\nAn experiment takes another folder by name=.") from None


def read_ratios(path: Path, data: str) -> dict[float, dict[str, Any]]:
    """Ratio -> row of a run's RATIOS file; none when there is none, or it is of other data."""
    file = path / RATIOS
    found: dict[str, Any] = read_json(file) if file.exists() else {"data": data, "rows": []}
    return {row["sample_ratio"]: row for row in found["rows"] if found["data"] == data}


def passes(ratio: float, draws: int) -> int:
    """Passes over the evaluation data: at ratio 1 nothing is drawn, so one is enough."""
    return draws if ratio < 1 else 1


# ------------------------------------------------------------------------------- in the child


def main(path: Path, draws: int, ratios: list[float]) -> None:
    """The process of a run: it trains or resumes, and evaluates.

    The code in the folder is trusted: `start` has compared it with that of its caller.
    """
    with told(show=True), alone_in(path, LOCK_SECONDS):
        for _ in resume(path, trust_code=True, locked=True):
            pass
        evaluate_run(path, draws, ratios)


def evaluate_run(path: Path, draws: int, ratios: list[float]) -> None:
    """Evaluate the last checkpoint at every ratio that has not been evaluated with as many draws.

    Evaluations on other data than there is now are done again. Each ratio is on the disk before the
    next one begins.
    """
    from mimdet.analysis.evaluate import evaluate_ratios
    from mimdet.processes import pick_device

    model = load_detector(path, trust_code=True)
    t = model.config.training
    model = model.to(pick_device(t.device))
    dataset = build_dataset(model.config.data, "val", t.seed, model.config.detector.masks)
    known = read_ratios(path, dataset.version)
    for ratio in ratios:
        if known.get(ratio, {}).get("draws") == passes(ratio, draws):
            continue
        rows = evaluate_ratios(model, dataset, [ratio], draws, batch_size=t.batch_size)
        known[ratio] = rows[0]
        rows = [known[ratio] for ratio in sorted(known)]
        write_json(path / RATIOS, {"data": dataset.version, "rows": rows})


# ------------------------------------------------------------------------------- processes


class ExperimentStopped(Stopped):
    """Raised after Ctrl-C, when every child has saved and ended; the same call resumes."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        done = sum(run.complete() for run in runs)
        super().__init__(
            f"stopped: {done} of {len(runs)} runs in {runs[0].path.parent} are complete, the "
            "others are saved; the same call resumes them"
        )


def run_all(runs: Sequence[PlannedRun], places: list[dict[str, str]], logs: Path) -> dict[str, str]:
    """Train and evaluate `runs`, one in each place at a time. Returns run name -> its error.

    places: as of `places_for`; logs: folder for what each run prints. On Ctrl-C, or any error here,
    the children save and end before this function does; if this process is killed, they do the same
    on their own.
    """
    from tqdm import tqdm

    files = [MetricsFile(run.path / "metrics.jsonl") for run in runs]
    for file in files:
        file.read()
    waiting, free = deque(runs), deque(places)
    running: list[tuple[PlannedRun, dict[str, str], Child]] = []
    errors: dict[str, str] = {}
    bar = tqdm(
        total=sum(run.steps for run in runs),
        initial=sum(file.step for file in files),
        unit="step",
        mininterval=1,
        smoothing=0,  # runs of unlike speed follow each other: the mean predicts best
        file=sys.stdout,
        dynamic_ncols=True,
    )
    try:
        while waiting or running:
            while waiting and free:
                run, place = waiting.popleft(), free.popleft()
                running.append((run, place, start(run, place, logs)))
            time.sleep(LOOK_EVERY)
            for run, place, child in list(running):
                error = child.ended()
                if error is None:
                    continue
                running.remove((run, place, child))
                free.append(place)
                if error:
                    errors[run.name] = error
                    bar.write(f"FAILED {run.name}: {error}", file=sys.stdout)
            for file in files:
                file.read()
            done = len(runs) - len(waiting) - len(running) - len(errors)
            failed = f", {len(errors)} failed" if errors else ""
            text = f"{done} of {len(runs)} complete, {len(running)} running{failed}"
            bar.set_postfix_str(text, refresh=False)
            bar.update(sum(file.step for file in files) - bar.n)
    finally:
        for *_, child in running:
            child.ask()
        for *_, child in running:
            child.stop(STOP_SECONDS)
        bar.close()
    return errors


def start(run: PlannedRun, place: dict[str, str], logs: Path) -> Child:
    """Make the run's folder and start its process."""
    _check_folder(run)
    Run(run.path, run.cfg).keep(run.arm.code)
    words = ["-m", "mimdet.experiments.runs", str(run.path), str(run.draws), *map(str, run.ratios)]
    return Child(words, logs / f"{run.name}.txt", place, tied=True)


def places_for(runs: Sequence[PlannedRun], processes: int = 0) -> list[dict[str, str]]:
    """Environment variables of each of the runs that are trained at a time.

    processes: how many; 0 = one per GPU, or on CPUs as many as cores allow by the threads of a run.
    With GPUs each run sees one of them, in turn; without, each has as many threads as it asks for.
    """
    import torch

    if processes < 0:
        raise ValueError(f"processes={processes}: how many runs at a time; 0 = as many as fit")
    devices = {run.cfg.training.device for run in runs}
    gpus: list[str] = []
    if devices & {"auto", "cuda"}:
        count = torch.cuda.device_count()
        visible = [name for name in os.environ.get(GPU, "").split(",") if name]
        gpus = (visible or [str(i) for i in range(count)])[:count]
    threads = max([1, *(run.cfg.training.threads for run in runs)])
    # Of a device that is named there is one.
    fitting = usable_cores() // threads if devices <= {"auto", "cpu"} else 1
    count = min(len(runs), processes or len(gpus) or max(1, fitting))
    if gpus:
        return [{GPU: gpus[i % len(gpus)]} for i in range(count)]
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(count)]


if __name__ == "__main__":
    open_console()
    end_with_parent()
    folder, draws, *ratios = sys.argv[1:]
    main(Path(folder), int(draws), [float(ratio) for ratio in ratios])
