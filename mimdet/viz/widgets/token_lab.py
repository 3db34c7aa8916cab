"""TokenLab: choose the tokens, see what an autoencoder and a detector make of exactly these."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from mimdet.analysis.cost import transformer_cost
from mimdet.images import Resize
from mimdet.inference import generator_for, run_detector
from mimdet.models import sampling
from mimdet.models.detector import Detector
from mimdet.models.mae import MAE
from mimdet.models.sampling import PATCH, Sample, Sampler, Sampling, padded_places
from mimdet.models.weights import load_mae_model
from mimdet.structures import Detections, Target
from mimdet.training.run import load_detector
from mimdet.viz import draw, reconstruction
from mimdet.viz.reconstruction import Painted, whole_patches
from mimdet.viz.style import plural
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import ImagePanel, dropdown, few_proposals, timed, toggles

WIDTH = 300
"""Pixels of a canvas on the screen."""
SCORE = 0.5
"""Of the detections shown, at least."""
PARTS = {"seen pasted over painted": "pasted", "painted everywhere": "painted"}
"""What is shown of a `Painted`."""


class TokenLab(ImagePanel):
    """Which tokens are kept, what a masked autoencoder paints from them, what a detector finds.

    Both are given the same tokens. A detector's token is 16 x 16 pixels of its resized image. The
    same image, extended at the right and the bottom to whole tokens, is resized until a token is
    one patch of the autoencoder. So a token covers the same part of the picture in both, and both
    resize their position tables to the grid, as always. Padding is never kept. Without a detector
    an image has the side that the autoencoder was trained at.

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
        if detector is not None and not detector.samples:
            raise ValueError(
                f"a {detector.config.backbone.kind} detector sees every token: give one whose "
                'backbone samples (backbone.kind="mimdet"), or an autoencoder alone'
            )
        self.detector, self.mae = detector, mae
        self.samplers = {**sampling.SAMPLERS, **(samplers or {})}
        self.painted: Painted | None = None
        self.found: Detections | None = None
        self.milliseconds: dict[str, float] = {}
        """Of each model, at its last answer."""
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
        self.once("image", chosen, self._look)
        wanted = (chosen, self.ratio.value, self.sampler.value, self.seed.value)
        self._drawn = self.once("drawn", wanted, self._draw_sample)
        if not len(self.sample.keep[0]):
            return "<b>Nothing is kept: bring at least one token back, or press reset.</b>"
        self._remark = self.once("answer", (chosen, tuple(self.canvas.dropped)), self._ask)
        return self._show()

    def _look(self) -> None:
        """The chosen image as both models are given it."""
        detector, mae = self.detector, self.mae
        if detector is not None:
            resize = detector.resize
        elif mae is not None:
            # In the detector's measure, where a token is 16 pixels.
            side = reconstruction.native_side(mae) // mae.patch_size * PATCH
            resize = Resize(side, reconstruction.LONGEST * side)
        self.resized = resize(self.chosen)
        """uint8 (3, H, W): the detector's input, before padding."""
        self.grid = self.padded = sampling.token_grid(*draw.image_size(self.resized))
        """(h, w): the tokens it touches; of a detector's batch, `padded`, the upper left part."""
        if detector is not None:
            height, width = detector.batch([self.resized]).tensors.shape[2:]
            self.padded = sampling.token_grid(height, width)
        self.whole = whole_patches(self.resized, self.grid, PATCH)
        """uint8 (3, 16 h, 16 w): the image extended to whole tokens."""
        if mae is not None:
            self.patches = whole_patches(self.resized, self.grid, mae.patch_size, PATCH)
            """uint8 (3, h * patch, w * patch): the same tokens as patches of the autoencoder."""

    def _tokens(self) -> Tensor:
        """What a sampler may look at, (L, D): the detector's stem, or patch embeddings."""
        if self.detector is None:
            mae: Any = self.mae
            return reconstruction.patch_tokens(self.patches, mae)
        stem: Any = self.detector.backbone.stem
        tokens = stem(self.detector.batch([self.resized]).tensors).tokens  # (1, D, h, w)
        return tokens[0].flatten(1).T[padded_places(self.grid, self.padded, tokens.device)]

    def _draw_sample(self) -> list[int]:
        """Let the sampler choose, put what it leaves out on the canvas and return it."""
        tokens = self._tokens()
        sampler, ratio = self.samplers[self.sampler.value], self.ratio.value
        generators = [generator_for(self.seed.value, tokens.device)]
        sample = sampling.draw(
            sampler, tokens[None], [self.grid], self.grid, ratio, generators=generators
        )
        with self.canvas.hold_sync():
            self.canvas.rows, self.canvas.columns = self.grid
            if self.canvas.selected >= len(tokens):
                self.canvas.selected = -1
            self.canvas.dropped = (~sample.mask()[0].flatten()).nonzero()[:, 0].tolist()
        return self.canvas.dropped

    def _ask(self) -> str:
        """Run the models on exactly the kept tokens; what has to be said about that."""
        sample, mae, detector, remark = self.sample, self.mae, self.detector, ""
        if mae is not None:
            self.painted, self.milliseconds["autoencoder"] = timed(
                lambda: reconstruction.paint(self.patches, mae, sample)
            )
        if detector is not None:
            places = padded_places(self.grid, self.padded, torch.device("cpu"))[sample.keep[0]]
            same = Sampling(sample=Sample([places], self.padded))
            with few_proposals(detector) as remark:
                self.found, self.milliseconds["detector"] = timed(
                    lambda: run_detector(detector, [self.resized], same)[0].to("cpu")
                )
        return remark

    def _encoder_cost(self, kept: int) -> int:
        """Multiply-adds of the encoder's blocks: the detector's, or the autoencoder's."""
        if self.detector is not None:
            cfg = self.detector.config.backbone
            return transformer_cost(kept, cfg.embed_dim, cfg.depth)
        mae: Any = self.mae  # one token more: it has a class token
        return transformer_cost(kept + 1, mae.pos_embed.shape[2], len(mae.blocks))

    def _show(self) -> str:
        """Fill the canvases; the status line."""
        kept, total, place = len(self.sample.keep[0]), math.prod(self.grid), self.canvas.selected
        whole, some = draw.to_pixels(self.whole, WIDTH), f"{kept} of {total} tokens"
        now, most = self._encoder_cost(kept), self._encoder_cost(total)
        gone, drawn = {*self.canvas.dropped}, {*self._drawn}
        less, more = len(gone - drawn), len(drawn - gone)
        hand = f"; by hand {less} dropped, {more} brought back" if less or more else ""
        parts = [
            f"kept <b>{some}</b> ({kept / total:.2f}{hand})",
            f"encoder {now / 1e9:.3g} of {most / 1e9:.3g} G multiply-adds ({now / most:.2f})",
        ]
        fate = "left out" if place in self.canvas.dropped else "kept"
        row, column = divmod(place, self.grid[1])
        about = f"<br>token in row {row}, column {column}: {fate}"
        self.canvas.show(whole, title=f"a picture: {some} kept")
        self.label = f"{self.canvas.label}; beside it what the models make of these"
        if self.painted is not None:
            part: Tensor = getattr(self.painted, self.reconstruction.value)
            self.painting.show(draw.to_pixels(part, WIDTH), title=f"painted from {some}")
            parts.append(f"painting error {self.painted.loss:.3f}")
            off = float(self.painted.errors.flatten()[place])
            about += f"; painted {off:.0f} of 255 grey levels off, on average"
        if self.found is not None and self.detector is not None:
            marks = draw.marks_of(self.found, self.detector.categories, SCORE)
            pixels = draw.with_marks(whole, marks, draw.image_size(self.whole))
            self.detections.show(pixels, title=f"detected from {some}")
            parts.append(f"{plural(len(marks), 'object')} of score ≥ {SCORE:g}")
            if self.targets:
                self.show_truth(self.truth, self.detector.categories, WIDTH)
        for other in self.canvases[1:]:
            other.rows, other.columns = self.grid
            other.selected = place
        parts += [f"{name} {took:.0f} ms" for name, took in self.milliseconds.items()]
        return " · ".join(parts) + self._remark + (about if place >= 0 else "")
