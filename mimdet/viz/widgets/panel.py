"""What every panel has: controls, pictures that answer them, and a picture for a saved notebook."""

import html
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import ipywidgets
import numpy as np
import torch
from IPython.display import HTML, display
from PIL import Image
from torch import Tensor

from mimdet.data.shapes import ShapesCOCO
from mimdet.images import to_rgb
from mimdet.models.detector import Detector
from mimdet.structures import Target
from mimdet.viz import draw
from mimdet.viz.style import VERMILLION, plural
from mimdet.viz.widgets.canvas import PatchCanvas, with_picture

Result = TypeVar("Result")
EXPECTED = (ValueError, OSError)
"""What goes wrong with inputs; anything else is a mistake in code, and its place is shown."""
MANY_PROPOSALS, FEW_PROPOSALS = 300, 100
ONE_TOKEN = 1e-6
"""A ratio of which one token is left, as `mimdet.select` keeps at least one."""
HINT = (
    "<p class='mimdet-hint'>A picture of a panel, or an error in its place? Panels end with their "
    "kernel: <i>Run &gt; Run All Above Selected Cell</i>, then this cell.</p>"
)
"""Below a panel; a page in which the panel lives hides it (patch_canvas.css)."""


class Panel:
    """Controls and canvases; `draw` is called when a control changes, and fills the canvases.

    A subclass makes its widgets, ends its `__init__` with `open`, and writes `draw`. Callbacks may
    run in a thread beside a running cell, so one lock guards the models of all panels and `draw`
    runs without gradients. What goes wrong is written below the panel. A widget in the attribute
    `seed` has the class `mimdet-<name>-seed`, by which style sheets and tests in a browser find it.
    """

    name = "panel"

    _lock = threading.RLock()  # panels may share a model, and looking inside changes it for a while

    label = "an interactive panel"
    """What it shows, in words; a subclass may set it in `draw`."""

    def __init__(self) -> None:
        self.status = ipywidgets.HTML()
        self.status.add_class("mimdet-status")
        self.complaints = self.status
        """What could not be done is written here."""
        self.canvases: list[PatchCanvas] = []
        self.box = ipywidgets.VBox()
        self._made: dict[Any, tuple[Any, Any]] = {}
        self._drawing_thread = 0

    def open(self, *rows: Any) -> None:
        """Put rows of widgets below each other, the status line last, and draw for the first time.

        From then on the value of every widget in a list is answered by `redraw`, of a slider when
        it is let go; of other widgets only what is observed by `changed`. All errors are then
        written below; the first time those that nobody expected end the cell.
        """
        for name, widget in vars(self).items():
            if isinstance(widget, ipywidgets.DOMWidget):
                widget.add_class(f"mimdet-{self.name}-{name}")
            if hasattr(getattr(widget, "style", None), "description_width"):
                widget.style.description_width = "initial"  # else long ones are cut off
            if hasattr(widget, "continuous_update"):
                widget.continuous_update = False
        for control in (control for row in rows if isinstance(row, list) for control in row):
            if control.has_trait("value") and not isinstance(control, ipywidgets.FileUpload):
                control.observe(self.changed, "value")
        self.box.children = [
            ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) if isinstance(row, list) else row
            for row in (*rows, self.status)
        ]
        self.attempt(self.redraw, EXPECTED)

    def button(self, name: str, action: Callable[[], Any], text: str = "", style: str = "") -> Any:
        """A button with the class `mimdet-<panel>-<name>` that does this."""
        layout = {"width": "auto"}
        button = ipywidgets.Button(description=text or name, button_style=style, layout=layout)
        button.add_class(f"mimdet-{self.name}-{name}")
        button.on_click(lambda _: self.attempt(action))
        return button

    def attempt(
        self, action: Callable[[], Any], kinds: type[Exception] | tuple[Any, ...] = Exception
    ) -> None:
        """Do this; an error of these kinds is written below the panel, not in the server's log."""
        try:
            action()
        except kinds as error:
            self.complaints.value = in_words(error)

    def draw(self) -> str:
        """Fill the canvases from the controls; returns the text of the status line."""
        raise NotImplementedError

    def once(self, name: Any, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns; it is called again only when `name` has another key than before."""
        if name not in self._made or self._made[name][0] != key:
            self._made[name] = key, make()
        return self._made[name][1]

    def redraw(self) -> None:
        """Answer the controls as they stand now."""
        with self._lock, torch.inference_mode():
            self._drawing_thread = threading.get_ident()
            vars(self).pop("label", None)
            try:
                self.status.value = self.draw()
            except Exception as error:
                self._made.clear()
                self.label = f"{type(error).__name__}: {error}"
                for canvas in self.canvases:  # an old picture would pass for the answer
                    canvas.picture = canvas.title = ""
                    canvas.label = "nothing"
                raise
            finally:
                self._drawing_thread = 0
                for canvas in self.canvases:
                    canvas.answered()

    def changed(self, change: Any) -> None:
        """For `observe` of a trait besides those that `open` observes: redraws."""
        if self._drawing_thread != threading.get_ident():  # `draw` itself may move a control
            self.attempt(self.redraw)

    def snapshot(self) -> Image.Image:
        """The canvases side by side, as a saved notebook shows them."""
        return Image.fromarray(draw.beside([np.asarray(c.snapshot()) for c in self.canvases]))

    def _ipython_display_(self) -> None:
        data, metadata = self._repr_mimebundle_()
        display(data, metadata=metadata, raw=True)
        display(HTML(HINT))

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = self.box._repr_mimebundle_(**options)
        return with_picture(bundle, self.snapshot(), self.label)


class ImagePanel(Panel):
    """A panel about one picture and a sample of its tokens.

    `image` lists the pictures to choose from, `upload` adds your own; `ratio` is the share of
    tokens kept, and `seed` draws others.
    """

    def __init__(
        self, images: Any = None, ratio: float = 0.25, targets: Sequence[Target] | None = None
    ) -> None:
        """images: one or a list, as `mimdet.predict` takes them: a path, a PIL image, a uint8 array
        or tensor; by default eight held-out scenes of ShapesCOCO. They are read when chosen.
        targets: their truth, one an image."""
        super().__init__()
        if images is None:
            scenes = ShapesCOCO("shapes-v1-medium", length=8, split="val")
            records = [scenes[i] for i in range(len(scenes))]
            images, targets = [r.image for r in records], [r.target for r in records]
        self.images = list(images) if isinstance(images, list | tuple) else [images]
        if not self.images:
            raise ValueError("no images to choose from: give at least one")
        if targets is not None and len(targets) != len(self.images):
            raise ValueError(
                f"{len(targets)} targets for {len(self.images)} images: give one per image"
            )
        self.targets = targets
        self.image = dropdown("image", [(f"image {i + 1}", i) for i in range(len(self.images))])
        self.upload = ipywidgets.FileUpload(accept="image/*", description="your own")
        self.upload.observe(self._uploaded, "value")
        shares = [(f"{step / 20:.2f}", step / 20) for step in range(1, 21)]
        steps = [("1 token", ONE_TOKEN), *shares]
        self.ratio = ipywidgets.SelectionSlider(
            options=steps, value=ratio, description="ratio kept"
        )
        self.seed = seed_slider()
        self.inputs = [self.image, self.upload, self.ratio, self.seed]

    @property
    def chosen(self) -> Tensor:
        """uint8 (3, H, W)."""
        index = self.image.value
        return self.once("chosen", index, lambda: to_rgb(self.images[index]))

    def show_truth(self, canvas: PatchCanvas, categories: Sequence[str], width: int) -> None:
        """The chosen picture with its true objects; of an uploaded one nothing is known."""
        known = (self.targets or [])[self.image.value : self.image.value + 1]
        marks = [mark for target in known for mark in draw.marks_of(target, categories)]
        pixels, size = draw.to_pixels(self.chosen, width), draw.image_size(self.chosen)
        title = f"truth: {plural(len(marks), 'object')}" if known else "no truth is known"
        canvas.show(draw.with_marks(pixels, marks, size), title=title)

    def add(self, image: Tensor, name: str) -> None:
        """Append a picture to `images` and choose it."""
        self.images.append(image)
        # New options choose the first of them, so this changes `value` once.
        self.image.options = [(name, len(self.images) - 1), *self.image.options]

    def _uploaded(self, change: Any) -> None:
        for file in change.new:
            self.attempt(partial(self._read, bytes(file["content"]), file["name"]))

    def _read(self, content: bytes, name: str) -> None:
        self.add(to_rgb(content, name), name)


def in_words(error: Exception) -> str:
    """A line of a page; under it, where the error was not expected, its place in the code."""
    said = html.escape(str(error), quote=False)
    line = f"<b style='color:{VERMILLION}'>{type(error).__name__}</b>: {said}"
    if isinstance(error, EXPECTED):
        return line
    place = html.escape("".join(traceback.format_exception(error)))
    return f"{line}<details><summary>where</summary><pre>{place}</pre></details>"


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What it returns, and the milliseconds it took."""
    start = time.perf_counter()
    result = run()
    return result, 1000 * (time.perf_counter() - start)


def dropdown(description: str, options: Any) -> Any:
    """A list to choose from, as wide as what it holds."""
    layout = {"width": "max-content", "max_width": "260px"}
    return ipywidgets.Dropdown(options=options, description=description, layout=layout)


def seed_slider() -> Any:
    """0 to 99. Its number is not a field: of a typed 1e3 the browser would take 13 in silence."""
    return ipywidgets.SelectionSlider(options=range(100), description="seed")


def toggles(description: str, options: Sequence[str]) -> Any:
    """Buttons of which one is pressed, at first the first."""
    shape = {"style": {"button_width": "90px"}, "layout": {"width": "max-content"}}
    return ipywidgets.ToggleButtons(options=options, description=description, **shape)


@contextmanager
def few_proposals(model: Detector) -> Iterator[str]:
    """Inside, the heads see the 100 best proposals of an image, where it would be more than 300.

    A panel must answer at once, and a full-size detector on a CPU spends most of its time on a
    thousand proposals. Yields a remark to end the status line with; "" where all stays as it is.
    """
    train, most = model.rpn.post_nms
    if most <= MANY_PROPOSALS:
        yield ""
        return
    model.rpn.post_nms = (train, FEW_PROPOSALS)
    try:
        yield f" · heads on the {FEW_PROPOSALS} best proposals, not {most}"
    finally:
        model.rpn.post_nms = (train, most)
