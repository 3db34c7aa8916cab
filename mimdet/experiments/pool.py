"""Several runs at once, each in a child process, watched by this one."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mimdet.experiments.plan import PlannedRun, steps_done
from mimdet.experiments.worker import FAILED, STOPPED
from mimdet.training.cell_code import write_slots
from mimdet.training.run import Run

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
    command = [sys.executable, "-m", "mimdet.experiments.worker", str(run.path)]
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


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
