"""Files that are complete or not there at all."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import enumerate as living_threads
from threading import get_ident
from typing import Any

SHIPPED = Path(__file__).resolve().parent / "pretrained"
"""Small weights and pictures that come with the package; README.md there says how each was made."""
PARTIAL = re.compile(r"\.partial-(\d+)(-\d+)?(-old)?$")
"""Ends the name of what is being made or removed: the numbers of the process and the thread."""


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name, flush it to disk, then rename it into place.

    An interruption leaves the old file (or none), never half a file.
    """
    path = Path(path)
    partial = partial_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.touch()  # a library may not say why it cannot
            write(partial)
            sync(partial)
            os.replace(partial, path)
        finally:
            with suppress(OSError):  # the first failure is the one to tell
                partial.unlink()
        sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside is an OSError that names `path`, which was to be written.

    The libraries that store tensors say it in their own ways.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename and ".partial-" not in str(error.filename)):
            raise  # of a file that is read meanwhile
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        said = re.search(r"os error (\d+)", str(error))  # safetensors
        if not said and "iostream" not in f"{error} {error.__context__}":  # torch.save
            raise
        full = shutil.disk_usage(path.parent).free < 1 << 20
        number = int(said[1]) if said else errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """The same for a folder of files; one that is there already gives way."""
    partial = partial_name(path)
    with writing(path):
        partial.mkdir(parents=True)
        try:
            write(partial)
            for file in partial.iterdir():
                sync(file)
            if path.exists():
                remove_folder(path)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync(path.parent)


def remove_folder(path: Path) -> None:
    """Out of sight first: a process that is killed meanwhile leaves no half of a folder."""
    gone = path.with_name(f"{partial_name(path).name}-old")
    os.replace(path, gone)
    _remove(gone)


def append_text(path: Path, text: str) -> None:
    """Add text in UTF-8 at the end; an interruption leaves the beginning of it."""
    with writing(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def partial_name(path: Path) -> Path:
    """Where this thread makes `path` before that has its name."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}-{get_ident()}")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half made or half removed in a folder and those inside it.

    What may belong to another living process of this machine, or to another thread, stays.
    """
    import psutil  # here, because `mimdet --help` needs none of it

    others = {f"-{thread.ident}" for thread in living_threads() if thread.ident != get_ident()}
    for path in [*folder.rglob("*.partial-*")]:
        made_by = PARTIAL.search(path.name)
        if made_by is None:
            continue
        process, thread = int(made_by[1]), made_by[2]
        if not (thread in others if process == os.getpid() else psutil.pid_exists(process)):
            _remove(path)


def _remove(path: Path) -> None:
    """A file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8, all or nothing."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which json does not know."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
