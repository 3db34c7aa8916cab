"""TokenLab: choose the tokens, see what an autoencoder and a detector make of exactly these."""

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ipywidgets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mimdet.inference import generator_for, predict
from mimdet.models.detector import Detector
from mimdet.models.mae import MAE
from mimdet.models.sampling import SAMPLERS, Sample, Sampler, select, token_grid
from mimdet.structures import Detections, Target
from mimdet.viz.draw import Pixels, beside, captioned, enlarged, image_size, to_pixels, with_objects
from mimdet.viz.features import pale_dropped
from mimdet.viz.reconstruction import Answer, Painted, SameTokens, View
from mimdet.viz.record import record
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import STYLE, ImageChooser, Panel, few_proposals, ratio_slider

if TYPE_CHECKING:
    from mimdet.models.detector import Detector


WIDTH = 300
"""Pixels of a canvas on the screen."""
PARTS = {"seen pasted over painted": "pasted", "painted everywhere": "painted"}


class TokenLab(Panel):
    """Which tokens are kept, what a masked autoencoder paints from them, what a detector finds.

    Both are given the same tokens: one covers the same part of the picture in either model
    (`mimdet.viz.reconstruction.SameTokens`).

    Controls: image and upload (the list grows by your own); ratio, sampler and seed (each draws
    anew); tool: "brush" drops tokens from the first picture or brings them back, "select" says what
    happened to the token that is clicked; "reconstruction" shows the painting with or without the
    seen patches; reset forgets the brush. `sample` is what is kept now; `found` and `painted` hold
    what the models made of it.
    """

    label = "a picture and its kept tokens"

    def __init__(
        self,
        detector: "Detector | None" = None,
        mae: MAE | None = None,
        images: Sequence[Tensor] | None = None,
        *,
        samplers: Mapping[str, Sampler] | None = None,
        side: int = 0,
        ratio: float = 0.25,
        score_threshold: float = 0.5,
    ) -> None:
        """detector, mae: one of them, or both; the shipped tiny ones when neither is given.
        images: uint8 (3, H, W), default held-out scenes of ShapesCOCO. samplers: more of them, by
        name: (tokens (L, D), grid, generator) -> scores (L,); tokens are those of the detector's
        stem, without a detector the autoencoder's patch embeddings. side: short side of the image
        in pixels of the detector, default what it is tested at (without a detector: what the
        autoencoder was trained at). ratio: of the first sample, a multiple of 0.05.
        score_threshold: of the detections shown.

        Raises ValueError for a detector that cannot leave tokens out.
        """
        super().__init__()
        if detector is None and mae is None:
            from mimdet.models.weights import load_mae_model
            from mimdet.training.run import load_detector

            detector, mae = load_detector("tiny"), load_mae_model("tiny_mae")
        self.models = SameTokens(detector, mae, side)
        self.detector = detector
        self.mae = mae
        self.score_threshold = score_threshold
        self.samplers = {**SAMPLERS, **(samplers or {})}
        self.painted: Painted | None = None
        self.found: Detections | None = None
        """In the pixels of the resized image."""
        self._drawn_for: Any = None
        self._drawn: list[int] = []
        self._views: dict[int, View] = {}
        self._answers: tuple[Any, Answer] | None = None
        self._remark = ""
        self._build(images, ratio)
        self.redraw()

    @property
    def sample(self) -> Sample:
        """The tokens that are kept now, on the panel's grid."""
        gone = set(self.canvas.dropped)
        grid = (self.canvas.rows, self.canvas.columns)
        kept = [place for place in range(grid[0] * grid[1]) if place not in gone]
        return Sample([torch.tensor(kept, dtype=torch.long)], grid)

    # --------------------------------------------------------------------------- the widgets

    def _build(self, images: Sequence[Tensor] | None, ratio: float) -> None:
        self.chooser = ImageChooser(images)
        self.ratio = ratio_slider(ratio)
        self.sampler = ipywidgets.Dropdown(
            options=list(self.samplers),
            description="sampler",
            style=STYLE,
            layout={"width": "170px"},
        )
        self.seed = ipywidgets.BoundedIntText(
            value=0, min=0, max=9999, description="seed", style=STYLE, layout={"width": "110px"}
        )
        self.tool = ipywidgets.ToggleButtons(
            options=["brush", "select"],
            description="tool",
            style={"button_width": "64px", **STYLE},
            layout={"width": "max-content"},
        )
        self.part = ipywidgets.Dropdown(
            options=list(PARTS), description="reconstruction", style=STYLE
        )
        self.reset = ipywidgets.Button(description="reset", layout={"width": "70px"})
        self.canvas = PatchCanvas(tool="brush", show_grid=True, size=(WIDTH, WIDTH))
        self.painting = PatchCanvas(size=(WIDTH, WIDTH))
        self.detections = PatchCanvas(size=(WIDTH, WIDTH))
        self.canvases = [self.canvas]
        self.titles = ["kept tokens"]
        if self.mae is not None:
            self.canvases.append(self.painting)
            self.titles.append("painted from these tokens")
        if self.detector is not None:
            self.canvases.append(self.detections)
            self.titles.append("detected from these tokens")
        self._name_for_drivers()
        pictures = [
            ipywidgets.VBox([ipywidgets.Label(title), canvas])
            for title, canvas in zip(self.titles, self.canvases, strict=True)
        ]
        hand = [self.tool, *([self.part] if self.mae is not None else []), self.reset]
        self.arrange(
            [*self.chooser.widgets, self.ratio, self.sampler, self.seed], hand, list(pictures)
        )
        self.watch(self.chooser.choice, self.ratio, self.sampler, self.seed, self.part)
        self.watch(self.canvas, name="dropped")
        self.watch(self.canvas, name="selected")
        ipywidgets.dlink((self.tool, "value"), (self.canvas, "tool"))
        self.reset.on_click(self._reset)

    def _name_for_drivers(self) -> None:
        """CSS classes by which a browser test finds each control."""
        named = {
            "image": self.chooser.choice,
            "upload": self.chooser.upload,
            "ratio": self.ratio,
            "sampler": self.sampler,
            "seed": self.seed,
            "tool": self.tool,
            "reconstruction": self.part,
            "reset": self.reset,
            "canvas": self.canvas,
            "painting": self.painting,
            "detections": self.detections,
        }
        for name, widget in named.items():
            widget.add_class(f"mimdet-token-{name}")

    def _reset(self, _: Any) -> None:
        self._drawn_for = None
        self.redraw()

    # --------------------------------------------------------------------------- drawing

    def draw(self) -> str:
        chosen = self.chooser.choice.value
        view = self._view(chosen)
        wanted = (chosen, self.ratio.value, self.sampler.value, self.seed.value)
        if wanted != self._drawn_for:
            self._draw_sample(view)
            self._drawn_for = wanted
        sample = self.sample
        if not len(sample.keep[0]):
            return "<b>Nothing is kept: bring at least one token back, or press reset.</b>"
        key = (chosen, tuple(self.canvas.dropped))
        if self._answers is None or self._answers[0] != key:
            with few_proposals(self.detector) as self._remark:
                self._answers = key, self.models.ask(view, sample)
        answer = self._answers[1]
        self.painted, self.found = answer.painted, answer.found
        self._show(view, answer)
        return self._status(sample, answer)

    def _view(self, chosen: int) -> View:
        """A chosen image, resized for both models; kept, as it does not change."""
        if chosen not in self._views:
            self._views[chosen] = self.models.view(self.chooser.images[chosen])
        return self._views[chosen]

    def _draw_sample(self, view: View) -> None:
        """Let the sampler choose, and put what it leaves out on the canvas."""
        tokens = self.models.tokens(view)
        generator = generator_for(self.seed.value, tokens.device)
        scores = self.samplers[self.sampler.value](tokens, view.grid, generator)
        if scores.shape != (len(tokens),):
            raise ValueError(
                f"the sampler {self.sampler.value!r} returned scores of shape "
                f"{tuple(scores.shape)}; it must return one per token: ({len(tokens)},)"
            )
        sample = select([scores.cpu()], [view.grid], view.grid, self.ratio.value)
        with self.canvas.hold_sync():
            self.canvas.rows, self.canvas.columns = view.grid
            if self.canvas.selected >= len(tokens):
                self.canvas.selected = -1
            gone = ~sample.mask()[0].flatten()
            self.canvas.dropped = self._drawn = gone.nonzero()[:, 0].tolist()

    def _show(self, view: View, answer: Answer) -> None:
        self.canvas.show(to_pixels(view.whole), WIDTH)
        kept, total = len(self.sample.keep[0]), view.grid[0] * view.grid[1]
        self.canvas.label = f"a picture of {view.grid[0]} x {view.grid[1]} tokens, {kept} kept"
        self.label = f"{self.canvas.label}; beside it what the models make of these {kept}"
        if answer.painted is not None:
            part: Tensor = getattr(answer.painted, PARTS[self.part.value])
            self.painting.show(to_pixels(part), WIDTH)
            self.painting.label = f"the picture painted from {kept} of {total} tokens"
        if answer.found is not None:
            size = view.whole.shape[1], view.whole.shape[2]
            names = self.detector.categories if self.detector is not None else []
            picture = enlarged(to_pixels(view.whole), WIDTH)
            drawn = with_objects(picture, answer.found, size, names, self.score_threshold)
            self.detections.show(drawn, WIDTH)
            self.detections.label = f"what is detected from {kept} of {total} tokens"
        for other in self.canvases[1:]:
            other.rows, other.columns = view.grid
            other.selected = self.canvas.selected

    def _status(self, sample: Sample, answer: Answer) -> str:
        kept, total = len(sample.keep[0]), sample.grid[0] * sample.grid[1]
        hand = "" if self.canvas.dropped == self._drawn else ", by hand"
        lines = [f"kept <b>{kept} of {total}</b> tokens ({kept / total:.2f}{hand})"]
        now, whole = (self.models.encoder_cost(number) for number in (kept, total))
        lines.append(
            f"encoder {now / 1e9:.3g} of {whole / 1e9:.3g} G multiply-adds ({now / whole:.2f})"
        )
        if answer.painted is not None:
            lines.append(f"painting error {answer.painted.loss:.3f}")
        if answer.found is not None:
            found = int((answer.found.scores >= self.score_threshold).sum())
            lines.append(f"{found} objects of score ≥ {self.score_threshold:g}")
        lines += [f"{name} {took:.0f} ms" for name, took in answer.milliseconds.items()]
        lines += [self._remark] if self._remark else []
        return " · ".join(lines) + self._about_selected(sample, answer)

    def _about_selected(self, sample: Sample, answer: Answer) -> str:
        place = self.canvas.selected
        if place < 0:
            return ""
        row, column = place // sample.grid[1], place % sample.grid[1]
        fate = "left out" if place in self.canvas.dropped else "kept"
        text = f"<br>token in row {row}, column {column}: {fate}"
        if answer.painted is not None:
            off = float(answer.painted.errors[row, column])
            text += f"; painted {off:.0f} of 255 grey levels off, on average"
        return text

    def snapshot(self) -> Image.Image:
        """The pictures side by side, each under what it is."""
        pairs = zip(self.titles, self.canvases, strict=True)
        return Image.fromarray(
            beside([captioned(np.asarray(canvas.snapshot()), title) for title, canvas in pairs])
        )


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
        fed = self.model.resize.size(*size)
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
