"""TokenLab: choose the tokens, see what an autoencoder and a detector make of exactly these."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import torch
from torch import Tensor

from mimdet.inference import generator_for, predict
from mimdet.models.detector import Detector
from mimdet.models.mae import MAE
from mimdet.models.sampling import SAMPLERS, Sample, Sampler, token_grid
from mimdet.models.sampling import draw as draw_sample
from mimdet.structures import Detections, Target
from mimdet.viz import draw
from mimdet.viz.features import pale_dropped
from mimdet.viz.reconstruction import Answer, Painted, SameTokens, View, timed
from mimdet.viz.record import record
from mimdet.viz.style import BLUE, SKY
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import ImagePanel, dropdown, few_proposals, score_slider, toggles

WIDTH = 300
"""Pixels of a canvas on the screen."""
PARTS = {"seen pasted over painted": "pasted", "painted everywhere": "painted"}
"""What is shown of a `Painted`."""


class TokenLab(ImagePanel):
    """Which tokens are kept, what a masked autoencoder paints from them, what a detector finds.

    Both are given the same tokens: one covers the same part of the picture in either model
    (`mimdet.viz.reconstruction.SameTokens`).

    Controls: image and upload (the list grows by your own); ratio, sampler and seed (each draws
    anew); tool: "brush" drops tokens from the first picture or brings them back, "select" says what
    happened to the token that is clicked; "reconstruction" shows the painting with or without the
    seen patches; reset forgets the brush. `sample` is what is kept now; `found` and `painted` hold
    what the models made of it.
    """

    name = "token"
    label = "a picture and its kept tokens"

    def __init__(
        self,
        detector: Detector | None = None,
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
        super().__init__(images, ratio)
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
        self._remark = ""
        self._build()
        self.redraw()

    @property
    def sample(self) -> Sample:
        """The tokens that are kept now, on the panel's grid."""
        kept = torch.ones(self.canvas.rows * self.canvas.columns)
        kept[self.canvas.dropped] = 0
        return Sample([kept.nonzero()[:, 0]], (self.canvas.rows, self.canvas.columns))

    # --------------------------------------------------------------------------- the widgets

    def _build(self) -> None:
        self.sampler = dropdown("sampler", list(self.samplers))
        self.tool = toggles("tool", ["brush", "select"], "brush")
        self.reconstruction = dropdown("reconstruction", PARTS)
        self.reset = ipywidgets.Button(description="reset", layout={"width": "70px"})
        self.canvas = PatchCanvas(tool="brush", show_grid=True, title="kept tokens")
        self.painting = PatchCanvas(title="painted from these tokens")
        self.detections = PatchCanvas(title="detected from these tokens")
        self.canvases, hand = [self.canvas], [self.tool, self.reset]
        if self.mae is not None:
            self.canvases.append(self.painting)
            hand.insert(1, self.reconstruction)
        if self.detector is not None:
            self.canvases.append(self.detections)
        self.arrange([*self.inputs, self.sampler], hand, self.canvases)
        self.watch(self.sampler, self.reconstruction)
        self.watch(self.canvas, name="dropped")
        self.watch(self.canvas, name="selected")
        ipywidgets.dlink((self.tool, "value"), (self.canvas, "tool"))
        self.reset.on_click(self._reset)

    def _reset(self, _: Any) -> None:
        self.canvas.dropped = self._drawn

    # --------------------------------------------------------------------------- drawing

    def draw(self) -> str:
        chosen = self.image.value
        view = self.once("view", chosen, lambda: self.models.view(self.chosen))
        wanted = (chosen, self.ratio.value, self.sampler.value, self.seed.value)
        self._drawn = self.once("drawn", wanted, lambda: self._draw_sample(view))
        if not len(self.sample.keep[0]):
            return "<b>Nothing is kept: bring at least one token back, or press reset.</b>"
        dropped = tuple(self.canvas.dropped)
        answer = self.once("answer", (chosen, dropped), lambda: self._ask(view))
        self.painted, self.found = answer.painted, answer.found
        self._show(view, answer)
        return self._status(answer)

    def _ask(self, view: View) -> Answer:
        with few_proposals(self.detector) as self._remark:
            return self.models.ask(view, self.sample)

    def _draw_sample(self, view: View) -> list[int]:
        """Let the sampler choose, put what it leaves out on the canvas and return it."""
        tokens = self.models.tokens(view)
        sampler, ratio = self.samplers[self.sampler.value], self.ratio.value
        generators = [generator_for(self.seed.value, tokens.device)]
        sample = draw_sample(
            sampler, tokens[None], [view.grid], view.grid, ratio, generators=generators
        )
        with self.canvas.hold_sync():
            self.canvas.rows, self.canvas.columns = view.grid
            if self.canvas.selected >= len(tokens):
                self.canvas.selected = -1
            self.canvas.dropped = (~sample.mask()[0].flatten()).nonzero()[:, 0].tolist()
        return self.canvas.dropped

    def _show(self, view: View, answer: Answer) -> None:
        whole = draw.to_pixels(view.whole, WIDTH)
        kept = f"{len(self.sample.keep[0])} of {math.prod(view.grid)} tokens"
        self.canvas.show(whole)
        self.canvas.label = f"a picture of {view.grid[0]} x {view.grid[1]} tokens, kept are {kept}"
        self.label = f"{self.canvas.label}; beside it what the models make of these"
        if answer.painted is not None:
            part: Tensor = getattr(answer.painted, self.reconstruction.value)
            self.painting.show(draw.to_pixels(part, WIDTH))
            self.painting.label = f"the picture painted from {kept}"
        if answer.found is not None and self.detector is not None:
            marks = draw.marks_of(answer.found, self.detector.categories, self.score_threshold)
            self.detections.show(draw.with_marks(whole, marks, draw.image_size(view.whole)))
            self.detections.label = f"what is detected from {kept}"
        for other in self.canvases[1:]:
            other.rows, other.columns = view.grid
            other.selected = self.canvas.selected

    def _status(self, answer: Answer) -> str:
        kept, (rows, columns) = len(self.sample.keep[0]), self.sample.grid
        total, place = rows * columns, self.canvas.selected
        hand = "" if self.canvas.dropped == self._drawn else ", by hand"
        now, whole = (self.models.encoder_cost(number) for number in (kept, total))
        parts = [
            f"kept <b>{kept} of {total}</b> tokens ({kept / total:.2f}{hand})",
            f"encoder {now / 1e9:.3g} of {whole / 1e9:.3g} G multiply-adds ({now / whole:.2f})",
        ]
        fate = "left out" if place in self.canvas.dropped else "kept"
        about = f"<br>token in row {place // columns}, column {place % columns}: {fate}"
        if answer.painted is not None:
            parts.append(f"painting error {answer.painted.loss:.3f}")
            off = float(answer.painted.errors.flatten()[place])
            about += f"; painted {off:.0f} of 255 grey levels off, on average"
        if answer.found is not None:
            found = int((answer.found.scores >= self.score_threshold).sum())
            parts.append(f"{found} objects of score ≥ {self.score_threshold:g}")
        parts += [f"{name} {took:.0f} ms" for name, took in answer.milliseconds.items()]
        return " · ".join(parts) + self._remark + (about if place >= 0 else "")


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
        images: Sequence[Tensor] | None = None,
        targets: Sequence[Target] | None = None,
        categories: Sequence[str] | None = None,
    ) -> None:
        """images: uint8 (3, H, W), default: drawn scenes; targets: their truth, one an image;
        categories: class names, default: the model's own.

        Raises ValueError for a model that keeps every token, and for another number of targets.
        """
        super().__init__(images, ratio=1.0)
        if not model.samples:
            raise ValueError("this backbone sees every token: a dial needs a MIMDet to turn")
        if targets is not None and len(targets) != len(self.images):
            raise ValueError(
                f"{len(targets)} targets for {len(self.images)} images: give one per image"
            )
        self.model = model
        self.targets = None if targets is None else list(targets)
        self.categories = model.categories if categories is None else categories
        self.score = score_slider(0.3)
        self.pale = ipywidgets.Checkbox(True, description="pale tokens", indent=False)
        self.truth, self.picture, self.table = PatchCanvas(), PatchCanvas(), ipywidgets.HTML()
        self.times: dict[float, list[tuple[float, float]]] = {}
        """Ratio -> (milliseconds of the detector, of its backbone) of every run."""
        self._remark = ""
        self.canvases = [self.picture] if targets is None else [self.truth, self.picture]
        self.arrange([*self.inputs, self.score, self.pale], self.canvases, self.table)
        self.watch(self.score, self.pale)
        self.redraw()

    def draw(self) -> str:
        ratio, index, size = self.ratio.value, self.image.value, draw.image_size(self.chosen)
        self.found, sample = self.once("found", (index, ratio, self.seed.value), self._detect)
        pixels = draw.to_pixels(self.chosen, SIDE)
        if self.targets is not None:
            known = self.targets[index : index + 1]  # of an uploaded image none
            marks = [mark for target in known for mark in draw.marks_of(target, self.categories)]
            title = f"truth: {len(marks)} objects" if known else "no truth is known"
            self.truth.show(draw.with_marks(pixels, marks, size), title=title)
        marks = draw.marks_of(self.found, self.categories, self.score.value)
        fed = self.model.resize.size(*size)
        if self.pale.value:
            pixels = pale_dropped(pixels, sample, fed)
        kept = f"{len(sample.keep[0])} of {math.prod(token_grid(*fed))} tokens"
        title = f"{kept}: {len(marks)} found"
        self.picture.show(draw.with_marks(pixels, marks, size), title=title)
        self.label = f"An image, detections at ratio {ratio:.2f}: {title}."
        self.table.value = _table(self.times)
        whole, backbone = np.median(self.times[ratio], axis=0)
        return (
            f"ratio {ratio:.2f}: {kept} · {len(marks)} detections of score {self.score.value:.2f} "
            f"or more · {whole:.0f} ms, median of {len(self.times[ratio])} "
            f"(backbone {backbone:.0f} ms){self._remark}"
        )

    def _detect(self) -> tuple[Detections, Sample]:
        """Run the model at the present setting; what it found, all scores, in the image's own
        pixels."""
        ratio, seed, backbone = self.ratio.value, self.seed.value, self.model.backbone
        clock: list[float] = []

        def tick(*_: Any) -> None:
            clock.append(time.perf_counter())

        with (
            few_proposals(self.model) as self._remark,
            record(self.model, "backbone") as seen,
            backbone.register_forward_pre_hook(tick),
            backbone.register_forward_hook(tick),
        ):
            found, whole = timed(
                lambda: predict(self.model, self.chosen, sample_ratio=ratio, seed=seed)
            )
        assert seen.sample is not None
        self.times.setdefault(ratio, []).append((whole, 1000 * (clock[1] - clock[0])))
        return found, seen.sample


def _table(times: dict[float, list[tuple[float, float]]]) -> str:
    """Medians as bars: the backbone dark, the rest of the detector light."""
    medians = {ratio: np.median(runs, axis=0) for ratio, runs in sorted(times.items())}
    longest = max(whole for whole, _ in medians.values())
    rows = ["<tr><th>ratio</th><th>backbone, rest</th><th>median</th></tr>"]
    for ratio, (whole, backbone) in medians.items():
        colours = f"{BLUE} {100 * backbone / whole:.0f}%,{SKY} 0"
        rows.append(
            f"<tr><td>{ratio:.2f}</td><td><div style='height:9px;width:{240 * whole / longest:.0f}"
            f"px;background:linear-gradient(90deg,{colours})'></div></td><td>{whole:.0f} ms, "
            f"backbone {backbone:.0f} ms</td><td>runs: {len(times[ratio])}</td></tr>"
        )
    return f"<table class='mimdet-times'>{''.join(rows)}</table>"
