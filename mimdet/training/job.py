"""A training in a process of its own, started, watched and stopped from a notebook.

The kernel stays free, and the training outlives it: a notebook that was closed attaches again. All
that is known about a job stands in the run's folder, so two notebooks may watch one job.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimdet.config import Config, PretrainConfig, load_config
from mimdet.files import read_json, write_json
from mimdet.training.run import Run, holder, read_status, started
from mimdet.training.signals import TrainingStopped
from mimdet.training.slots import check_slots, read_slots, write_slots
from mimdet.training.train import stored_config
from mimdet.training.trainer import summary

RECENT = 50
"""Steps whose mean time counts for the time left."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What is known about a run at one moment."""

    name: str
    """`new` (nothing was started), `starting`, `training`, `stopping`, `finished`, `stopped`,
    `failed`."""
    step: int = 0
    total: int = 0
    """Steps of the whole training; 0 until the first training has opened the data."""
    losses: dict[str, float] = field(default_factory=dict)
    """Of the last step; `loss` is their sum."""
    evaluations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(step, metrics) of each."""
    seconds_left: float | None = None
    """At the pace of the last steps and evaluations; None before the first step."""
    images_per_second: float = 0.0
    gpu_memory_gb: float = 0.0
    """Highest so far; 0 on a CPU."""
    error: str = ""

    @property
    def running(self) -> bool:
        return self.name in ("starting", "training", "stopping")

    def __str__(self) -> str:
        """One line; times and speed only while it trains."""
        of = f" of {self.total}" if self.total else ""
        parts = [f"{self.name}, step {self.step}{of}"]
        if self.losses:
            parts.append(f"loss {self.losses['loss']:.3g}")
        if self.evaluations:
            step, metrics = self.evaluations[-1]
            parts += [f"{text} at step {step}" for text in [summary(metrics)] if text]
        if self.running and self.seconds_left is not None:
            parts.append(f"{self.images_per_second:.1f} images/s")
            parts.append(f"about {duration(self.seconds_left)} left")
            parts += [f"{self.gpu_memory_gb:.1f} GB of GPU memory"] if self.gpu_memory_gb else []
        return ", ".join(parts) + (f": {self.error}" if self.error else "")


class MetricsFile:
    """metrics.jsonl, of which every call of `read` takes the lines that are new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        """Of steps and evaluations, in order."""
        self._place: tuple[int, int] = (0, 0)
        """Which file it was, and the bytes read."""

    def read(self) -> list[dict[str, Any]]:
        """All rows. A training that resumes writes the file anew, without steps it does again."""
        try:
            with self.path.open("rb") as file:
                about = os.fstat(file.fileno())
                number, offset = self._place
                if number != about.st_ino or about.st_size < offset:
                    self.rows, offset = [], 0
                file.seek(offset)
                text = file.read()
        except FileNotFoundError:
            self.rows, self._place = [], (0, 0)
            return self.rows
        whole = text[: text.rfind(b"\n") + 1]
        self._place = (about.st_ino, offset + len(whole))
        self.rows += [json.loads(line) for line in whole.splitlines() if line.strip()]
        return self.rows

    def state(self, name: str, total: int, error: str) -> JobState:
        """What the rows say, with what only the job knows."""
        steps = [row for row in self.rows[-2 * RECENT :] if "loss" in row]
        found = [(row["step"], row["evaluation"]) for row in self.rows if "evaluation" in row]
        step = max((row["step"] for row in self.rows[-2:]), default=0)
        if not steps:
            return JobState(name, step, total, evaluations=found, error=error)
        last, times = steps[-1], [row["time"] for row in steps[-RECENT:]]
        seconds = sum(time["seconds"] for time in times)
        images = sum(row["images"] for row in steps[-RECENT:])
        return JobState(
            name,
            step,
            total,
            {key: value for key, value in last.items() if key.startswith("loss")},
            found,
            seconds_left(self.rows, step, total, seconds / len(times)),
            images / max(seconds, 1e-9),
            last["time"].get("gpu_memory_gb", 0.0),
            error,
        )


def seconds_left(
    rows: Sequence[dict[str, Any]], step: int, total: int, seconds_a_step: float
) -> float | None:
    """Steps at that pace, and evaluations as far apart and as long as the last one; None without
    a total."""
    if not total:
        return None
    left = max(0, total - step) * seconds_a_step
    done = [row for row in rows if "evaluation" in row]
    if done and step < total:
        places = [0, *(row["step"] for row in done)]
        every = max(1, places[-1] - places[-2])
        count = (total - places[-1]) // every + ((total - places[-1]) % every > 0)
        left += count * done[-1].get("time", {}).get("seconds", 0.0)
    return left


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; of a progress bar, which overwrites its line, the last state."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 400 * (count + 5)))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line][-count:]


JOB = "job.json"
"""In the folder of a run: {"pid", "started": `lock.started` of it, "processes", "begun": seconds
since 1970} of the process that was started last; "stopping": when a training was asked to end."""
LOG = "log.txt"
"""In the folder of a run: what its jobs printed."""
LOOK_EVERY = 0.1
KILLED = -9
"""Exit code after SIGKILL."""
STOP_SECONDS = 600
"""What torchrun gives its processes to end a step and save; by default they are killed after 30."""

_children: "dict[int, subprocess.Popen[bytes]]" = {}
"""Jobs started by this process; they are asked how they ended, and not left as zombies."""


class JobFailed(RuntimeError):
    """The training ended with an error, whose text and last lines are the message."""

    def _render_traceback_(self) -> list[str]:
        """What the training said instead of where this notebook waited for it."""
        return [f"JobFailed: {self}"]


class Job:
    """The training of one run directory.

        job = Job.start(cfg, "runs/base")  # returns at once; starting again attaches or resumes
        job.state()  # step, losses, evaluations, time left
        job.stop()  # ends the step, or abandons it, and saves; `start` or `resume` goes on
        job.wait()  # blocks until it has ended

    A job is stopped and resumed as any training: the result is, on a CPU, bit for bit that of an
    undisturbed one with as many processes and threads.
    """

    def __init__(self, run: str | Path, trust_code: bool = False) -> None:
        self.path = Path(run)
        self.trust_code = trust_code
        self.metrics = MetricsFile(self.path / "metrics.jsonl")

    # -------------------------------------------------------------- making one

    @classmethod
    def start(
        cls, cfg: Config | PretrainConfig, run: str | Path, processes: int = 0, **slots: Any
    ) -> "Job":
        """Begin or resume a training in the folder `run`; attach to it where it is going on.

        processes: that train it together; 0 = one per GPU, or one on the CPU. slots: parts that
        were written in the notebook, as for `build_detector` (sampler=..., stem=...). Raises
        ValueError when the folder holds another configuration or other code, or something else.
        """
        job = cls.prepare(cfg, run, **slots)
        job.resume(processes)
        return job

    @classmethod
    def prepare(cls, cfg: Config | PretrainConfig, run: str | Path, **slots: Any) -> "Job":
        """As `start`, without starting anything: the folder is made or checked."""
        path = Path(run)
        Run(path, _as_stored(cfg, path))
        _keep_slots(path / "slots", slots)
        return cls(path, trust_code=bool(slots))

    @classmethod
    def attach(cls, run: str | Path, *, trust_code: bool = False) -> "Job":
        """The job of a run directory, whoever started it and whether or not it is still running.

        trust_code: `resume` may execute what stands in the run's slots/. Raises FileNotFoundError
        when the folder holds no run.
        """
        if not (Path(run) / "config.json").exists():
            raise FileNotFoundError(f"{run} holds no run: there is no config.json in it")
        return cls(run, trust_code)

    def resume(self, processes: int = 0) -> None:
        """Start the run's training, or go on with it; nothing happens where one is running."""
        if self.running():
            return
        if (self.path / "slots" / "slots.json").exists() and not self.trust_code:
            raise PermissionError(
                f"{self.path / 'slots'} holds code written for this run. Read it; if you trust it, "
                "attach with trust_code=True."
            )
        cfg = stored_config(self.path)
        count = processes or default_processes(cfg)
        if cfg.training.accumulate % count:
            raise ValueError(
                f"processes={count} cannot share the accumulate={cfg.training.accumulate} "
                "micro-batches of a step: use a divisor of it"
            )
        command = self.command(count)
        with (self.path / LOG).open("ab") as log:
            log.write(f"\n$ python {' '.join(command[1:])}\n".encode())
            log.flush()
            begun = time.time()
            child = subprocess.Popen(
                command,
                env=os.environ | _threads(cfg, count),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **_own_group(),
            )
        _children[child.pid] = child
        about = {"pid": child.pid, "started": started(child.pid), "processes": count}
        self._note(about | {"begun": begun})

    def command(self, processes: int = 1) -> list[str]:
        """What is started; without its first word, what goes on with the run in a terminal."""
        words = ["-m", "mimdet", "resume", str(self.path)]
        if self.trust_code and (self.path / "slots" / "slots.json").exists():
            words.append("--trust-code")
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            words = [*torchrun, f"--nproc-per-node={processes}", *_patience(), *words]
        return [sys.executable, *words]

    # -------------------------------------------------------------- looking at it

    def running(self) -> bool:
        """Whether a process works on the run, be it this job's or one started in a terminal."""
        return self._alive() or holder(self.path) is not None

    def state(self) -> JobState:
        """What is known about the run now; cheap enough for every second."""
        running = self.running()  # asked first: what ends meanwhile has written its last lines
        about, status = self._about(), read_status(self.path)
        self.metrics.read()
        begun = about.get("begun", 0.0) if self._alive() or not running else 0.0
        fresh = status.get("began", 0.0) >= begun and bool(status)
        asked = "stopping" in about and (not fresh or about["stopping"] > status["began"])
        error = ""
        if running:
            name = "training" if fresh and status["state"] == "training" else "starting"
            ending = begun and fresh and status["state"] != "training"  # said its last word
            name = "stopping" if asked or ending else name
        elif not about and not status:
            name = "new"
        elif fresh and status["state"] != "training":
            name, error = status["state"], status["error"]
        elif asked and self._code() != KILLED:
            name = "stopped"  # before its first step
        else:
            name, error = "failed", self._said(fresh)
        return self.metrics.state(name, status.get("total", 0), error)

    def log(self, lines: int = 20) -> list[str]:
        """The last lines that were printed."""
        return last_lines(self.path / LOG, lines)

    # -------------------------------------------------------------- ending it

    def stop(self) -> bool:
        """Ask it to save and end, as Ctrl-C does; returns at once. False when nothing runs.

        One process abandons its step. Several end theirs first, and an evaluation. A training that
        was started in a terminal of this machine is asked too.
        """
        about, found = self._about(), holder(self.path)
        if not self._alive() and found is None:
            return False
        if not self._alive() and found is not None and not found.here:
            raise RuntimeError(f"{found} trains in {self.path}: stop it there")
        pid = about["pid"] if self._alive() or found is None else found.pid
        self._note(about | {"stopping": time.time()})
        # Not SIGINT: a notebook's kernel ignores it between two cells, and what is started then
        # inherits that. Not to the group: the loader's processes end with the training.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        return True

    def wait(self, timeout: float | None = None) -> JobState:
        """Block until it has ended, at most `timeout` seconds; returns its state then.

        Ctrl-C (the notebook's stop button) stops the job too: TrainingStopped is raised, one line,
        when it has saved. Raises JobFailed, with the last lines it printed, where it failed.
        """
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        try:
            while self.running() and time.monotonic() < end:
                time.sleep(LOOK_EVERY)
        except KeyboardInterrupt:
            self.stop()
            step = self.wait(STOP_SECONDS).step
            raise TrainingStopped(step, self.path, signal.SIGINT) from None
        state = self.state()
        if state.name == "failed":
            tail = "\n  ".join(self.log())
            raise JobFailed(f"{state.error}\nThe end of {self.path / LOG}:\n  {tail}")
        return state

    # -------------------------------------------------------------- small parts

    def _about(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = read_json(self.path / JOB)
        except (FileNotFoundError, ValueError):
            return {}
        here = str(self.path.resolve())
        return found if found.get("run", here) == here else {}  # else a copy of a run elsewhere

    def _note(self, about: dict[str, Any]) -> None:
        write_json(self.path / JOB, about | {"run": str(self.path.resolve())})

    def _code(self) -> int | None:
        """Exit code of the process; None while it runs, or where another process started it."""
        child = _children.get(self._about().get("pid", 0))
        return None if child is None else child.poll()

    def _alive(self) -> bool:
        about = self._about()
        pid = about.get("pid", 0)
        if pid in _children:
            return _children[pid].poll() is None
        return bool(pid) and bool(about["started"]) and started(pid) == about["started"]

    def _said(self, began: bool) -> str:
        """Why the process ended, as far as it said so."""
        errors = [line for line in self.log(200) if line.startswith("error: ")]
        if errors and not began:
            return errors[-1].removeprefix("error: ")
        code = self._code()
        if code == KILLED or (code is None and began):
            return "the process was killed (is the memory full?); its last checkpoint counts"
        last = self.log(1)
        said = f": {last[0]}" if last else ""
        return f"the process ended{'' if code is None else f' with exit code {code}'}{said}"


def default_processes(cfg: Config | PretrainConfig) -> int:
    """One per GPU, as far as they can share a step's micro-batches; one on a CPU."""
    import torch

    gpus = torch.cuda.device_count() if cfg.training.device in ("auto", "cuda") else 0
    shared = [n for n in range(1, gpus + 1) if cfg.training.accumulate % n == 0]
    return max(shared, default=1)


def _as_stored(cfg: Config | PretrainConfig, path: Path) -> Config | PretrainConfig:
    """With the class count, and the mask head left out, that the run's data asked for.

    Training reads them off the data and writes them into the run.
    """
    file = path / "config.json"
    if not isinstance(cfg, Config) or not file.exists():
        return cfg
    cfg, stored = copy.deepcopy(cfg), load_config(file)
    cfg.detector.num_classes = stored.detector.num_classes
    cfg.detector.masks = cfg.detector.masks and stored.detector.masks
    return cfg


def _keep_slots(folder: Path, slots: dict[str, Any]) -> None:
    """Write the code of the slots, or see that the run holds the same. ValueError otherwise."""
    texts = read_slots(slots)
    begun = (folder.parent / "environment.json").exists()
    if begun or (folder / "slots.json").exists():
        check_slots(folder.parent, texts)
    write_slots(folder, texts)


def _threads(cfg: Config | PretrainConfig, processes: int) -> dict[str, str]:
    """As many CPU threads as this process uses, shared: PyTorch's default takes every core."""
    import torch

    count = cfg.training.threads or max(1, torch.get_num_threads() // processes)
    return {"OMP_NUM_THREADS": str(count)}


def _patience() -> list[str]:
    """The option that keeps torchrun from killing a step that takes long, where it has it."""
    from torch.distributed.launcher.api import LaunchConfig

    known = "shutdown_timeout" in LaunchConfig.__dataclass_fields__
    return [f"--shutdown-timeout={STOP_SECONDS}"] if known else []


def _own_group() -> dict[str, Any]:
    """Neither Ctrl-C in the notebook's terminal nor the end of the kernel reaches the job."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}
