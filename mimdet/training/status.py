"""What the last training in a run directory did, for those who look at it from outside."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimdet.files import read_json, write_json
from mimdet.training.signals import TrainingStopped

STATUS = "status.json"
"""In the folder of a run: {"state": "training", "finished", "stopped" or "failed", "step", "total",
"error", "pid", "began": seconds since 1970}."""


def read_status(path: Path) -> dict[str, Any]:
    """The run's STATUS; empty before its first training."""
    try:
        found: dict[str, Any] = read_json(path / STATUS)
    except (FileNotFoundError, ValueError):
        return {}
    return found


@contextmanager
def noted(path: Path, total: int, step: Callable[[], int]) -> Iterator[None]:
    """Keep STATUS while the training inside goes on, and say how it ended.

    total: steps of the whole training; step: asks for the steps done. A process that is killed
    leaves "training" behind, in a run that nobody works on.
    """
    status = {"total": total, "pid": os.getpid(), "began": time.time()}

    def write(state: str, error: str = "") -> None:
        write_json(path / STATUS, {"state": state, "step": step(), "error": error, **status})

    write("training")
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, TrainingStopped):
        write("finished" if step() >= total else "stopped")
        raise
    except BaseException as error:
        write("failed", f"{type(error).__name__}: {error}")
        raise
    write("finished")
