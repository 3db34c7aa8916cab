"""TokenLab: choose the tokens, see what an autoencoder and a detector make of exactly these."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimdet.models.mae import MAE
from mimdet.models.sampling import SAMPLERS, Sample, Sampler, select
from mimdet.predict import generator_for
from mimdet.structures import Detections
from mimdet.viz.pixels import beside, captioned, enlarged, to_pixels, with_objects
from mimdet.viz.reconstruction import Painted
from mimdet.viz.same_tokens import Answer, SameTokens, View
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
    (`mimdet.viz.same_tokens.SameTokens`).

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
        gone = torch.ones(len(tokens), dtype=torch.bool)
        gone[sample.keep[0]] = False
        with self.canvas.hold_sync():
            self.canvas.rows, self.canvas.columns = view.grid
            if self.canvas.selected >= len(tokens):
                self.canvas.selected = -1
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
