"""TrainingDashboard: start a training, watch it, stop and resume it; the kernel stays free."""

import html
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import torch
from PIL import Image

from mimdet.config import Config
from mimdet.data.coco import build_dataset
from mimdet.inference import predict
from mimdet.structures import Record
from mimdet.training.job import Job, JobState
from mimdet.training.run import CheckpointStore, load_detector
from mimdet.training.train import stored_config
from mimdet.viz import draw
from mimdet.viz.charts import show_training
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import Panel, in_words

WIDTH = 960
"""Pixels of both pictures on the screen."""
LOOK_EVERY = 0.5
DRAW_EVERY = 2.0
"""Seconds between two looks at the files, and between two drawings of the curves."""
SHARE = 0.1
"""Drawing takes at most this share of the time; the training may need the same cores."""
POINTS = 1500
"""Steps in the curves; of a longer training every n-th is drawn."""
SHOWN = 2
"""Held-out images with detections."""
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
        images: Sequence[Record] | None = None,
        trust_code: bool = False,
        **slots: Any,
    ) -> None:
        """training: a configuration, with the folder `run` to train in; or a run's folder alone.
        processes: 0 = one per GPU, or one on the CPU. images: held-out ones to detect in, default
        the first of the run's evaluation data. trust_code: of a run's folder that holds code
        written in a notebook, execute it. slots: parts written in this notebook (sampler=...).

        Raises ValueError when there is no folder, and what `Job` raises for one of another run.
        """
        super().__init__()
        if isinstance(training, Config):
            if not str(run):
                raise ValueError("give the folder to train in: TrainingDashboard(cfg, 'runs/name')")
            self.job = Job.prepare(training, run, **slots)
        else:
            self.job = Job.attach(training, trust_code=trust_code)
        self.processes = processes
        self.path = self.job.path
        self.images = list(images) if images is not None else None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._drawing_lock = threading.Lock()
        """Not the one of the callbacks: a button answers while a picture is being made."""
        self._threads = torch.get_num_threads()
        self._drawn_rows = self._drawn_step = -1
        self._due = {"curves": 0.0, "detections": 0.0}
        self._build()
        if self.look().running:
            self._watch()  # which draws too
        else:
            self.refresh()

    def _build(self) -> None:
        self.buttons = {
            "start": ipywidgets.Button(description="Start", button_style="success"),
            "stop": ipywidgets.Button(description="Stop & save", button_style="warning"),
            "resume": ipywidgets.Button(description="Resume", button_style="success"),
        }
        for name, button in self.buttons.items():
            button.add_class(f"mimdet-training-{name}")
            action = self.stop if name == "stop" else self.start
            button.on_click(lambda _, action=action: self._answer(action))
        self.progress = ipywidgets.IntProgress(description="steps", layout={"width": "420px"})
        self.log = ipywidgets.HTML()
        self.curves = PatchCanvas(size=(WIDTH, 300), label="no steps yet")
        self.detections = PatchCanvas(size=(WIDTH, 2), label="no checkpoint yet")
        self.canvases = [self.curves, self.detections]
        self.arrange([*self.buttons.values(), self.progress], self.log, *self.canvases)

    # --------------------------------------------------------------------------- the controls

    def start(self) -> None:
        """Begin the training or go on with it; what "Start" and "Resume" do. Returns at once."""
        self.job.resume(self.processes)
        self._watch()

    def stop(self) -> None:
        """Ask the training to save and end; what "Stop & save" does. Returns at once."""
        self.job.stop()

    def wait(self, timeout: float | None = None) -> JobState:
        """Block until the training has ended, then show its last state. As `Job.wait`."""
        try:
            return self.job.wait(timeout)
        finally:
            self.refresh()

    def close(self) -> None:
        """End the thread; the training goes on."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(60)

    def _answer(self, action: Callable[[], Any]) -> None:
        try:
            action()
            self.look()
        except Exception as error:
            self.log.value = in_words(error)

    # --------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        before = _watched.get(self.path.resolve())
        if before is not None and before is not self:
            before.close()
        _watched[self.path.resolve()] = self
        if self._thread is None or not self._thread.is_alive():
            self._closed.clear()
            self._thread = threading.Thread(
                target=self._follow, name=f"watch {self.path}", daemon=True
            )
            self._thread.start()

    def _follow(self) -> None:
        torch.set_num_threads(self._threads)  # a new thread would use every core
        while not self._closed.wait(LOOK_EVERY):
            running = self.look().running
            for name in self._due:
                if not running or time.monotonic() >= self._due[name]:
                    self._draw_in_turn(name)
            if not running:
                return

    def _draw_in_turn(self, name: str) -> None:
        """What takes long is drawn less often; a picture that cannot be made ends no watching."""
        start = time.monotonic()
        try:
            with self._drawing_lock:
                drawn = getattr(self, f"draw_{name}")()
        except Exception as error:
            drawn = True
            self.log.value = f"the {name} cannot be drawn: {in_words(error)}"
        if drawn:
            now = time.monotonic()
            self._due[name] = now + max(DRAW_EVERY, (now - start) / SHARE)

    def refresh(self) -> None:
        """Show the run as it is now, pictures included."""
        self.look()
        with self._drawing_lock:
            self.draw_curves()
            self.draw_detections()

    def look(self) -> JobState:
        """Read the run's files; set buttons, bar and texts, no pictures. Milliseconds."""
        with self._lock:
            state = self.state = self.job.state()
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
            self.log.value = ""
            if state.name == "failed":
                tail = html.escape("\n".join(self.job.log(12)))
                self.log.value = f"the end of the log<pre role='alert'>{tail}</pre>"
            return state

    # --------------------------------------------------------------------------- the pictures

    def draw_curves(self) -> bool:
        """Losses and AP; False where nothing is new."""
        rows = self.job.metrics.rows
        if len(rows) == self._drawn_rows:
            return False
        self._drawn_rows = len(rows)
        every = max(1, len(rows) // POINTS)
        figure = show_training([r for i, r in enumerate(rows) if i % every == 0 or "loss" not in r])
        figure.canvas.draw()  # type: ignore[attr-defined]
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
        self._show(self.curves, pixels, figure.alt_text)
        return True

    def draw_detections(self) -> bool:
        """What the newest checkpoint finds in held-out images; False where there is no new one."""
        store = CheckpointStore(self.path / "checkpoints")
        step = max(store.steps(), default=-1)
        cfg = stored_config(self.path)
        if not isinstance(cfg, Config) or step in (-1, 0, self._drawn_step):
            return False  # an autoencoder, or nothing new
        try:
            model = load_detector(self.path, checkpoint=str(step), trust_code=self.job.trust_code)
        except PermissionError as error:  # code of others: the curves are enough
            self.detections.label = str(error)
            return False
        except FileNotFoundError:
            return False  # replaced by a newer one just now
        self._drawn_step = step
        if self.images is None:
            data = build_dataset(cfg.data, "val", cfg.training.seed)
            self.images = [data[i] for i in range(min(SHOWN, len(data)))]
        found = predict(model, [record.image for record in self.images])
        pictures, count = [], 0
        for record, detections in zip(self.images, found, strict=True):
            likely = draw.marks_of(detections, model.categories, score_threshold=0.5)
            truth = draw.marks_of(record.target, model.categories)
            count += len(likely)
            size = draw.image_size(record.image)
            plain = draw.to_pixels(record.image, WIDTH // (2 * SHOWN) - 8)
            for marks, title in ((truth, "truth"), (likely, f"detected at step {step}")):
                pictures.append(draw.captioned(draw.with_marks(plain, marks, size), title))
        said = f"{len(found)} held-out images, the truth beside {count} detections of step {step}"
        self._show(self.detections, draw.beside(pictures), said)
        return True

    def _show(self, canvas: PatchCanvas, pixels: Any, said: str) -> None:
        with self._lock:
            canvas.label = said
            canvas.show(pixels)
            canvas.answered()

    def snapshot(self) -> Image.Image:
        """The state in words, the curves and the detections, as a saved notebook shows them."""
        text = self.status.value.split(">", 1)[1].removesuffix("</span>")
        words = draw.captioned(np.full((1, WIDTH, 3), 255, np.uint8), html.unescape(text))
        parts = [np.asarray(canvas.snapshot()) for canvas in self.canvases if canvas.picture]
        return draw.with_few_colours(draw.below([words, *parts]))
