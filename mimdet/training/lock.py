"""One process at a time trains in a run directory."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LOCK = "lock"
"""File in the run's folder. The system drops the lock when its holder ends, however that ends."""
WAIT_SECONDS = 2.0
"""A process that only looks whether a run is in use holds the lock for a moment."""
LOOK_EVERY = 0.1

_held: set[int] = set()
"""Descriptors of the locks of this process."""


class RunInUse(ValueError):
    """Another process trains in this run."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that trains in a run; pid 0 and host "" where that cannot be read."""

    pid: int = 0
    host: str = ""

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine, which can be sent signals."""
        return self.pid > 0 and self.host == platform.node()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "another process"


@contextmanager
def alone_in(path: Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of the run directory `path`.

    Raises RunInUse, with what to do, when another process still holds it after `wait` seconds. On
    a file system without locks nothing is held and nothing is refused.
    """
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        end = time.monotonic() + wait
        while not _try_lock(descriptor):
            if time.monotonic() > end:
                raise RunInUse(
                    f"{_holder(path)} already trains in {path}: wait for it, stop it, or use "
                    "another run name"
                )
            time.sleep(LOOK_EVERY)
        _write(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}))
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def holder(path: str | Path) -> Holder | None:
    """Who trains in this run now; None when nobody does."""
    try:
        descriptor = os.open(Path(path) / LOCK, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        # Shared with others who only look.
        return None if _try_lock(descriptor, shared=True) else _holder(Path(path))
    finally:
        os.close(descriptor)


def started(pid: int) -> str:
    """What tells a process from a later one with the same number: when it started. "" = none runs.

    A process that has ended but was not waited for counts as none.
    """
    place = Path(f"/proc/{pid}/stat")
    if place.parent.parent.joinpath("self/stat").exists():
        try:  # 2 is the name, in brackets and with any character in it; 3 the state; 22 the start
            fields = place.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if fields[0] in "ZX" else f"{fields[19]} after boot {boot}"
    shown = subprocess.run(
        ["ps", "-o", "lstart=,stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    date, _, state = shown.rpartition(" ")
    return "" if state.startswith("Z") else date.strip()


def _holder(path: Path) -> Holder:
    with suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads((path / LOCK).read_text()))
    return Holder()


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text.encode())


def _try_lock(descriptor: int, shared: bool = False) -> bool:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the text, which others read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import errno
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def _let_go() -> None:
    """In a forked loader process: else it would keep the lock of a killed training for a while."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
