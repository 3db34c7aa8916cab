"""A run's metrics, read while they are written, and what they say about the time left."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimdet.training.progress import summary

RECENT = 50
"""Steps whose mean time counts for the time left."""


@dataclass(frozen=True, slots=True)
class JobState:
    """What is known about a run at one moment."""

    name: str
    """`new` (nothing was started), `starting`, `training`, `stopping`, `finished`, `stopped`,
    `failed`."""
    step: int = 0
    total: int = 0
    """Steps of the whole training; 0 until the first training has opened the data."""
    losses: dict[str, float] = field(default_factory=dict)
    """Of the last step; `loss` is their sum."""
    evaluations: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(step, metrics) of each."""
    seconds_left: float | None = None
    """At the pace of the last steps and evaluations; None before the first step."""
    images_per_second: float = 0.0
    gpu_memory_gb: float = 0.0
    """Highest so far; 0 on a CPU."""
    error: str = ""

    @property
    def running(self) -> bool:
        return self.name in ("starting", "training", "stopping")

    def __str__(self) -> str:
        """One line; times and speed only while it trains."""
        of = f" of {self.total}" if self.total else ""
        parts = [f"{self.name}, step {self.step}{of}"]
        if self.losses:
            parts.append(f"loss {self.losses['loss']:.3g}")
        if self.evaluations:
            step, metrics = self.evaluations[-1]
            parts += [f"{text} at step {step}" for text in [summary(metrics)] if text]
        if self.running and self.seconds_left is not None:
            parts.append(f"{self.images_per_second:.1f} images/s")
            parts.append(f"about {duration(self.seconds_left)} left")
            parts += [f"{self.gpu_memory_gb:.1f} GB of GPU memory"] if self.gpu_memory_gb else []
        return ", ".join(parts) + (f": {self.error}" if self.error else "")


class MetricsFile:
    """metrics.jsonl, of which every call of `read` takes the lines that are new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        """Of steps and evaluations, in order."""
        self._place: tuple[int, int] = (0, 0)
        """Which file it was, and the bytes read."""

    def read(self) -> list[dict[str, Any]]:
        """All rows. A training that resumes writes the file anew, without steps it does again."""
        try:
            with self.path.open("rb") as file:
                about = os.fstat(file.fileno())
                number, offset = self._place
                if number != about.st_ino or about.st_size < offset:
                    self.rows, offset = [], 0
                file.seek(offset)
                text = file.read()
        except FileNotFoundError:
            self.rows, self._place = [], (0, 0)
            return self.rows
        whole = text[: text.rfind(b"\n") + 1]
        self._place = (about.st_ino, offset + len(whole))
        self.rows += [json.loads(line) for line in whole.splitlines() if line.strip()]
        return self.rows

    def state(self, name: str, total: int, error: str) -> JobState:
        """What the rows say, with what only the job knows."""
        steps = [row for row in self.rows[-2 * RECENT :] if "loss" in row]
        found = [(row["step"], row["evaluation"]) for row in self.rows if "evaluation" in row]
        step = max((row["step"] for row in self.rows[-2:]), default=0)
        if not steps:
            return JobState(name, step, total, evaluations=found, error=error)
        last, times = steps[-1], [row["time"] for row in steps[-RECENT:]]
        seconds = sum(time["seconds"] for time in times)
        images = sum(row["images"] for row in steps[-RECENT:])
        return JobState(
            name,
            step,
            total,
            {key: value for key, value in last.items() if key.startswith("loss")},
            found,
            seconds_left(self.rows, step, total, seconds / len(times)),
            images / max(seconds, 1e-9),
            last["time"].get("gpu_memory_gb", 0.0),
            error,
        )


def seconds_left(
    rows: Sequence[dict[str, Any]], step: int, total: int, seconds_a_step: float
) -> float | None:
    """Steps at that pace, and evaluations as far apart and as long as the last one; None without
    a total."""
    if not total:
        return None
    left = max(0, total - step) * seconds_a_step
    done = [row for row in rows if "evaluation" in row]
    if done and step < total:
        places = [0, *(row["step"] for row in done)]
        every = max(1, places[-1] - places[-2])
        count = (total - places[-1]) // every + ((total - places[-1]) % every > 0)
        left += count * done[-1].get("time", {}).get("seconds", 0.0)
    return left


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; of a progress bar, which overwrites its line, the last state."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 400 * (count + 5)))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line][-count:]
