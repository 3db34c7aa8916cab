"""What a command says when it ends, on whatever console: one line and an exit code.

0: done. 2: what a user can mend. 1: the network did not answer, so the same command may do better
later, or a bug. 128 + signal: asked to end.
"""

import errno
import io
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimdet import __version__

ERROR = "error: "
"""Begins the line in which a command says why it failed."""
FIRST = os.environ.get("RANK", "0") == "0"
"""Of the processes that torchrun starts, one speaks."""
PERMISSIONS = "its permissions forbid that: change them, or give another path"
REMEDIES = {
    errno.ENOENT: "there is no such file or folder",
    errno.EACCES: PERMISSIONS,
    errno.EPERM: PERMISSIONS,
    errno.EROFS: "the disk is read-only: give another folder",
    errno.ENOSPC: "the disk is full ({free:.3g} GB free): make room, or give another folder",
    errno.EDQUOT: "your share of the disk is used up: make room, or give another folder",
    errno.EFBIG: "files may not become that large ({free:.3g} GB free): give another folder",
    errno.EIO: "the disk fails (input/output error): check it, or give another folder",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.EISDIR: "it is a folder, where a file is needed",
    errno.ENOTDIR: "a part of the path is a file, where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.EMFILE: "too many files are open: use fewer data.workers, or raise `ulimit -n`",
}
"""What can be done when the system refuses a file."""


class Stopped(Exception):
    """Work was asked to end, and has been saved: the same call goes on."""

    signal_number = int(signal.SIGINT)

    def _render_traceback_(self) -> list[str]:
        """One line in a notebook instead of a traceback."""
        return [str(self)]


class Failed(RuntimeError):
    """What was asked for could not be done, and the message says why: no bug of the kit."""


class Ended(SystemExit):
    """A command has said its last words; `code` is for the shell."""

    def __init__(self, words: str, code: int) -> None:
        super().__init__(words)
        self.code = code


@contextmanager
def told(show: bool = False) -> Iterator[None]:
    """The one place where what ends a command becomes words on standard error, and `Ended`.

    show: print the traceback of every error, not only of a bug.
    """
    try:
        yield
    except Stopped as stopped:
        if FIRST:
            print(stopped)
        raise Ended(str(stopped), 128 + stopped.signal_number) from None
    except KeyboardInterrupt:
        raise Ended("interrupted", 128 + signal.SIGINT) from None
    except Exception as error:
        words, code = explained(error)
        if show or not words:
            traceback.print_exc()
        words = words or (
            f"{type(error).__name__}: {error}. This is a bug in mimdet {__version__}: please "
            "report it, with the lines above, where you got mimdet from."
        )
        words = ERROR + " ".join([words, *getattr(error, "__notes__", [])])
        print(words, file=sys.stderr)
        raise Ended(words, code) from None


def explained(error: Exception) -> tuple[str, int]:
    """What a user is told of an error, and the exit code; "" and 1 of one that nobody expects."""
    library, _, name = f"{type(error).__module__}.{type(error).__name__}".partition(".")
    if isinstance(error, ConnectionError | TimeoutError) or library in ("httpx", "requests"):
        return f"{error}. Check the network, then run the same command again.", 1
    if isinstance(error, OSError) and error.errno is not None:
        place = Path(error.filename2 or error.filename or "")
        there = next(path for path in (place, *place.absolute().parents) if os.path.exists(path))
        free = shutil.disk_usage(there).free / 1e9
        name = str(place) if len(str(place)) < 200 else f"{str(place)[:99]}...{str(place)[-40:]}"
        return f"{name}: {REMEDIES.get(error.errno, str(error.strerror)).format(free=free)}", 2
    full = isinstance(error, MemoryError) or "OutOfMemory" in name
    if full or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return (
            f"the memory is full ({error}): use a smaller batch (training.batch_size, with a "
            "larger training.accumulate; --batch-size) or smaller images",
            2,
        )
    if isinstance(error, ValueError | OSError | FloatingPointError | Failed):
        return str(error), 2
    return "", 1


class _Output(io.FileIO):
    """Standard output or error that may go away: what nobody can read any more is dropped."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError:  # `| head` has read enough, the terminal was closed, the disk is full
            return memoryview(data).nbytes


def open_console() -> None:
    """Let printing end no command: any text fits any encoding, and output may be closed.

    Warnings are one line, without the line of code that they came from.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        if stream is None:  # closed: a file that is opened later must not take its number
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        elif not isinstance(getattr(buffer, "raw", buffer), io.FileIO):  # a console of Windows
            continue
        encoding = "utf-8" if stream is None else stream.encoding
        output = io.BufferedWriter(_Output(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(output, encoding, "replace", line_buffering=True))
