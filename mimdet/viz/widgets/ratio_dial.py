"""RatioDial: turn the share of kept tokens, see the detections and what they cost."""

import math
import time
from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np

from mimdet.inference import predict
from mimdet.models.detector import Detector
from mimdet.models.sampling import Sample, token_grid
from mimdet.structures import Detections, Target
from mimdet.viz import draw
from mimdet.viz.features import pale_dropped
from mimdet.viz.record import record
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import ImagePanel, few_proposals, timed

SIDE = 400  # pixels of a canvas on the screen


class RatioDial(ImagePanel):
    """Turn the share of kept tokens; see the detections, and how long they took on this machine.

    - *image*, *your own*: what is detected in. Beside it stands the truth where targets were given.
    - *ratio kept*: the share of the tokens that the encoder sees; the others are pale.
    - *seed*: another draw of as many tokens.
    - *score*: detections below it are not drawn.
    - *pale tokens*: off = the whole picture.

    The line below gives the tokens kept, the detections drawn, and milliseconds: the median of all
    runs at this ratio so far, and the backbone's part of it, the only part that the ratio changes.
    The table under it keeps the medians of every ratio that was visited. On a busy machine times
    are worth little: move the dial back and forth until the medians stand still.
    """

    name = "ratio"

    def __init__(
        self,
        model: Detector,
        images: Any = None,
        targets: Sequence[Target] | None = None,
        categories: Sequence[str] | None = None,
    ) -> None:
        """images: as `predict` takes them, default: drawn scenes; targets: their truth, one an
        image; categories: class names, default: the model's own.

        Raises ValueError for a model that keeps every token, and for another number of targets.
        """
        super().__init__(images, 1.0, targets)
        if not model.samples:
            raise ValueError("this backbone sees every token: a dial needs a MIMDet to turn")
        self.model = model
        self.categories = model.categories if categories is None else categories
        self.score = ipywidgets.FloatSlider(0.3, min=0, max=1, step=0.05, description="score ≥")
        self.pale = ipywidgets.Checkbox(True, description="pale tokens", indent=False)
        self.truth, self.picture, self.table = PatchCanvas(), PatchCanvas(), ipywidgets.HTML()
        self.times: dict[float, list[tuple[float, float]]] = {}
        """Ratio -> (milliseconds of the detector, of its backbone) of every run."""
        self.canvases = [self.picture] if self.targets is None else [self.truth, self.picture]
        self.open([*self.inputs, self.score, self.pale], self.canvases, self.table)

    def draw(self) -> str:
        ratio, index, size = self.ratio.value, self.image.value, draw.image_size(self.chosen)
        key = (index, ratio, self.seed.value)
        self.found, sample, remark = self.once("found", key, self._detect)
        pixels = draw.to_pixels(self.chosen, SIDE)
        if self.targets is not None:
            self.show_truth(self.truth, self.categories, SIDE)
        marks = draw.marks_of(self.found, self.categories, self.score.value)
        fed = self.model.resize.size(*size)
        if self.pale.value:
            pixels = pale_dropped(pixels, sample, fed)
        kept = f"{len(sample.keep[0])} of {math.prod(token_grid(*fed))} tokens"
        title = f"{kept}: {len(marks)} found"
        self.picture.show(draw.with_marks(pixels, marks, size), title=title)
        self.label = f"An image, detections at ratio {self.ratio.label}: {title}."
        self.table.value = _table(self.times)
        whole, backbone = np.median(self.times[ratio], axis=0)
        return (
            f"ratio {self.ratio.label}: {kept} · {len(marks)} detections of score "
            f"{self.score.value:.2f} or more · {whole:.0f} ms, median of {len(self.times[ratio])} "
            f"(backbone {backbone:.0f} ms){remark}"
        )

    def _detect(self) -> tuple[Detections, Sample, str]:
        """Run the model at the present setting: what it found, all scores, in the image's own
        pixels; the tokens kept; what has to be said about that."""
        ratio, seed, backbone = self.ratio.value, self.seed.value, self.model.backbone
        clock: list[float] = []

        def tick(*_: Any) -> None:
            clock.append(time.perf_counter())

        with (
            few_proposals(self.model) as remark,
            record(self.model, "backbone") as seen,
            backbone.register_forward_pre_hook(tick),
            backbone.register_forward_hook(tick),
        ):
            found, whole = timed(
                lambda: predict(self.model, self.chosen, sample_ratio=ratio, seed=seed)
            )
        assert seen.sample is not None
        self.times.setdefault(ratio, []).append((whole, 1000 * (clock[1] - clock[0])))
        return found, seen.sample, remark


def _table(times: dict[float, list[tuple[float, float]]]) -> str:
    """The medians of every ratio so far."""
    from pandas import DataFrame

    rows = [(ratio, *np.median(runs, axis=0), len(runs)) for ratio, runs in sorted(times.items())]
    table = DataFrame(rows, columns=["ratio", "detector, ms", "backbone, ms", "runs"])
    return table.to_html(index=False, border=0, col_space=100, float_format="{:.3g}".format)
