"""A run is the directory of one training:

    config.json       every number of the run; another configuration is refused here
    metrics.jsonl     a line a step (losses, gradient norm, rate, times), a line an evaluation
    checkpoints       weights and optimiser state of the last two steps saved, and of the best
    eval.json         metrics of the last evaluation, and what they belong to
    predictions.json  its detections in COCO's results format
    evaluation.json   metrics at several sample ratios, from `mimdet evaluate`
    categories.json   class names, so that the folder alone is enough to predict
    slots             code of parts that were written in a notebook
    environment.json  versions, machine, seed; hashes of data and weights; changes since
    log.txt           what a job printed that was started from a notebook
    job.json          its process, so that it can be found again
    status.json       which process trains, or how the last training ended
    lock              held while a process trains here: a second one is refused

A run of `mimdet pretrain` holds mae.safetensors and pictures of reconstructions besides.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from mimdet import processes
from mimdet.config import MODEL_PART, Config, PretrainConfig, difference, load_config, save_config
from mimdet.console import Stopped
from mimdet.files import (
    PARTIAL,
    append_text,
    finite,
    remove_folder,
    remove_leftovers,
    write_folder,
    write_json,
    write_text,
)
from mimdet.models.checkpoint_files import CheckpointFile, check_finite, read_safetensors, shipped
from mimdet.models.detector import Detector, read_categories
from mimdet.models.official import detector_of, load_weights
from mimdet.training.inputs import (
    DIFFERS,
    ENVIRONMENT,
    MICRO,
    accepted,
    has_checkpoint,
    read_environment,
    stored_config,
)
from mimdet.training.owner import (
    LOCK,
    STATUS,
    RunInUse,
    alone_in,
    at_work,
    process_record,
    read_status,
)
from mimdet.training.slots import SlotText, check_slots, load_slots, write_slots

T = TypeVar("T")
LOG = "log.txt"
"""In the folder of a run: what its jobs printed."""
MAE_FILE = "mae.safetensors"
"""What `mimdet pretrain` leaves in its run for others to read."""


class Run:
    """The directory of one training. Same configuration: resumed. Another one: an error, once
    a step is saved or while somebody works here; before that it takes the place of the first."""

    def __init__(
        self, path: str | Path, cfg: Config | PretrainConfig, *, locked: bool = False
    ) -> None:
        """locked: this process already holds the run's lock (`alone_in`) while it trains here."""
        self.path = Path(path)
        self.locked = locked
        self.cfg = cfg
        self.store = CheckpointStore(self.path / "checkpoints", cfg.training.keep_checkpoints)
        self.rows = MetricsFile(self.path / "metrics.jsonl")
        self.began = 0.0
        """When the training of this process began, in seconds since 1970; 0 while it does not."""
        self._config = cfg
        """What config.json is to hold once this configuration is trained."""
        existing = self.path / "config.json"
        self._texts: dict[str, SlotText] = {}
        if existing.exists():
            stored = load_config(existing, type(cfg))
            try:
                self._config = accepted(stored, cfg, self.path)
            except ValueError:
                if processes.rank() == 0 and self._settled():
                    raise
            return
        self.path.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self.path.iterdir() if not PARTIAL.search(path.name)}
        if not names <= {ENVIRONMENT, LOCK, LOG}:  # which one that was killed here may have left
            raise ValueError(f"{self.path} is not empty and holds no run: use another run name")
        about = {"folder": str(Path.cwd()), "run": str(self.path.resolve())}
        write_json(self.path / ENVIRONMENT, about)
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
                self.keep(self._texts)  # two that began at once: it is that of who trains
                remove_leftovers(self.path)
                stack.enter_context(self._reported(total, done))
            yield

    @contextmanager
    def _reported(self, total: int, done: Callable[[], int]) -> Iterator[None]:
        """Keep STATUS while a training goes on inside, and say how it ended.

        A process that is killed leaves "training" behind, in a run that nobody works on.
        """
        began = time.time()
        about = {"total": total, "began": began, "run": str(self.path.resolve())}
        about |= process_record(psutil.Process())

        def write(state: str, error: str = "") -> None:
            self.check_owner()
            write_json(self.path / STATUS, about | {"state": state, "step": done(), "error": error})

        write("training")
        self.began = began
        try:
            yield
        except BaseException as error:
            asked = isinstance(error, GeneratorExit | KeyboardInterrupt | TrainingStopped)
            with suppress(OSError, RunInUse):  # what went wrong first is what is told
                if asked:
                    write("finished" if done() >= total else "stopped")
                else:
                    write("failed", f"{type(error).__name__}: {error}")
            raise
        write("finished")

    def check_owner(self) -> None:
        """RunInUse where another training has begun here after that of this process."""
        if self.began and read_status(self.path)["began"] not in (self.began, 0.0):
            raise RunInUse(
                f"another training has begun in {self.path}: this one writes nothing more there"
            )

    def keep(self, texts: dict[str, SlotText]) -> None:
        """Keep the code of parts that were written in a notebook, or see that it is the same.

        And the changes of a configuration that do not hinder it from going on.
        """
        self._texts = texts
        if processes.rank() > 0:
            return
        try:
            check_slots(self.path, texts)
        except ValueError:
            if self._settled():
                raise
            self.store.forget_after(-1)
            write_slots(self.path, texts)
        stored = load_config(self.path / "config.json", type(self.cfg))
        changed = difference(stored, self._config)
        if changed:
            if not self._settled():
                self.store.forget_after(-1)
            about = read_environment(self.path)
            changes = about.get("changes", [])
            after = max(self.store.steps(), default=0)
            if after and any(line.startswith(MICRO) for line in changed):
                changed.append(DIFFERS)
            print(f"{self.path} goes on with {', '.join(changed)}")
            changes.append({"after": after, "changed": changed})
            write_json(self.path / ENVIRONMENT, about | {"changes": changes})
            save_config(self._config, self.path / "config.json")

    def _settled(self) -> bool:
        """Whether something would be lost, or somebody works here."""
        return at_work(self.path) or has_checkpoint(self.path, after=0)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        self.check_owner()
        append_text(self.rows.path, json.dumps(finite(row), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: one per step and one per evaluation."""
        return self.rows.read()

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations: {"step", "data", "evaluation", "time"}."""
        return [row for row in self.metrics() if "evaluation" in row]

    def forget_after(self, step: int) -> None:
        """Drop metrics and checkpoints of steps that will be done again."""
        kept = [json.dumps(row) for row in self.metrics() if row["step"] <= step]
        write_text(self.rows.path, "".join(line + "\n" for line in kept))
        self.store.forget_after(step)


def best_step(rows: Iterable[dict[str, Any]]) -> int | None:
    """The first one of the highest box AP in rows of evaluations; None where there is none."""
    scores = {
        row["step"]: row["evaluation"].get("box", {}).get("AP")
        for row in rows
        if "evaluation" in row
    }
    scores = {step: ap for step, ap in scores.items() if ap is not None}
    return max(scores, key=lambda step: scores[step], default=None)


class TrainingStopped(Stopped):
    """Raised after the checkpoint is written; the same call resumes."""

    def __init__(self, step: int, run: Path, signal_number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}: step {step} is saved in {run}; "
            "run the same command again to resume"
        )
        self.signal_number = signal_number


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
        rows: list[dict[str, Any]] = []
        for line in whole.splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                where = f"line {len(self.rows) + len(rows) + 1} of {self.path}"
                raise ValueError(f"{where} is damaged ({error}): remove it") from error
        self.rows += rows
        self._read = (about.st_ino, offset + len(whole))
        return self.rows


# ------------------------------------------------------------------------------- checkpoints

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"


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
    """The folder `checkpoints/`: one folder per step, and the pointers `last` and `best`.

    Nothing depends on the pointers alone: the last checkpoint is the newest complete one, and the
    best one that of the best evaluation in metrics.jsonl.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Write it, complete or not at all; then move `last` and drop the oldest ones."""

        def write(folder: Path) -> None:
            weights = {k: v.contiguous() for k, v in checkpoint.weights.items()}
            save_file(weights, folder / WEIGHTS, {MODEL_PART: checkpoint.model_part})
            torch.save(checkpoint.optimizer, folder / OPTIMIZER)

        place = self.folder_of(checkpoint.step)
        write_folder(place, write)
        self.point("last", place.name)
        best = self.find("best")
        for step in self.steps()[: -self.keep]:
            if self.folder_of(step) != best:
                remove_folder(self.folder_of(step))

    def forget_after(self, step: int) -> None:
        """Remove later ones, which are damaged or will be made again."""
        for later in self.steps((WEIGHTS,)):
            if later > step:
                remove_folder(self.folder_of(later))

    def point(self, name: str, target: str) -> None:
        """Make the pointer file `last` or `best` name a checkpoint."""
        write_text(self.folder / name, target + "\n")

    def find(self, name: str | int) -> Path | None:
        """The checkpoint of a step, or the `last` or `best` one; None where there is none.

        ValueError for a pointer or a folder that leads out of the run.
        """
        steps = self.steps((WEIGHTS,))
        pointer, text = self.folder / str(name), str(name)
        if name in ("last", "best"):
            self._inside(pointer)
            if pointer.is_file():
                text = pointer.read_text(encoding="utf-8", errors="replace").strip().strip("\0")
                self._inside(self.folder / text)
        step: int | None = int(text) if text.isascii() and text.isdecimal() else None
        if name == "last":
            step = max(steps, default=None)
        elif name == "best" and step not in steps:
            rows = MetricsFile(self.folder.parent / "metrics.jsonl").read()
            step = best_step(r for r in rows if "evaluation" in r and r["step"] in steps)
        return self.folder_of(step) if step in steps else None

    def steps(self, files: Sequence[str] = (WEIGHTS, OPTIMIZER)) -> list[int]:
        """Steps whose checkpoint has these files, oldest first."""
        if not self.folder.exists():
            return []
        places = [place for place in self.folder.iterdir() if place.name.isdecimal()]
        places = [place for place in places if place == self.folder_of(int(place.name))]
        return sorted(int(p.name) for p in places if all((p / file).exists() for file in files))

    def weights(self, place: Path) -> CheckpointFile:
        """Those of a checkpoint. ValueError where the file is damaged, or leads out of the run."""
        self._inside(place / WEIGHTS)
        try:
            return CheckpointFile(str(place / WEIGHTS), *read_safetensors(place / WEIGHTS))
        except ValueError as error:
            reason = error.__cause__ or error
            raise ValueError(f"{place / WEIGHTS} is cut off or damaged ({reason})") from error

    def load_last(self) -> Checkpoint | None:
        """The newest checkpoint, on the CPU, as `newest` reads it; None in a fresh run."""
        return self.newest(self._load, self.steps((WEIGHTS,)))

    def newest(self, read: Callable[[Path], T], steps: Sequence[int]) -> T | None:
        """What `read` finds in the newest of these checkpoints; None where there is none.

        In place of a damaged one the one before it is taken, and a line says so. ValueError where
        no one is whole.
        """
        damaged: list[str] = []
        for step in reversed(steps):
            try:
                found = read(self.folder_of(step))
            except ValueError as error:
                damaged.append(str(error))
                continue
            if damaged and processes.rank() == 0:
                print(f"{'; '.join(damaged)}: step {step} is used instead")
            return found
        if damaged:
            raise ValueError(
                f"{damaged[0]}, and there is no whole checkpoint before it: copy one back into "
                f"{self.folder}, or remove that folder to train from the start"
            )
        return None

    def folder_of(self, step: int) -> Path:
        return self.folder / f"{step:06d}"

    def _load(self, place: Path) -> Checkpoint:
        weights = self.weights(place)
        self._inside(place / OPTIMIZER)
        if not (place / OPTIMIZER).exists():
            raise ValueError(f"{place / OPTIMIZER} is missing")
        with (place / OPTIMIZER).open("rb") as file:
            try:
                optimizer = torch.load(file, map_location="cpu", weights_only=True)
            except UnpicklingError as error:  # whose text advises to run what the file holds
                raise ValueError(f"{file.name} holds something else than numbers") from error
            except Exception as error:  # what a damaged pickle raises is not limited to a few
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise ValueError(f"{file.name} is cut off or damaged ({reason})") from error
        part = weights.metadata.get(MODEL_PART, "{}")
        return Checkpoint(int(place.name), weights.tensors, optimizer, part)

    def _inside(self, path: Path) -> None:
        """ValueError where a path leads out of this folder: absolute, by `..` or through a link."""
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{path} leads out of the run, to {path.resolve()}: remove it")


# ------------------------------------------------------------------------------- what it gives


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
        if checkpoint != "last":
            raise ValueError(f"{source} is a file of weights, without checkpoint {checkpoint!r}")
        return load_weights(source, cfg).to(device)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} is neither a run (there is no config.json in it) nor a weights file"
        )
    if cfg is not None:
        raise ValueError(f"{path} is a run and has its own configuration: leave cfg out")
    own = stored_config(path)
    if not isinstance(own, Config):
        raise ValueError(f"{path} is a run of an autoencoder: mimdet.load_mae_model reads it")
    slots = load_slots(path, own, trust_code)
    slots.pop("dataset", None)
    store = CheckpointStore(path / "checkpoints")
    place = store.find(checkpoint)
    if place is None:
        raise FileNotFoundError(
            f"{path} has no checkpoint {checkpoint!r}; it has steps {store.steps()}, "
            "and the names 'last' and (after an evaluation) 'best'"
        )
    steps = store.steps((WEIGHTS,))
    file = store.newest(store.weights, steps) if checkpoint == "last" else store.weights(place)
    assert file is not None  # `find` has found one
    check_finite(file.tensors, file.name)
    categories = read_categories((path / "categories.json").read_bytes())
    model = detector_of(file, own, categories, **slots)
    model.step = int(Path(file.name).parent.name)
    return model.to(device)
