"""What a run holds of its training: a row for each step, and the checkpoints."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from mimdet import processes
from mimdet.config import MODEL_PART
from mimdet.files import remove_folder, write_folder, write_text
from mimdet.models.checkpoint_files import CheckpointFile, read_safetensors

T = TypeVar("T")
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
MAE_FILE = "mae.safetensors"
"""What `mimdet pretrain` leaves in its run for others to read."""


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


def best_step(rows: Iterable[dict[str, Any]]) -> int | None:
    """The first one of the highest box AP in rows of evaluations; None where there is none."""
    evaluations = {row["step"]: row["evaluation"] for row in rows if "evaluation" in row}
    scores = {step: found.get("box", {}).get("AP") for step, found in evaluations.items()}
    known = [step for step, ap in scores.items() if ap is not None]
    return max(known, key=lambda step: scores[step], default=None)


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

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint, keep: int = 2) -> None:
        """Write it, complete or not at all; then move `last` and drop all but the newest `keep` and
        the best one."""

        def write(folder: Path) -> None:
            weights = {k: v.contiguous() for k, v in checkpoint.weights.items()}
            save_file(weights, folder / WEIGHTS, {MODEL_PART: checkpoint.model_part})
            torch.save(checkpoint.optimizer, folder / OPTIMIZER)

        place = self.folder_of(checkpoint.step)
        write_folder(place, write)
        self.point("last", place.name)
        best = self.find("best")
        for step in self.steps()[:-keep]:
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


def has_checkpoint(path: Path, after: int = -1) -> bool:
    """Whether the run has one, of a step after this one."""
    names = [entry.name for entry in (path / "checkpoints").glob("*")]
    return any(name.isdecimal() and int(name) > after for name in names)


def weights_of(source: str | Path) -> str | Path:
    """The file of weights in a checkpoint's folder or a run, of either kind; another source."""
    folder = Path(source)
    if (folder / MAE_FILE).exists():  # a run of `mimdet pretrain`
        return folder / MAE_FILE
    if folder.is_dir():
        return (CheckpointStore(folder / "checkpoints").find("last") or folder) / WEIGHTS
    return source
