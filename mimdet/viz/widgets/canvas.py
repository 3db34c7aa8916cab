"""PatchCanvas: a picture under a grid of tokens, for clicking, brushing and looking."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from PIL import Image, ImageDraw

from mimdet.viz.draw import captioned, data_url, from_data_url, png_bytes
from mimdet.viz.style import VERMILLION

HERE = Path(__file__).parent
FADED = (225, 225, 225, 224)
LINE = (255, 255, 255, 115)


class PatchCanvas(anywidget.AnyWidget):
    """A picture under a grid of `rows` x `columns` tokens.

    tool "select": a click or the arrow keys set `selected`; "brush": a stroke drops tokens or
    brings them back (Enter or space: the selected one), one message a stroke; "look": only a
    picture. A place is row * columns + column. A saved notebook shows `snapshot()`.
    """

    _esm = HERE / "patch_canvas.js"
    _css = HERE / "patch_canvas.css"

    picture = traitlets.Unicode("").tag(sync=True)
    """Data URL; set it with `show`."""
    rows = traitlets.Int(1).tag(sync=True)
    columns = traitlets.Int(1).tag(sync=True)
    size = traitlets.Tuple(default_value=(384, 384)).tag(sync=True)
    """(width, height) on the screen, pixels."""
    selected = traitlets.Int(-1).tag(sync=True)
    """Place of the chosen token; -1 = none."""
    dropped = traitlets.List(traitlets.Int()).tag(sync=True)
    """Places drawn over in light grey."""
    tool = traitlets.Enum(["select", "brush", "look"], "look").tag(sync=True)
    show_grid = traitlets.Bool(False).tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    """A line above the picture."""
    label = traitlets.Unicode("a picture").tag(sync=True)
    """What the picture shows, for people who do not see it."""
    seq = traitlets.Int(0).tag(sync=True)
    """Counts Python's answers; the page shows it as `data-seq` once the answer is on the screen."""

    def show(self, pixels: Any, width: int | None = None, title: str = "") -> None:
        """Replace the picture: uint8 (H, W, 3). width: on the screen, by default its own; the
        height follows. title: above it, and what `label` says."""
        height_px, width_px = np.asarray(pixels).shape[:2]
        width = width or width_px
        url = data_url(pixels)
        with self.hold_sync():
            self.size = (width, max(1, round(width * height_px / width_px)))
            self.picture = url
            if title:
                self.title = self.label = title

    def answered(self) -> None:
        """Tell the page that the last change has been dealt with."""
        self.seq += 1

    def snapshot(self) -> Image.Image:
        """What the canvas shows now, as a picture."""
        base = Image.new("RGBA", self.size, "white")
        if self.picture:
            base.paste(from_data_url(self.picture).resize(self.size), (0, 0))
        marks = Image.new("RGBA", self.size)
        pen = ImageDraw.Draw(marks)
        for place in self.dropped:
            pen.rectangle(self._square(place), fill=FADED)
        for place in range(self.rows * self.columns if self.show_grid else 0):
            pen.rectangle(self._square(place), outline=LINE)
        if self.selected >= 0:
            pen.rectangle(self._square(self.selected), outline=VERMILLION, width=3)
        base.alpha_composite(marks)
        picture = base.convert("RGB")
        if self.title:
            return Image.fromarray(captioned(np.asarray(picture), self.title))
        return picture

    def _square(self, place: int) -> Sequence[float]:
        w, h = self.size[0] / self.columns, self.size[1] / self.rows
        x, y = place % self.columns * w, place // self.columns * h
        return [x, y, x + w, y + h]

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return with_picture(super()._repr_mimebundle_(**options), self.snapshot(), self.label)


def with_picture(bundle: Any, picture: Image.Image, label: str) -> Any:
    """A widget's (data, metadata) for IPython's display, with a picture for where it cannot run."""
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
    data = {**data, "image/png": png_bytes(picture), "text/plain": label}
    return data, {**metadata, "image/png": {"alt": label}}
