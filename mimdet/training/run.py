"""A run is the directory of one training:

    config.json       every number of the run; another configuration is refused here
    metrics.jsonl     a line a step (losses, gradient norm, rate, times), a line an evaluation
    checkpoints       weights and optimiser state of the last two steps saved, and of the best
    eval.json         metrics of the last evaluation
    predictions.json  its detections in COCO's results format
    evaluation.json   metrics at several sample ratios, from `mimdet evaluate`
    categories.json   class names, so that the folder alone is enough to predict
    slots             code of parts that were written in a notebook
    environment.json  versions, machine, seed, fingerprint of the data
    log.txt           what a job printed that was started from a notebook
    job.json          its process, so that it can be found again
    status.json       how the last training ended
    lock              held while a process trains here: a second one is refused

A run of `mimdet pretrain` holds mae.safetensors and pictures of reconstructions besides.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from mimdet import __version__, processes
from mimdet.config import (
    MODEL_PART,
    Config,
    PretrainConfig,
    difference,
    load_config,
    save_config,
)
from mimdet.console import Stopped
from mimdet.files import read_json, sync, write_json, write_text
from mimdet.models.checkpoint_files import read_checkpoint, read_safetensors, shipped
from mimdet.models.detector import Detector, read_categories
from mimdet.models.official import detector_of, load_weights
from mimdet.training.slots import SlotText, check_slots, load_slots, write_slots

MAE_FILE = "mae.safetensors"
"""What `mimdet pretrain` leaves in its run for others to read."""


class Run:
    """The directory of one training. Same configuration: resumed. Another one: an error."""

    def __init__(
        self, path: str | Path, cfg: Config | PretrainConfig, *, locked: bool = False
    ) -> None:
        """locked: this process already holds the run's lock (`alone_in`) while it trains here."""
        self.path = Path(path)
        self.locked = locked
        self.cfg = cfg
        self.store = CheckpointStore(self.path / "checkpoints", cfg.training.keep_checkpoints)
        self.rows = MetricsFile(self.path / "metrics.jsonl")
        existing = self.path / "config.json"
        if existing.exists():
            changed = difference(load_config(existing, type(cfg)), cfg)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another configuration:\n  "
                    + "\n  ".join(changed)
                    + "\nUse another run name, or the old values to resume it."
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run: use another run name")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(cfg, existing)

    @contextmanager
    def in_training(self, total: int, done: Callable[[], int]) -> Iterator[None]:
        """Keep other trainings out of the run, and STATUS up to date, while one goes on inside.

        total: its steps; done: asks for those done. RunInUse, in every process, if one is in.
        """
        first = processes.rank() == 0
        with ExitStack() as stack:
            refused = ""
            if first and not self.locked:
                try:
                    stack.enter_context(alone_in(self.path))
                except RunInUse as error:
                    refused = str(error)
            refused = processes.from_first(refused)
            if refused:
                raise RunInUse(refused)
            if first:
                stack.enter_context(_reported(self.path, total, done))
            yield

    def keep(self, texts: dict[str, SlotText]) -> None:
        """Keep the code of parts that were written in a notebook, or see that it is the same."""
        begun = ("environment.json", "slots/slots.json")
        if any((self.path / name).exists() for name in begun):
            check_slots(self.path, texts)
        elif processes.rank() == 0:
            write_slots(self.path, texts)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.rows.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: one per step and one per evaluation."""
        return self.rows.read()

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations: {"step", "data", "evaluation", "time"}."""
        return [row for row in self.metrics() if "evaluation" in row]

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be done again."""
        kept = [json.dumps(row) for row in self.metrics() if row["step"] <= step]
        write_text(self.rows.path, "".join(line + "\n" for line in kept))


class MetricsFile:
    """The rows of metrics.jsonl, also while a training writes it; `read` takes the new ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        """Of steps and evaluations, in order."""
        self._read: tuple[int, int] = (0, 0)
        """Which file it was, and the bytes read."""

    @property
    def step(self) -> int:
        """The last step in the rows read so far; 0 before the first."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def read(self) -> list[dict[str, Any]]:
        """All rows; a line that is half written (or was, when its process was killed) is none.

        A training that resumes writes the file anew, without the steps it does again.
        """
        try:
            with self.path.open("rb") as file:
                about = os.fstat(file.fileno())
                number, offset = self._read
                if number != about.st_ino or about.st_size < offset:
                    self.rows, offset = [], 0
                file.seek(offset)
                text = file.read()
        except FileNotFoundError:
            self.rows, self._read = [], (0, 0)
            return self.rows
        whole = text[: text.rfind(b"\n") + 1]
        self._read = (about.st_ino, offset + len(whole))
        self.rows += [json.loads(line) for line in whole.splitlines()]
        return self.rows


# ------------------------------------------------------------------------------- checkpoints

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
PARTIAL = ".partial-"
"""Begins the name of a folder that is being written or deleted."""


@dataclass(slots=True)
class Checkpoint:
    """The state after an optimiser step."""

    step: int
    weights: dict[str, Tensor]
    """Parameters and buffers of the detector."""
    optimizer: dict[str, Any]
    """State of the optimiser and of the gradient scaler."""
    model_part: str = "{}"
    """Of the configuration (`mimdet.config.model_part`)."""


class CheckpointStore:
    """The folder `checkpoints/`: one folder per step, and the pointers `last` and `best`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Write beside, flush, rename; then move `last` and drop the oldest ones."""
        place = self.folder / f"{checkpoint.step:06d}"
        for left in self.folder.glob(f"{PARTIAL}*"):  # by a killed process; none other trains here
            shutil.rmtree(left, ignore_errors=True)
        partial = self.folder / f"{PARTIAL}{place.name}"
        partial.mkdir(parents=True)
        try:
            weights = {name: value.contiguous() for name, value in checkpoint.weights.items()}
            save_file(weights, partial / WEIGHTS, {MODEL_PART: checkpoint.model_part})
            torch.save(checkpoint.optimizer, partial / OPTIMIZER)
            for file in partial.iterdir():
                sync(file)
            if place.exists():  # not complete, or it would not be saved anew
                self._delete(place)
            os.replace(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync(self.folder)
        self.point("last", place.name)
        best = self.find("best")
        for step in self.steps()[: -self.keep]:
            old = self.folder / f"{step:06d}"
            if old != best:
                self._delete(old)

    def point(self, name: str, target: str) -> None:
        """Make the pointer file `last` or `best` name a checkpoint."""
        write_text(self.folder / name, target + "\n")

    def find(self, name: str | int) -> Path | None:
        """The checkpoint of a step, or the one that `last` or `best` points to; else None."""
        pointer = self.folder / str(name)
        target = pointer.read_text().strip() if pointer.is_file() else str(name).zfill(6)
        place = self.folder / target
        return place if (place / WEIGHTS).exists() else None

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        if not self.folder.exists():
            return []
        places = [place for place in self.folder.iterdir() if place.name.isdecimal()]
        files = (WEIGHTS, OPTIMIZER)
        return sorted(int(p.name) for p in places if all((p / file).exists() for file in files))

    def load_last(self, device: torch.device) -> Checkpoint | None:
        """The newest complete checkpoint, or None in a fresh run."""
        steps = self.steps()
        if not steps:
            return None
        place = self.folder / f"{steps[-1]:06d}"
        optimizer = torch.load(place / OPTIMIZER, map_location=device, weights_only=True)
        weights, metadata = read_safetensors(place / WEIGHTS)
        return Checkpoint(steps[-1], weights, optimizer, metadata.get(MODEL_PART, "{}"))

    def _delete(self, place: Path) -> None:
        """Out of sight first: a process that is killed meanwhile leaves no half of a checkpoint."""
        partial = self.folder / f"{PARTIAL}{place.name}-old"
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(place, partial)
        shutil.rmtree(partial)


# ------------------------------------------------------------------------------- who trains here

LOCK = "lock"
STATUS = "status.json"
"""In the folder of a run: {"state": "starting" (by a `Job`), "training", "finished", "stopped" or
"failed", "step", "total", "error", "began": seconds since 1970} and the `process_record` of the
last training."""
WAIT_SECONDS = 2.0
"""A process that only looks whether a run is in use holds the lock for a moment."""


class RunInUse(ValueError):
    """Another process trains in this run."""


class TrainingStopped(Stopped):
    """Raised after the checkpoint is written; the same call resumes."""

    def __init__(self, step: int, run: Path, signal_number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}: step {step} is saved in {run}; "
            "run the same command again to resume"
        )
        self.signal_number = signal_number


@contextmanager
def alone_in(path: Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of the run directory `path`; the system drops it when this process ends.

    Raises RunInUse, with what to do, when another process still holds it after `wait` seconds.
    """
    lock = FileLock(path / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        status = read_status(path)
        who = (
            f"process {status['pid']} on {status['host']}" if "pid" in status else "another process"
        )
        raise RunInUse(
            f"{who} already trains in {path}: wait for it, stop it, or use another run name"
        ) from None
    try:
        yield
    finally:
        lock.release()


def in_use(path: str | Path) -> bool:
    """Whether a process trains in this run now, on whatever machine."""
    if not (Path(path) / LOCK).exists():
        return False
    try:
        with alone_in(Path(path), wait=0):
            return False
    except RunInUse:
        return True


def process_record(process: psutil.Process) -> dict[str, Any]:
    """For a file: what tells a process from a later one with the same number."""
    return {"pid": process.pid, "started": process.create_time(), "host": platform.node()}


def process_of(record: dict[str, Any]) -> psutil.Process | None:
    """The process of a `process_record`, while it runs on this machine; a zombie does not."""
    if record.get("host") != platform.node():
        return None
    with suppress(psutil.Error):
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["started"]) < 2  # clocks are set now and then
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def read_status(path: Path) -> dict[str, Any]:
    """The run's STATUS; "new" before its first training."""
    found = read_json(path / STATUS) if (path / STATUS).exists() else {}
    return {"state": "new", "step": 0, "total": 0, "error": "", "began": 0.0} | found


@contextmanager
def _reported(path: Path, total: int, done: Callable[[], int]) -> Iterator[None]:
    """Keep STATUS while a training goes on inside, and say how it ended.

    A process that is killed leaves "training" behind, in a run that nobody works on.
    """
    status = {"total": total, "began": time.time()} | process_record(psutil.Process())

    def write(state: str, error: str = "") -> None:
        write_json(path / STATUS, {"state": state, "step": done(), "error": error, **status})

    write("training")
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, TrainingStopped):
        write("finished" if done() >= total else "stopped")
        raise
    except BaseException as error:
        write("failed", f"{type(error).__name__}: {error}")
        raise
    write("finished")


# ------------------------------------------------------------------------------- what it began with


def environment(cfg: Config | PretrainConfig, data: str) -> dict[str, Any]:
    """Versions, machine, seed and data fingerprint."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "mimdet": __version__,
        "git": git_state(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
        "platform": platform.platform(),
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
        "seed": cfg.training.seed,
        "data": data,
    }


def git_state() -> str | None:
    """Commit of the library's checkout, with a + when it has changes; None outside git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    try:
        return subprocess.check_output(
            [*words, "--dirty=+"], text=True, stderr=subprocess.DEVNULL, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def weights_of(source: str | Path) -> str | Path:
    """The file of weights in a checkpoint's folder or a run, of either kind; another source."""
    folder = Path(source)
    if (folder / MAE_FILE).exists():  # a run of `mimdet pretrain`
        return folder / MAE_FILE
    if folder.is_dir():
        return (CheckpointStore(folder / "checkpoints").find("last") or folder) / WEIGHTS
    return source


def load_detector(
    source: str | Path,
    cfg: Config | None = None,
    *,
    checkpoint: str | int = "last",
    trust_code: bool = False,
    device: str = "cpu",
) -> Detector:
    """The detector of a run, or of a released file, in evaluation mode.

    source: a run directory; the name of shipped weights ("tiny"); or a weights file: one that
    `mimdet.save_detector` wrote describes itself, a released one is recognised by its names and
    shapes (`mimdet.models.official`), any other needs `cfg`. checkpoint: of a run, `last`, `best`
    or a step number. A run whose sampler or stem was written in a notebook holds that code under
    `slots/`; it is executed only with trust_code=True, because code from others can do anything.
    """
    path = Path(source)
    if path.is_file() or str(source) in shipped():
        return load_weights(source, cfg).to(device)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} is neither a run (there is no config.json in it) nor a weights file"
        )
    if cfg is not None:
        raise ValueError(f"{path} is a run and has its own configuration: leave cfg out")
    cfg = load_config(path / "config.json")
    slots = load_slots(path, cfg, trust_code)
    slots.pop("dataset", None)
    store = CheckpointStore(path / "checkpoints")
    place = store.find(checkpoint)
    if place is None:
        raise FileNotFoundError(
            f"{path} has no checkpoint {checkpoint!r}; it has steps {store.steps()}, "
            "and the names 'last' and (after an evaluation) 'best'"
        )
    file = read_checkpoint(place / WEIGHTS)
    file.name = str(place / WEIGHTS)
    model = detector_of(
        file, cfg, read_categories((path / "categories.json").read_bytes()), **slots
    )
    model.step = int(place.name)
    return model.to(device)
