"""TrainingDashboard: start a training, watch it, stop and resume it; the kernel stays free."""

import html
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import torch
from PIL import Image

from mimdet.config import Config
from mimdet.data.coco import build_dataset
from mimdet.inference import predict
from mimdet.training.checkpoints import CheckpointStore
from mimdet.training.job import Job, JobState
from mimdet.training.run import load_detector, stored_config
from mimdet.viz import draw
from mimdet.viz.charts import show_training
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import EXPECTED, Panel

WIDTH = 960
"""Pixels of both pictures on the screen."""
LOOK_EVERY = 0.5
DRAW_EVERY = 2.0
"""Seconds between two looks at the files, and between two drawings."""
SHARE = 0.1
"""Drawing takes at most this share of the time; the training may need the same cores."""
POINTS = 1500
"""Steps in the curves; of a longer training every n-th is drawn."""
SHOWN = 2
"""Held-out images with detections: the first of the run's evaluation data."""
BAR_STYLES = {"finished": "success", "failed": "danger"}
BEGINNINGS = {"new": "start", "stopped": "resume", "failed": "resume"}

_watched: "dict[Path, TrainingDashboard]" = {}
"""Run -> the panel whose thread watches it; a cell that is run again takes over."""


class TrainingDashboard(Panel):
    """A training in a process of its own (`mimdet.training.job.Job`): its controls and its course.

    Controls: "Start" begins; "Stop & save" ends the training so that nothing is lost; "Resume" goes
    on after a stop or a failure, exactly as if nothing had happened. The bar shows the steps, the
    line below it losses, AP, speed, GPU memory and the time left. The pictures are the losses and
    the AP so far, and what the newest checkpoint detects in held-out images beside the truth. After
    a failure the end of the log is shown.

    A panel made for a run that is going on attaches to it; closing the notebook stops nothing. A
    thread of this process draws, and ends with the training or with `close`.
    """

    name = "training"
    label = "the course of a training"

    def __init__(
        self,
        training: Config | str | Path,
        run: str | Path = "",
        *,
        processes: int = 0,
        trust_code: bool = False,
        **slots: Any,
    ) -> None:
        """training: a configuration, with the folder `run` to train in; or a run's folder alone.
        processes: 0 = one per GPU, or one on the CPU. trust_code: of a run's folder that holds code
        written in a notebook, execute it. slots: parts written in this notebook (sampler=...).

        Raises ValueError when there is no folder, and what `Job` raises for one of another run.
        """
        super().__init__()
        if not isinstance(training, Config):
            self.job = Job.attach(training, trust_code=trust_code)
        elif str(run):
            self.job = Job.prepare(training, run, **slots)
        else:
            raise ValueError("give the folder to train in: TrainingDashboard(cfg, 'runs/name')")
        self.processes, self.state = processes, JobState("unknown")
        self.path = self.job.path
        self._lock = threading.RLock()  # its model is its own: other panels need not wait
        self._looking = threading.Lock()  # a button answers while a picture is being made
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._threads = torch.get_num_threads()
        self.progress = ipywidgets.IntProgress(description="steps", layout={"width": "420px"})
        self.log = self.complaints = ipywidgets.HTML()
        self.curves = PatchCanvas(size=(WIDTH, 300), label="no steps yet")
        self.detections = PatchCanvas(size=(WIDTH, 2), label="no checkpoint yet")
        self.canvases = [self.curves, self.detections]
        self.buttons = {
            "start": self.button("start", self.start, "Start", "success"),
            "stop": self.button("stop", self.stop, "Stop & save", "warning"),
            "resume": self.button("resume", self.start, "Resume", "success"),
        }
        state = self.look()
        self.open([*self.buttons.values()], self.progress, self.log, *self.canvases)
        if state.running:
            self._watch()

    # --------------------------------------------------------------------------- the controls

    def start(self) -> None:
        """Begin the training or go on with it; what "Start" and "Resume" do. Returns at once."""
        self.job.resume(self.processes)
        self.look()
        self._watch()

    def stop(self) -> None:
        """Ask the training to save and end; what "Stop & save" does. Returns at once."""
        self.job.stop()
        self.look()

    def wait(self, timeout: float | None = None) -> JobState:
        """Block until the training has ended, then show its last state. As `Job.wait`."""
        try:
            return self.job.wait(timeout)
        finally:
            self.look()
            self.attempt(self.redraw)

    def close(self) -> None:
        """End the thread; the training goes on."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(60)

    # --------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        _watched.pop(self.path.resolve(), self).close()
        _watched[self.path.resolve()] = self
        self._closed.clear()
        self._thread = threading.Thread(target=self._follow, name=f"watch {self.path}", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        torch.set_num_threads(self._threads)  # a new thread would use every core
        due, ended = 0.0, False
        while not ended and not self._closed.wait(LOOK_EVERY):
            state = self.look()
            ended = not state.running and state.name != "unknown"  # which may pass
            start = time.monotonic()
            if start >= due or ended:
                self.attempt(self.redraw)
                due = start + max(DRAW_EVERY, (time.monotonic() - start) / SHARE)

    def look(self) -> JobState:
        """Read the run's files; set buttons, bar and texts, no pictures. Milliseconds."""
        with self._looking:
            before, state = self.state.name, self._state()
            self.state = state
            enabled = "stop" if state.running else BEGINNINGS.get(state.name, "")
            for name, button in self.buttons.items():
                button.disabled = name != enabled or state.name == "stopping"
            self.progress.max = max(state.total, state.step, 1)
            self.progress.value = state.step
            self.progress.bar_style = BAR_STYLES.get(state.name, "info")
            self.status.value = (
                f"<span role='status' data-state='{state.name}' data-step='{state.step}'>"
                f"{html.escape(str(state))}</span>"
            )
            if state.name != before:
                self.log.value = ""
            if state.name == "failed":
                tail = html.escape("\n".join(self.job.log(12)))
                self.log.value = f"the end of the log<pre role='alert'>{tail}</pre>"
            return state

    def _state(self) -> JobState:
        """That of the job; `unknown` while its files cannot be read."""
        try:
            if not self.path.is_dir():
                raise FileNotFoundError(f"{self.path} is gone: was the run moved or removed?")
            return self.job.state()
        except EXPECTED as error:
            return JobState("unknown", error=str(error))

    # --------------------------------------------------------------------------- the pictures

    def draw(self) -> str:
        """What is new in the pictures; one that cannot be made is said above it."""
        step = max(CheckpointStore(self.path / "checkpoints").steps(), default=0)
        pictures: list[tuple[PatchCanvas, int, Callable[[], None]]] = [
            (self.curves, len(self.job.metrics.rows), self._draw_curves),
            (self.detections, step, lambda: self._draw_detections(step)),
        ]
        for canvas, version, make in pictures:
            try:
                self.once(canvas, version, make)
            except Exception as error:
                canvas.title = f"cannot be drawn: {type(error).__name__}: {error}"
        return self.status.value

    def _draw_curves(self) -> None:
        rows = self.job.metrics.rows
        every = max(1, len(rows) // POINTS)
        figure = show_training([r for i, r in enumerate(rows) if i % every == 0 or "loss" not in r])
        figure.canvas.draw()  # type: ignore[attr-defined]
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
        self.curves.show(pixels)
        self.curves.title, self.curves.label = "", figure.alt_text

    def _draw_detections(self, step: int) -> None:
        cfg = stored_config(self.path)
        if not isinstance(cfg, Config) or step == 0:
            return  # an autoencoder, or nothing learnt
        model = load_detector(self.path, checkpoint=str(step), trust_code=self.job.trust_code)
        data = build_dataset(cfg.data, "val", cfg.training.seed, cfg.detector.masks)
        records = [data[i] for i in range(min(SHOWN, len(data)))]
        found = predict(model, [record.image for record in records])
        pictures, count = [], 0
        for record, detections in zip(records, found, strict=True):
            likely = draw.marks_of(detections, model.categories, score_threshold=0.5)
            truth = draw.marks_of(record.target, model.categories)
            count += len(likely)
            size = draw.image_size(record.image)
            plain = draw.to_pixels(record.image, WIDTH // (2 * SHOWN) - 8)
            for marks, title in ((truth, "truth"), (likely, f"detected at step {step}")):
                pictures.append(draw.captioned(draw.with_marks(plain, marks, size), title))
        self.detections.show(draw.beside(pictures))
        said = f"{len(found)} held-out images, the truth beside {count} detections of step {step}"
        self.detections.title, self.detections.label = "", said

    def snapshot(self) -> Image.Image:
        """The state in words, the curves and the detections, as a saved notebook shows them."""
        words = draw.captioned(np.full((1, WIDTH, 3), 255, np.uint8), str(self.state))
        said = [canvas for canvas in self.canvases if canvas.picture or canvas.title]
        return draw.with_few_colours(
            draw.below([words, *(np.asarray(canvas.snapshot()) for canvas in said)])
        )
