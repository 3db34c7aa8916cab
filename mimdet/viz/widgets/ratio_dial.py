"""RatioDial: one trained detector, and what it finds as the share of kept tokens moves."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets
from torch import Tensor, nn

from mimdet.data.augment import test_size
from mimdet.models.detector import Detector
from mimdet.models.sampling import Sample, token_grid
from mimdet.predict import predict
from mimdet.structures import Detections, Target
from mimdet.viz.panels import image_size
from mimdet.viz.pixels import Pixels, captioned, enlarged, to_pixels, with_objects
from mimdet.viz.pyramids import pale_dropped
from mimdet.viz.record import record
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import STYLE, ImageChooser, Panel, few_proposals, ratio_slider

SIDE = 400  # pixels of a canvas on the screen


class RatioDial(Panel):
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

    def __init__(
        self,
        model: Detector,
        images: Sequence[Tensor] | None = None,
        targets: Sequence[Target] | None = None,
        categories: Sequence[str] | None = None,
    ) -> None:
        """images: uint8 (3, H, W), default: drawn scenes; targets: their truth, one an image;
        categories: class names, default: the model's own.

        Raises ValueError for a model that keeps every token, and for another number of targets.
        """
        super().__init__()
        if not hasattr(model.backbone, "sampler"):
            raise ValueError("this backbone sees every token: a dial needs a MIMDet to turn")
        self.chooser = ImageChooser(images)
        if targets is not None and len(targets) != len(self.chooser.images):
            count = len(self.chooser.images)
            raise ValueError(f"{len(targets)} targets for {count} images: give one per image")
        self.model = model
        self.targets = None if targets is None else list(targets)
        self.categories = model.categories if categories is None else categories
        self.ratio = ratio_slider(1.0)
        self.seed = ipywidgets.IntSlider(description="seed", max=20, continuous_update=False)
        self.score = ipywidgets.FloatSlider(
            0.3, min=0.05, max=0.95, step=0.05, description="score", style=STYLE
        )
        self.pale = ipywidgets.Checkbox(True, description="pale tokens", indent=False)
        self.truth = PatchCanvas(size=(SIDE, SIDE))
        self.picture = PatchCanvas(size=(SIDE, SIDE))
        self.table = ipywidgets.HTML()
        self.found: Detections = Detections.empty((1, 1), masks=False)
        """What the model found at the present setting, all scores, in the image's own pixels."""
        self.sample: Sample | None = None
        self.times: dict[float, list[tuple[float, float]]] = {}
        """Ratio -> (milliseconds of the detector, of its backbone) of every run."""
        self._setting: tuple[Any, ...] = ()
        self._remark = ""
        self._shown_truth = -1
        self.canvases = [self.picture] if targets is None else [self.truth, self.picture]
        self._name_controls()
        self.arrange(
            [*self.chooser.widgets, self.ratio, self.seed, self.score, self.pale],
            list(self.canvases),
            self.table,
        )
        self.watch(self.chooser.choice, self.ratio, self.seed, self.score, self.pale)
        self.redraw()

    def draw(self) -> str:
        image, ratio = self.chooser.image, self.ratio.value
        setting = (self.chooser.choice.value, ratio, self.seed.value)
        if setting != self._setting:
            self._detect(image)
            self._setting = setting
        assert self.sample is not None
        size = image_size(image)
        likely = int((self.found.scores >= self.score.value).sum())
        plain = enlarged(to_pixels(image), SIDE)
        pixels = plain
        fed = test_size(self.model.config.data, *size)
        if self.pale.value:
            pixels = pale_dropped(plain, self.sample, fed)
        drawn = with_objects(pixels, self.found, size, self.categories, self.score.value)
        kept, total = len(self.sample.keep[0]), math.prod(token_grid(*fed))
        title = f"{kept} of {total} tokens: {likely} found"
        self.picture.show(captioned(drawn, title), SIDE)
        self.picture.label = f"detections at ratio {ratio:.2f}: {title}"
        self._show_truth(plain, size)
        self.label = f"An image, {self.picture.label}."
        self.table.value = _table(self.times)
        whole, backbone = _medians(self.times[ratio])
        return (
            f"ratio {ratio:.2f}: {kept} of {total} tokens · {likely} detections of score "
            f"{self.score.value:.2f} or more · {whole:.0f} ms, median of "
            f"{len(self.times[ratio])} (backbone {backbone:.0f} ms)"
            + (f" · {self._remark}" if self._remark else "")
        )

    def _detect(self, image: Tensor) -> None:
        """Run the model at the present setting, and keep what it found and how long it took."""
        with (
            few_proposals(self.model) as self._remark,
            record(self.model, "backbone") as seen,
            stopwatch(self.model.backbone) as backbone,
        ):
            start = time.perf_counter()
            self.found = predict(
                self.model, image, sample_ratio=self.ratio.value, seed=self.seed.value
            )
            whole = 1000 * (time.perf_counter() - start)
        self.sample = seen.sample
        self.times.setdefault(self.ratio.value, []).append((whole, sum(backbone)))

    def _show_truth(self, plain: Pixels, size: tuple[int, int]) -> None:
        if self.targets is None:
            return
        index = self.chooser.choice.value
        if index == self._shown_truth:
            return
        self._shown_truth = index
        pixels, title = plain, "no truth is known"
        if index < len(self.targets):  # an uploaded image has none
            pixels = with_objects(plain, self.targets[index], size, self.categories)
            title = f"truth: {len(self.targets[index])} objects"
        self.truth.show(captioned(pixels, title), SIDE)
        self.truth.label = title

    def _name_controls(self) -> None:
        controls: dict[str, Any] = {
            "image": self.chooser.choice,
            "upload": self.chooser.upload,
            "ratio": self.ratio,
            "seed": self.seed,
            "score": self.score,
            "pale": self.pale,
            "times": self.table,
        }
        for name, widget in controls.items():
            widget.add_class(f"mimdet-ratio-{name}")


@contextmanager
def stopwatch(module: nn.Module) -> Iterator[list[float]]:
    """Milliseconds of every call of a module inside the `with`."""
    starts: list[float] = []
    took: list[float] = []

    def before(*_: Any) -> None:
        starts.append(time.perf_counter())

    def after(*_: Any) -> None:
        took.append(1000 * (time.perf_counter() - starts.pop()))

    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield took
    finally:
        for hook in hooks:
            hook.remove()


def _medians(runs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return (statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs))


def _table(times: dict[float, list[tuple[float, float]]]) -> str:
    """Medians as bars: the backbone dark, the rest of the detector light."""
    medians = {ratio: _medians(runs) for ratio, runs in sorted(times.items())}
    longest = max(whole for whole, _ in medians.values())
    rows = []
    for ratio, (whole, backbone) in medians.items():
        dark, light = (round(240 * part / longest) for part in (backbone, whole - backbone))
        bars = "".join(
            f"<span style='display:inline-block;height:9px;width:{width}px;background:{colour}'>"
            "</span>"
            for width, colour in ((dark, "#0072B2"), (light, "#56B4E9"))
        )
        rows.append(
            f"<tr><td>{ratio:.2f}</td><td>{bars}</td><td>{whole:.0f} ms, backbone {backbone:.0f} ms"
            f"</td><td>{len(times[ratio])} run{'' if len(times[ratio]) == 1 else 's'}</td></tr>"
        )
    head = "<tr><th>ratio</th><th>backbone, rest</th><th>median</th><th></th></tr>"
    return f"<table class='mimdet-times'>{head}{''.join(rows)}</table>"
