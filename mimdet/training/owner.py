"""One process at a time trains in a run: its lock, and the status file that says who it is."""

import errno
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from mimdet.files import read_json

LOCK = "lock"
STATUS = "status.json"
"""In the folder of a run: {"state": "starting" (by a `Job`), "training", "finished", "stopped" or
"failed", "step", "total", "error", "began": seconds since 1970, "run": its folder} and the
`process_record` of the last training."""
JOB = "job.json"
"""In the folder of a run: the `process_record` of the child started last and {"run": its folder,
"stopping": when a training was asked to end, in seconds since 1970}."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system that has none."""
WAIT_SECONDS = 2.0
"""A process that only looks whether a run is in use holds the lock for a moment."""


class RunInUse(ValueError):
    """Another process trains in this run."""


@contextmanager
def alone_in(path: Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of the run directory `path`; the system drops it when this process ends.

    Raises RunInUse, with what to do, when another process still holds it after `wait` seconds.
    """
    lock = FileLock(path / LOCK, thread_local=False)
    held = True
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        held = False
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        text = f"there are no file locks in {path} ({error}): see that no other process trains here"
        warnings.warn(text, stacklevel=3)
    try:
        trainer = trainer_of(path)  # its lock may have been removed, or be of no use
        if not held or (trainer and trainer.pid != os.getpid()):
            status = read_status(path)
            known = "pid" in status
            who = "process {pid} on {host}".format(**status) if known else "another process"
            raise RunInUse(
                f"{who} already trains in {path}: wait for it, stop it, or use another run name"
            )
        yield
    finally:
        lock.release()


def in_use(path: str | Path) -> bool:
    """Whether a process trains in this run now, on whatever machine."""
    path = Path(path)
    if not (path / LOCK).exists():
        return trainer_of(path) is not None
    try:
        with alone_in(path, wait=0):
            return False
    except RunInUse:
        return True


def at_work(path: Path) -> bool:
    """Whether a process trains in this run now, or was started to do so."""
    return in_use(path) or process_of(read_job(path)) is not None


def trainer_of(path: Path) -> psutil.Process | None:
    """The process that trains here on this machine, as STATUS says; a copy of a run has none."""
    status = read_status(path)
    own = status["state"] == "training" and status.get("run") == str(path.resolve())
    return process_of(status) if own else None


def read_job(path: Path) -> dict[str, Any]:
    """What the run's JOB says; nothing in a copy of a run that is elsewhere."""
    found: dict[str, Any] = read_json(path / JOB) if (path / JOB).exists() else {}
    return found if found.get("run") == str(path.resolve()) else {}


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
    found: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError, TypeError):  # a damaged one says as much as none
        found = dict(read_json(path / STATUS))
    return {"state": "new", "step": 0, "total": 0, "error": "", "began": 0.0} | found
