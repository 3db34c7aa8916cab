"""Files that are complete or not there at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import Any


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name, flush it to disk, then rename it into place.

    An interruption leaves the old file (or none), never half a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{get_ident()}")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8, all or nothing."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: str | Path) -> Any:
    """What a json file holds. FileNotFoundError, or ValueError naming a file that is no json."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not json: {error}") from error


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk now."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no descriptor for folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
