"""SampleBrowser: a data set's images beside what a training makes of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np
from torch import Tensor

from mimdet.config import DataConfig
from mimdet.data.augment import Geometry, augmented, rng_for
from mimdet.models.sampling import token_grid
from mimdet.structures import Target
from mimdet.viz import draw
from mimdet.viz.draw import Pixels
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import Panel, seed_slider, toggles

KINDS = ("paper", "none", "multiscale", "lsj")
WIDTH = 400
"""Pixels of a picture on the screen."""
PALE = 240
"""Grey that a faded part tends to."""


class SampleBrowser(Panel):
    """One image of a data set with its truth, beside an augmented showing of it with its truth.

    *image*: its position in the data set. *augmentation*: `none` (the test transform), `multiscale`
    (a random short side), `paper` (MIMDet's recipe), `lsj` (large-scale jitter on a square canvas);
    the first may flip too if `data.flips` says so. *seed*: draws another showing. A training with
    this seed shows the image exactly so in its first epoch. What the augmented picture does not use
    is faded in the stored one.
    """

    name = "data"

    def __init__(
        self, dataset: Any, data: DataConfig, categories: Sequence[str] | None = None
    ) -> None:
        """dataset: anything with `len` and records by position, so also a list of records; data:
        the numbers of every augmentation; categories: names, by default those of the data set.
        Raises ValueError for an empty data set."""
        super().__init__()
        if not len(dataset):
            raise ValueError("no images to browse: the data set is empty")
        self.dataset, self.data = dataset, data
        self.categories = getattr(dataset, "categories", ()) if categories is None else categories
        self.index = ipywidgets.BoundedIntText(
            max=len(dataset) - 1, description="image", layout={"width": "150px"}
        )
        self.kind = toggles("augmentation", KINDS)
        self.seed = seed_slider()
        self.canvases = self.stored, self.shown = [PatchCanvas(), PatchCanvas()]
        self.geometry: Geometry | None = None
        """The transform on show."""
        self.open([self.index, self.seed], [self.kind], self.canvases)

    def draw(self) -> str:
        index = self.index.value
        # Read once, however often its augmentation changes.
        self.record = record = self.once("record", index, lambda: self.dataset[index])
        height, width = draw.image_size(record.image)
        cfg = dataclasses.replace(self.data, augment=self.kind.value)
        rng = rng_for("geometry", self.seed.value, 0, index)
        geometry, image, target = augmented(cfg, record, rng)
        self.geometry = geometry
        out_height, out_width = geometry.output_size
        left = self._picture(record.image, record.target, geometry.crop)
        right = self._picture(image, target, (0, 0, out_width, out_height))
        self.stored.show(left, title=f"stored: {width} x {height} px")
        self.shown.show(right, title=f"{cfg.augment}: {out_width} x {out_height} px")
        objects = f"{len(target)} of {len(record.target)} objects are left"
        self.label = f"image {index}, {self.stored.label}, {self.shown.label}: {objects}"
        rows, columns = token_grid(out_height, out_width)
        tokens = f"{rows} × {columns} = {rows * columns} tokens"
        return f"{_words(geometry, (height, width))}. {objects}, {tokens}"

    def _picture(self, image: Tensor, target: Target, used: tuple[int, int, int, int]) -> Pixels:
        """The image with its objects; used: x1, y1, x2, y2 in its pixels, what lies outside is
        faded."""
        size = draw.image_size(image)
        marks = draw.marks_of(target, self.categories)
        pixels = draw.with_marks(draw.to_pixels(image, WIDTH), marks, size)
        faded = (0.25 * pixels + 0.75 * PALE).astype(np.uint8)
        scale = np.array([pixels.shape[1] / size[1], pixels.shape[0] / size[0]] * 2)
        x1, y1, x2, y2 = (scale * used).round().astype(int)
        faded[y1:y2, x1:x2] = pixels[y1:y2, x1:x2]
        return faded


def _words(geometry: Geometry, stored: tuple[int, int]) -> str:
    """What a transform does, in words."""
    x1, y1, x2, y2 = geometry.crop
    content, output = geometry.content_size, geometry.output_size
    steps = {
        f"a window of {x2 - x1} × {y2 - y1} px is cut out": (y2 - y1, x2 - x1) != stored,
        f"resized to {content[1]} × {content[0]} px": True,
        "transposed": geometry.transpose,
        "mirrored left-right": geometry.flip_h,
        "mirrored up-down": geometry.flip_v,
        f"padded to {output[1]} × {output[0]} px": output != content,
    }
    text = ", ".join(step for step, done in steps.items() if done)
    return text[0].upper() + text[1:]
