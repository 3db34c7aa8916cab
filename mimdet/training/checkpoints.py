"""A checkpoint is one directory, complete or absent."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mimdet.files import sync, write_text
from mimdet.models.checkpoint_files import read_safetensors

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
            save_file({k: v.contiguous() for k, v in checkpoint.weights.items()}, partial / WEIGHTS)
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
        return Checkpoint(steps[-1], read_safetensors(place / WEIGHTS)[0], optimizer)

    def _delete(self, place: Path) -> None:
        """Out of sight first: a process that is killed meanwhile leaves no half of a checkpoint."""
        partial = self.folder / f"{PARTIAL}{place.name}-old"
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(place, partial)
        shutil.rmtree(partial)
