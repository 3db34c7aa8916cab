"""TokenLab: choose the tokens, see what an autoencoder and a detector make of exactly these."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from mimdet.inference import generator_for
from mimdet.models.detector import Detector
from mimdet.models.mae import MAE
from mimdet.models.sampling import SAMPLERS, Sample, Sampler
from mimdet.models.sampling import draw as draw_sample
from mimdet.models.weights import load_mae_model
from mimdet.structures import Detections, Target
from mimdet.training.run import load_detector
from mimdet.viz import draw
from mimdet.viz.reconstruction import Answer, Painted, SameTokens, View
from mimdet.viz.style import plural
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import ImagePanel, dropdown, few_proposals, toggles

WIDTH = 300
"""Pixels of a canvas on the screen."""
SCORE = 0.5
"""Of the detections shown, at least."""
PARTS = {"seen pasted over painted": "pasted", "painted everywhere": "painted"}
"""What is shown of a `Painted`."""


class TokenLab(ImagePanel):
    """Which tokens are kept, what a masked autoencoder paints from them, what a detector finds.

    Both are given the same tokens: one covers the same part of the picture in either model
    (`mimdet.viz.reconstruction.SameTokens`).

    Controls: image and upload (the list grows by your own); ratio (down to one token), sampler and
    seed (each draws anew); tool: "brush" drops tokens from the first picture, or brings them back
    when the stroke starts on one that is left out; "select" says what happened to the token that is
    clicked; "reconstruction" shows the painting with or without the seen patches; reset forgets the
    brush. Beside it the truth, where it is known. `sample` is what is kept now; `found` (in the
    pixels of the resized image) and `painted` hold what the models made of it.
    """

    name = "token"
    label = "a picture and its kept tokens"

    def __init__(
        self,
        detector: Detector | None = None,
        mae: MAE | None = None,
        images: Any = None,
        *,
        targets: Sequence[Target] | None = None,
        samplers: Mapping[str, Sampler] | None = None,
        ratio: float = 0.25,
    ) -> None:
        """detector, mae: one of them, or both; the shipped tiny ones when neither is given.
        images: as `predict` takes them, default held-out scenes of ShapesCOCO. targets: their
        truth, one an image, drawn where there is a detector. samplers: more of them, by name:
        (tokens (L, D), grid, generator) -> scores (L,); tokens are those of the detector's stem,
        without a detector the autoencoder's patch embeddings. ratio: of the first sample, a
        multiple of 0.05. Raises ValueError for a detector that cannot leave tokens out.
        """
        super().__init__(images, ratio, targets)
        if detector is None and mae is None:
            detector, mae = load_detector("tiny"), load_mae_model("tiny_mae")
        self.models = SameTokens(detector, mae)
        self.detector = detector
        self.samplers = {**SAMPLERS, **(samplers or {})}
        self.painted: Painted | None = None
        self.found: Detections | None = None
        self.sampler = dropdown("sampler", list(self.samplers))
        self.tool = toggles("tool", ["brush", "select"])
        self.reconstruction = dropdown("reconstruction", PARTS)
        self.reset = self.button("reset", self._reset)
        self.canvas = PatchCanvas(tool="brush", show_grid=True)
        ipywidgets.dlink((self.tool, "value"), (self.canvas, "tool"))
        self.canvas.observe(self.changed, ["dropped", "selected"])
        self.painting, self.detections, self.truth = (PatchCanvas() for _ in range(3))
        truth = detector and self.targets
        answers = {self.painting: mae, self.detections: detector, self.truth: truth}
        self.canvases = [self.canvas, *(canvas for canvas, model in answers.items() if model)]
        hand = [self.tool, self.reconstruction, self.reset] if mae else [self.tool, self.reset]
        self.open([*self.inputs, self.sampler], hand, self.canvases)

    @property
    def sample(self) -> Sample:
        """The tokens that are kept now, on the panel's grid."""
        kept = torch.ones(self.canvas.rows * self.canvas.columns)
        kept[self.canvas.dropped] = 0
        return Sample([kept.nonzero()[:, 0]], (self.canvas.rows, self.canvas.columns))

    def _reset(self) -> None:
        self.canvas.dropped = self._drawn

    def draw(self) -> str:
        chosen = self.image.value
        view = self.once("view", chosen, lambda: self.models.view(self.chosen))
        wanted = (chosen, self.ratio.value, self.sampler.value, self.seed.value)
        self._drawn = self.once("drawn", wanted, lambda: self._draw_sample(view))
        if not len(self.sample.keep[0]):
            return "<b>Nothing is kept: bring at least one token back, or press reset.</b>"
        key = (chosen, tuple(self.canvas.dropped))
        answer, remark = self.once("answer", key, lambda: self._ask(view))
        self.painted, self.found = answer.painted, answer.found
        return self._show(view, answer, remark)

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

    def _ask(self, view: View) -> tuple[Answer, str]:
        """What the models make of the kept tokens, and what has to be said about that."""
        with few_proposals(self.detector) if self.detector else nullcontext("") as remark:
            return self.models.ask(view, self.sample), remark

    def _show(self, view: View, answer: Answer, remark: str) -> str:
        """Fill the canvases; the status line."""
        kept, total, place = len(self.sample.keep[0]), math.prod(view.grid), self.canvas.selected
        whole, some = draw.to_pixels(view.whole, WIDTH), f"{kept} of {total} tokens"
        now, most = (self.models.encoder_cost(number) for number in (kept, total))
        gone, drawn = {*self.canvas.dropped}, {*self._drawn}
        less, more = len(gone - drawn), len(drawn - gone)
        hand = f"; by hand {less} dropped, {more} brought back" if less or more else ""
        parts = [
            f"kept <b>{some}</b> ({kept / total:.2f}{hand})",
            f"encoder {now / 1e9:.3g} of {most / 1e9:.3g} G multiply-adds ({now / most:.2f})",
        ]
        fate = "left out" if place in self.canvas.dropped else "kept"
        row, column = divmod(place, view.grid[1])
        about = f"<br>token in row {row}, column {column}: {fate}"
        self.canvas.show(whole, title=f"a picture: {some} kept")
        self.label = f"{self.canvas.label}; beside it what the models make of these"
        if answer.painted is not None:
            part: Tensor = getattr(answer.painted, self.reconstruction.value)
            self.painting.show(draw.to_pixels(part, WIDTH), title=f"painted from {some}")
            parts.append(f"painting error {answer.painted.loss:.3f}")
            off = float(answer.painted.errors.flatten()[place])
            about += f"; painted {off:.0f} of 255 grey levels off, on average"
        if answer.found is not None and self.detector is not None:
            marks = draw.marks_of(answer.found, self.detector.categories, SCORE)
            pixels = draw.with_marks(whole, marks, draw.image_size(view.whole))
            self.detections.show(pixels, title=f"detected from {some}")
            parts.append(f"{plural(len(marks), 'object')} of score ≥ {SCORE:g}")
            if self.targets:
                self.show_truth(self.truth, self.detector.categories, WIDTH)
        for other in self.canvases[1:]:
            other.rows, other.columns = view.grid
            other.selected = place
        parts += [f"{name} {took:.0f} ms" for name, took in answer.milliseconds.items()]
        return " · ".join(parts) + remark + (about if place >= 0 else "")
