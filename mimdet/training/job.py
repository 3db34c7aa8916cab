"""Processes of this library that this one starts, and a training in such a process.

`Child` is the one owner of a process:

    child = Child(["-m", "mimdet", "resume", "runs/x"], Path("runs/x/log.txt"))  # it has started
    child.ask()  # SIGTERM: a training saves and ends; returns at once
    child.stop(30)  # the same, waits, and kills what is left after 30 seconds
    child.ended()  # None while it runs, "" when all went well, else why it failed

With `tied=True` one that calls `end_with_parent` ends politely when this process ends, however that
ends; any other outlives it.

`Job` is a training of a run in a child, started, watched and stopped from a notebook. The kernel
stays free, and the training outlives it: a notebook that was closed attaches again. All that is
known about a job stands in the run's folder, so two notebooks may watch one job.
"""

import copy
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from mimdet.config import Config, PretrainConfig
from mimdet.console import ERROR, Failed
from mimdet.data.coco import build_dataset
from mimdet.files import write_json
from mimdet.training.briefing import default_processes
from mimdet.training.checkpoints import MetricsFile
from mimdet.training.owner import (
    JOB,
    STATUS,
    in_use,
    process_of,
    process_record,
    read_job,
    read_status,
)
from mimdet.training.run import LOG, Run, TrainingStopped, stored_config
from mimdet.training.slots import check_trust, name_dataset, read_slots
from mimdet.training.train import adapt_to_data, check_start, summary

LOOK_EVERY = 0.1
STOP_SECONDS = 600
"""What torchrun gives its processes to end a step and save; by default they are killed after 30."""
KILLED = -9
"""Exit code after SIGKILL."""
ASKED = (129, 130, 143, -1, -2, -15)
"""Exit codes of a process that was asked to end: by SIGHUP, SIGINT or SIGTERM."""


class Child:
    """A Python process started by this one. words: what follows `python` on the command line.

    log: file to which its output is added; environment: variables besides this process's own.
    """

    def __init__(
        self,
        words: list[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        tied: bool = False,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        variables = os.environ | dict(environment or {})
        # Neither Ctrl-C in the terminal nor the end of this process reaches a group of its own.
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with log.open("ab") as output:
            output.write(f"\n$ python {' '.join(words)}\n".encode())
            output.flush()
            self.process = psutil.Popen(
                [sys.executable, *words],
                env=variables,
                stdin=subprocess.PIPE if tied else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **group,
            )

    def ask(self) -> None:
        """Ask it to save and end; returns at once."""
        ask_to_end(self.process)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask it to save and end, wait for that, kill it after so many seconds or on Ctrl-C."""
        self.ask()
        try:
            self.process.wait(seconds)
        except (psutil.TimeoutExpired, KeyboardInterrupt):
            self.process.kill()
            self.process.wait()

    def ended(self) -> str | None:
        """None while it runs, "" when all went well, else why it ended."""
        code = self.process.poll()
        return None if code is None else reason(code, self.log)


def end_with_parent() -> None:
    """In a tied child: SIGTERM to itself when its standard input, the parent's pipe, is closed."""

    def wait_for_the_end() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock must be free when Python exits
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def ask_to_end(process: psutil.Process) -> None:
    """SIGTERM. A notebook's kernel ignores SIGINT between two cells, and children inherit that.

    Not to the group: the loader's processes end with the training.
    """
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)


def reason(code: int | None, log: Path) -> str:
    """Why a process ended, from its exit code (None: not known) and what it printed; "" = well."""
    if code == 0:
        return ""
    if code in ASKED:
        return "it was stopped from outside and is saved; the same call resumes it"
    lines = last_lines(log, 200)
    begins = [i for i, line in enumerate(lines) if line.startswith("$ python ")]
    printed = lines[begins[-1] + 1 :] if begins else lines
    said = [line for line in printed if line.startswith(ERROR)]
    if said:
        return said[-1].removeprefix(ERROR)
    if code is None or code == KILLED:
        return "the process was killed (is the memory full?); its last checkpoint counts"
    return f"the process ended with exit code {code}; its output is in {log}"


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; of a progress bar, which overwrites its line, the last state."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * (count + 5)))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line][-count:]


# ------------------------------------------------------------------------------- what is known

ENDED = ("finished", "stopped", "failed")
RECENT = 50
"""Steps whose mean time counts for the speed."""


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
    """At the mean pace so far, evaluations included; None before the first step."""
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
            parts.append(f"about {tqdm.format_interval(self.seconds_left)} left")
            parts += [f"{self.gpu_memory_gb:.1f} GB of GPU memory"] if self.gpu_memory_gb else []
        return ", ".join(parts) + (f": {self.error}" if self.error else "")


def job_state(name: str, rows: list[dict[str, Any]], total: int, error: str) -> JobState:
    """rows: of metrics.jsonl; name, total and error: what they do not say."""
    evaluations = [(row["step"], row["evaluation"]) for row in rows if "evaluation" in row]
    recent = [row for row in rows[-2 * RECENT :] if "loss" in row][-RECENT:]
    step = rows[-1]["step"] if rows else 0
    if not recent:
        return JobState(name, step, total, evaluations=evaluations, error=error)
    last = recent[-1]
    spent = sum(row.get("time", {}).get("seconds", 0.0) for row in rows)
    return JobState(
        name,
        step,
        total,
        losses={key: value for key, value in last.items() if key.startswith("loss")},
        evaluations=evaluations,
        seconds_left=spent / step * max(0, total - step) if total else None,
        images_per_second=sum(row["images"] for row in recent)
        / max(sum(row["time"]["seconds"] for row in recent), 1e-9),
        gpu_memory_gb=last["time"].get("gpu_memory_gb", 0.0),
        error=error,
    )


# ------------------------------------------------------------------------------- the job

_children: dict[int, Child] = {}
"""Jobs started by this process; they are asked how they ended, and not left as zombies."""


class JobFailed(Failed):
    """The training ended with an error, whose text and last lines are the message."""

    def _render_traceback_(self) -> list[str]:
        """What the training said instead of where this notebook waited for it."""
        return [f"JobFailed: {self}"]


class Job:
    """The training of one run directory.

        job = Job.start(cfg, "runs/base")  # returns at once; starting again attaches or resumes
        job.state()  # step, losses, evaluations, time left
        job.stop()  # ends the step, or abandons it, and saves; `start` or `resume` continues
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
        if isinstance(cfg, Config) and "dataset" not in slots:
            # A wrong path fails here, at once.
            build_dataset(cfg.data, "train", cfg.training.seed, cfg.detector.masks)
        job = cls.prepare(cfg, run, **slots)
        job.resume(processes)
        return job

    @classmethod
    def prepare(cls, cfg: Config | PretrainConfig, run: str | Path, **slots: Any) -> "Job":
        """As `start`, without starting anything: the folder is made or checked.

        The class count follows from the data where they can be opened already.
        """
        path, cfg, texts = Path(run), copy.deepcopy(cfg), read_slots(slots)
        if isinstance(cfg, Config):
            check_start(cfg)
            name_dataset(cfg, texts)
            with suppress(ValueError, OSError):  # data that come later are opened when it starts
                masks = cfg.detector.masks
                adapt_to_data(cfg, build_dataset(cfg.data, "train", cfg.training.seed, masks))
        Run(path, cfg).keep(texts)
        return cls(path, trust_code=True)

    @classmethod
    def attach(cls, run: str | Path, *, trust_code: bool = False) -> "Job":
        """The job of a run directory, whoever started it and whether or not it is still running.

        trust_code: `resume` may execute the code that the run holds or names. Raises
        FileNotFoundError when the folder holds no run.
        """
        stored_config(Path(run))
        return cls(run, trust_code)

    def resume(self, processes: int = 0) -> None:
        """Start the run's training, or go on with it; nothing happens where one is running."""
        if self.running():
            return
        cfg = stored_config(self.path)
        check_trust(self.path, cfg, self.trust_code)
        count = processes or default_processes(cfg)
        if cfg.training.accumulate % count:
            raise ValueError(
                f"processes={count} cannot share the accumulate={cfg.training.accumulate} "
                "micro-batches of a step: use a divisor of it, or 0"
            )
        status = {"state": "starting", "error": "", "began": time.time()}
        write_json(self.path / STATUS, read_status(self.path) | status)
        child = Child(self.words(count), self.path / LOG, _environment(cfg, count))
        _children[child.process.pid] = child
        self._note(process_record(child.process))

    def words(self, processes: int = 1) -> list[str]:
        """What follows `python` to go on with the run, here or in a terminal."""
        words = ["-m", "mimdet", "resume", str(self.path)]
        words += ["--trust-code"] if self.trust_code else []
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            words = [*torchrun, f"--nproc-per-node={processes}", *words]
        return words

    # -------------------------------------------------------------- looking at it

    def running(self) -> bool:
        """Whether a process works on the run, be it this job's or one started in a terminal."""
        return self._process() is not None or in_use(self.path)

    def state(self) -> JobState:
        """What is known about the run now; cheap enough for every second."""
        running = self.running()  # asked first: what ends meanwhile has written its last lines
        status = read_status(self.path)
        name, error = status["state"], status["error"]
        asked = read_job(self.path).get("stopping", 0.0) > status["began"]
        if running and (asked or name in ENDED):  # the last word is said before the last breath
            name = "stopping"
        elif running and name == "new":  # from a terminal, with its data still to be opened
            name = "starting"
        elif not running and name in ("starting", "training"):  # it could not say how it ended
            name, error = "failed", reason(self._code(), self.path / LOG)
            if asked and self._code() != KILLED:
                name, error = "stopped", ""  # before its first step
        return job_state(name, self.metrics.read(), status["total"], error)

    def log(self, lines: int = 20) -> list[str]:
        """The last lines that were printed."""
        return last_lines(self.path / LOG, lines)

    # -------------------------------------------------------------- ending it

    def stop(self) -> bool:
        """Ask it to save and end, as Ctrl-C does; returns at once. False when nothing runs.

        One process abandons its step. Several end theirs first, and an evaluation. A training that
        was started in a terminal of this machine is asked too.
        """
        if not self.running():
            return False
        status = read_status(self.path)
        process = self._process() or process_of(status)
        where = status.get("host", platform.node())
        if process is None and where != platform.node():
            raise Failed(f"a process on {where} trains in {self.path}: stop it there")
        self._note(read_job(self.path) | {"stopping": time.time()})
        if process is not None:
            ask_to_end(process)
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

    def _note(self, about: dict[str, Any]) -> None:
        write_json(self.path / JOB, about | {"run": str(self.path.resolve())})

    def _process(self) -> psutil.Process | None:
        """The child that was started last, while it lives; one that has ended is reaped."""
        self._code()
        return process_of(read_job(self.path))

    def _code(self) -> int | None:
        """Exit code of the process; None where another process started it."""
        child = _children.get(read_job(self.path).get("pid", 0))
        return None if child is None else child.process.poll()


def _environment(cfg: Config | PretrainConfig, processes: int) -> dict[str, str]:
    """As many CPU threads as this process uses, shared: PyTorch's default takes every core.

    And time for torchrun's processes to end a step that takes long.
    """
    count = cfg.training.threads or max(1, torch.get_num_threads() // processes)
    return {"OMP_NUM_THREADS": str(count), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_SECONDS)}
