"""Several runs at once, each in a child process, watched by this one."""

import _thread
import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mimdet.config import Config, flat
from mimdet.data.augment import resize_of
from mimdet.data.coco import build_dataset
from mimdet.data.loader import Dataset
from mimdet.experiments.grid import Arm
from mimdet.files import write_json
from mimdet.models.backbones import BASELINES
from mimdet.processes import usable_cores
from mimdet.training.run import Run, alone_in
from mimdet.training.slots import write_slots
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
    sizes = [resize_of(cfg.data).size(*data.image_size(i)) for i in range(count)]
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


STOPPED = 130
"""Exit code after an interruption; everything is saved."""
FAILED = "error: "
"""Begins the last line that a failed run prints."""
LOCK_SECONDS = 60.0
"""How long to wait for a process that still works on the same run; one that stops needs 20 s."""


def main(words: list[str]) -> int:
    """The process. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="mimdet.experiments.runs")
    parser.add_argument("run", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", required=True)
    parser.add_argument("--draws", type=int, required=True)
    parser.add_argument("--trust-code", action="store_true")
    options = parser.parse_args(words)
    from mimdet.training.signals import TrainingStopped

    try:
        with alone_in(options.run, LOCK_SECONDS):
            train_run(options.run, options.trust_code)
            evaluate_run(options.run, options.ratios, options.draws, options.trust_code)
    except (TrainingStopped, KeyboardInterrupt) as stopped:
        print(str(stopped) or "stopped")
        return STOPPED
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        print(FAILED + f"{type(error).__name__}: {error}".replace("\n", " "))
        return 1
    return 0


def train_run(path: Path, trust_code: bool) -> None:
    """Train, or go on, to the last step. Notes the seconds of every step."""
    from mimdet.training.train import resume

    wall, cpu = time.perf_counter(), time.process_time()
    with (path / CLOCK).open("a", encoding="utf-8") as clock:
        for step in resume(path, trust_code=trust_code, locked=True):
            now = time.perf_counter(), time.process_time()
            row = {"step": step.number, "wall_seconds": now[0] - wall, "cpu_seconds": now[1] - cpu}
            clock.write(json.dumps(row) + "\n")
            clock.flush()
            wall, cpu = now


def evaluate_run(path: Path, ratios: list[float], draws: int, trust_code: bool) -> None:
    """Evaluate the last checkpoint at every ratio that has not been evaluated with as many draws.

    Evaluations on other data than there is now are done again. Each ratio is on the disk before the
    next one begins.
    """
    from mimdet.analysis.evaluate import evaluate_ratios
    from mimdet.data.coco import build_dataset
    from mimdet.training.run import load_detector
    from mimdet.training.trainer import pick_device, use_threads

    model = load_detector(path, trust_code=trust_code)
    model = model.to(pick_device(model.config.training.device))
    use_threads(model.config.training.threads)
    dataset = build_dataset(model.config.data, "val", model.config.training.seed)
    known = {row["sample_ratio"]: row for row in read_ratios(path, dataset.version)}
    missing = [r for r in ratios if known.get(r, {}).get("draws") != passes(r, draws)]
    for ratio in missing:
        cpu = time.process_time()
        row: dict[str, Any] = evaluate_ratios(
            model, dataset, [ratio], draws, batch_size=model.config.training.batch_size
        )[0]
        known[ratio] = row | {"cpu_seconds": round(time.process_time() - cpu, 2)}
        rows = [known[ratio] for ratio in sorted(known)]
        write_json(path / RATIOS, {"data": dataset.version, "rows": rows})


# ------------------------------------------------------------------------------- processes


def listen() -> None:
    """Raise KeyboardInterrupt in the main thread on SIGINT, SIGTERM and the end of standard input.

    SIGINT is set too: a process started in the background of a script inherits it as ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    def wait_for_the_end() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock must be free when Python exits
            pass
        main_thread = threading.main_thread().ident
        if hasattr(signal, "pthread_kill") and main_thread is not None:
            signal.pthread_kill(main_thread, signal.SIGINT)  # also ends a wait for the system
        else:
            _thread.interrupt_main()

    threading.Thread(target=wait_for_the_end, daemon=True).start()


if __name__ == "__main__":
    listen()
    sys.exit(main(sys.argv[1:]))


STOP_SECONDS = 30.0
"""A run has this long to save and end; then it is killed, and its last checkpoint counts."""
LOOK_EVERY = 0.2
SHOW_EVERY = 1.0


class ExperimentStopped(Exception):
    """Raised after Ctrl-C, when every child has saved and ended; the same call goes on."""

    def __init__(self, done: int, runs: int, folder: Path) -> None:
        super().__init__(
            f"stopped: {done} of {runs} runs in {folder} are complete, the others are saved; "
            "the same call goes on"
        )

    def _render_traceback_(self) -> list[str]:
        """One line in a notebook instead of a traceback."""
        return [str(self)]


@dataclass(slots=True)
class Child:
    """A run being trained."""

    run: PlannedRun
    process: "subprocess.Popen[bytes]"
    place: dict[str, str]
    log: Path

    def error(self) -> str:
        """Why the ended process failed; empty when it did not."""
        code = self.process.returncode
        if code == 0:
            return ""
        if code == STOPPED:
            return "it was stopped from outside and is saved; the same call goes on"
        text = self.log.read_text(encoding="utf-8", errors="replace")
        said = [line for line in text.splitlines() if line.startswith(FAILED)]
        if said:
            return said[-1].removeprefix(FAILED)
        return f"the process ended with {_code_text(code)}; its output is in {self.log}"


def run_all(
    runs: Sequence[PlannedRun], processes: int, logs: Path, progress: bool = True
) -> dict[str, str]:
    """Train and evaluate `runs`, at most `processes` at a time. Returns run name -> its error.

    logs: folder for what each run prints. On Ctrl-C, or any error here, the children save and end
    before this function does; if this process is killed, they do the same on their own.
    """
    waiting = deque(runs)
    free = deque(places(runs, processes))
    running: list[Child] = []
    errors: dict[str, str] = {}
    bar = _Progress(runs) if progress else None
    try:
        while waiting or running:
            while waiting and free:
                running.append(start(waiting.popleft(), free.popleft(), logs))
            time.sleep(LOOK_EVERY)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                free.append(child.place)
                if child.error():
                    errors[child.run.name] = child.error()
            if bar is not None:
                bar.show(len(running), errors)
    finally:
        stop(running)
        if bar is not None:
            bar.close(errors)
    return errors


def start(run: PlannedRun, place: dict[str, str], logs: Path) -> Child:
    """Make the run's folder and start its process."""
    Run(run.path, run.cfg)
    write_slots(run.path / "slots", run.arm.code)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{run.name}.txt"
    command = [sys.executable, "-m", "mimdet.experiments.runs", str(run.path)]
    command += ["--ratios", *map(str, run.ratios), "--draws", str(run.draws)]
    # The code is this caller's own; a folder from elsewhere gets no such consent.
    command += ["--trust-code"] if run.arm.code else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | place,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            **_own_group(),
        )
    return Child(run, process, place, log)


def stop(children: Sequence[Child]) -> None:
    """End the children: each saves. A second Ctrl-C, or STOP_SECONDS, kills them."""
    end = time.monotonic() + STOP_SECONDS
    try:
        for child in children:
            _input_of(child).close()  # the worker takes this as Ctrl-C
        for child in children:
            child.process.wait(max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()


# ------------------------------------------------------------------------------- where runs run


def count_processes(runs: Sequence[PlannedRun], asked: int) -> int:
    """How many runs to train at a time. ValueError for a negative number."""
    if asked < 0:
        raise ValueError(f"processes={asked}: how many runs at a time; 0 = as many as fit")
    return asked or default_processes(runs)


def default_processes(runs: Sequence[PlannedRun]) -> int:
    """One run per GPU; on CPUs as many as cores allow, by the threads of a run."""
    if not runs:
        return 1
    gpus = gpu_names(runs)
    if gpus:
        return min(len(gpus), len(runs))
    if any(run.cfg.training.device not in ("auto", "cpu") for run in runs):
        return 1  # one device was named, and there is one of it
    return max(1, min(len(runs), usable_cores() // most_threads(runs)))


def places(runs: Sequence[PlannedRun], processes: int) -> list[dict[str, str]]:
    """Environment variables of each of the `processes` runs that are trained at a time.

    With GPUs each sees one of them, in turn; without, each has as many threads as it asks for.
    """
    gpus = gpu_names(runs)
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(processes)]
    threads = str(most_threads(runs))
    return [{"OMP_NUM_THREADS": threads} for _ in range(processes)]


def gpu_names(runs: Sequence[PlannedRun]) -> list[str]:
    """The GPUs that the runs may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not any(run.cfg.training.device in ("auto", "cuda") for run in runs):
        return []
    count = torch.cuda.device_count()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (visible or [str(i) for i in range(count)])[:count]


def most_threads(runs: Sequence[PlannedRun]) -> int:
    return max([1, *(run.cfg.training.threads for run in runs)])


# ------------------------------------------------------------------------------- small parts


class _Progress:
    """One line: steps of all runs, time left, runs done."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        from tqdm import tqdm

        self.runs = runs
        self.reported: set[str] = set()
        self.due = 0.0
        self.bar = tqdm(
            total=sum(run.steps for run in runs),
            initial=self.steps(),
            unit="step",
            mininterval=1,
            smoothing=0,  # runs of unlike speed follow each other: the mean predicts best
            file=sys.stdout,
            dynamic_ncols=True,
        )

    def steps(self) -> int:
        return sum(steps_done(run.path) for run in self.runs)

    def show(self, running: int, errors: dict[str, str], now: bool = False) -> None:
        for name in errors:
            if name not in self.reported:
                self.reported.add(name)
                self.bar.write(f"FAILED {name}: {errors[name]}", file=sys.stdout)
        if time.monotonic() < self.due and not now:
            return  # it reads files of every run
        self.due = time.monotonic() + SHOW_EVERY
        done = sum(run.complete() for run in self.runs)
        failed = f", {len(errors)} failed" if errors else ""
        text = f"{done} of {len(self.runs)} complete, {running} running{failed}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self.steps() - self.bar.n)

    def close(self, errors: dict[str, str]) -> None:
        self.show(0, errors, now=True)
        self.bar.close()


def _own_group() -> dict[str, Any]:
    """Ctrl-C in the terminal reaches this process only, which then stops the children."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _input_of(child: Child) -> IO[bytes]:
    assert child.process.stdin is not None
    return child.process.stdin


def _code_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return name + (" (is the memory full?)" if name == "SIGKILL" else "")
