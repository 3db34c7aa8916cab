"""Ctrl-C and SIGTERM during training: the step is abandoned, and what was done before is saved."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TrainingStopped(Exception):
    """Raised after the checkpoint is written; the same call resumes."""

    def __init__(self, step: int, run: Any, signal_number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}: step {step} is saved in {run}; "
            "run the same command again to resume"
        )
        self.signal_number = signal_number

    def _render_traceback_(self) -> list[str]:
        """One line in a notebook instead of a traceback."""
        return [str(self)]


class StepAbandoned(Exception):
    """Leaves the middle of a step; never seen outside the training loop."""


class StopSignals:
    """Turns SIGINT and SIGTERM into `StepAbandoned`, but only where a step may be abandoned.

    Elsewhere (optimiser step, checkpoint) the signal waits for `check`. Outside the main thread,
    where Python allows no handlers, signals keep their usual meaning. With at_once=False signals
    are only recorded in `received`: several processes must stop at the same place.
    """

    def __init__(self, at_once: bool = True) -> None:
        self.at_once = at_once
        self.received = 0
        self._interruptible = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Install the handlers; put the old ones back on leaving."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        old = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, old, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal abandons the work at once."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
        self.check()

    def check(self) -> None:
        if self.received and self.at_once:
            raise StepAbandoned

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._interruptible and self.at_once:
            self._interruptible = False
            raise StepAbandoned


TIED = "MIMDET_TIED"
"""Variable of a child that is to end when the process that started it does."""


def end_with_parent() -> None:
    """In a child with TIED: SIGTERM to itself when its standard input, a pipe, is closed."""
    if os.environ.pop(TIED, "0") != "1":
        return

    def wait_for_the_end() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock must be free when Python exits
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
