"""Disks that fill up and processes that die: every operation on a file can be made to fail.

A run is counted first, `Operations(folder)`: what writes below the folder, in order. Then the same
run is repeated in a forked process with a fault at one of these operations. Reading never fails.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
"""Audit events of Python that change a folder; os.replace and Path.rename are "os.rename"."""
GIVES_ROOM = ("os.remove", "os.rmdir")
"""A full disk lets these through."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of operation number `at`, counted from 0."""

    at: int
    kind: str
    """"kill": the process dies before it; "half": after half of the bytes were written, where it
    writes a file, else before it; an errno's name, "ENOSPC" or "EIO" or "EROFS": it fails, and so
    does every later one where `stays`."""
    stays: bool = False


@dataclass
class Operations:
    """Counts operations on files below `folder` in this process, and lets one of them fail.

    Python has no way to remove an audit hook: make one in a forked process only.
    """

    folder: Path
    fault: Fault | None = None
    seen: list[tuple[str, str]] = field(default_factory=list)
    """(operation, path below the folder) in order."""
    failed: list[str] = field(default_factory=list)
    """Paths whose operation failed, in order."""
    _busy: bool = False

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        sys.addaudithook(self._audit)
        # Written by compiled code, which no audit event announces.
        torch.save = self._whole_file(torch.save, position=1)
        serialize = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._whole_file(serialize, position=1)
        os.fsync = self._fsync(os.fsync)

    def _audit(self, event: str, details: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "open":
            path, _, flags = details
            if isinstance(path, (str, bytes, os.PathLike)) and flags & WRITING:
                appends = bool(flags & os.O_APPEND)
                self.happens("append" if appends else "open", path, self._half_line)
        elif event in CHANGES:
            self.happens(event, details[1] if event == "os.rename" else details[0])

    def happens(self, operation: str, path: Any, half: Callable[[Path], None] | None = None):
        """Count an operation that is about to happen; here it fails, or the process ends.

        half: does the first half of it.
        """
        full = Path(os.fsdecode(path)).absolute()
        if not full.is_relative_to(self.folder):
            return
        number = len(self.seen)
        self.seen.append((operation, str(full.relative_to(self.folder))))
        fault = self.fault
        if fault is None or number < fault.at or (number > fault.at and not fault.stays):
            return
        self._busy = True
        try:
            if fault.kind in ("kill", "half"):
                if fault.kind == "half" and half:
                    half(full)
                os.kill(os.getpid(), signal.SIGKILL)
            code = getattr(errno, fault.kind)
            if code == errno.ENOSPC and operation in GIVES_ROOM:
                return
            self.failed.append(str(full.relative_to(self.folder)))
            if half and operation != "open":
                half(full)
            raise OSError(code, os.strerror(code), str(full))
        finally:
            self._busy = False

    def _half_line(self, path: Path) -> None:
        if path.exists():
            with path.open("ab") as file:
                file.write(b'{"step": 3, "lo')

    def _whole_file(self, write: Callable[..., Any], position: int) -> Callable[..., Any]:
        def writes(*args: Any, **options: Any) -> Any:
            def half(path: Path) -> None:
                write(*args, **options)
                _cut(path)

            path = args[position] if len(args) > position else options.get("filename")
            if isinstance(path, (str, os.PathLike)):
                self.happens("write", path, half)
            return write(*args, **options)

        return writes

    def _fsync(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def syncs(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.happens("fsync", path, None if path.is_dir() else _cut)
            sync(descriptor)

        return syncs


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def in_child(work: Callable[[], Any], log: Path, seconds: int = 120) -> int:
    """Do it in a forked process whose output goes to `log`, as the command line would end:

    0 = done, 1 = an exception, 2 = it refused in words, -9 = killed, -14 = not done in time.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.alarm(seconds)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2 * (end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
