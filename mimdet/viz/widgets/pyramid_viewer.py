"""PyramidViewer: every map of one or several detectors, level by level."""

import math
from collections.abc import Mapping, Sequence

import ipywidgets
from torch import Tensor

from mimdet.models.detector import Detector
from mimdet.models.sampling import token_grid
from mimdet.viz import draw
from mimdet.viz.draw import Pixels
from mimdet.viz.features import (
    LEVELS,
    Pyramid,
    channel_map,
    fit_basis,
    norm_map,
    pale_dropped,
    pca_picture,
    pyramid_of,
    strongest_channels,
)
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import ImagePanel, ratio_slider, seed_slider

SIDE = 320  # pixels of a canvas on the screen
BEFORE_SAMPLING = ("c2", "c3", "tokens")
ALL = "side by side"


class PyramidViewer(ImagePanel):
    """The maps of a detector; with several detectors, side by side.

    - *image*, *your own*: what is looked at. The first picture shows it as the network gets it;
      tokens that the encoder does not see are pale.
    - *level*: c2, c3 and tokens of the stem, c4 and c5 of the transformer, p2 to p6 of the neck.
    - *view*: PCA in three colours, norm, or one channel.
    - *channel*: which one, by falling variance: 0 is the one that varies most.
    - *model*: one detector, or all side by side (where several were given).
    - *one scale for all*: the same PCA or scale for all models. Networks trained apart name their
      channels differently, so a shared PCA shows which varies more, not that colours mean the same.
    - *ratio kept*, *seed*: which tokens the encoder sees. The PCA and scales are those at ratio 1,
      so colours stay when the ratio moves, and the status line says how far the map has moved.
    """

    name = "pyramid"

    def __init__(
        self, models: Detector | Mapping[str, Detector], images: Sequence[Tensor] | None = None
    ) -> None:
        """models: a detector, or name -> detector; images: uint8 (3, H, W), default: drawn scenes.

        Raises ValueError when there is no model.
        """
        super().__init__(images)
        self.models = {"model": models} if isinstance(models, Detector) else dict(models)
        if not self.models:
            raise ValueError("no model to look into: give a detector, or name -> detector")
        sampled = all(model.samples for model in self.models.values())
        levels = [level for level in LEVELS if sampled or level != "tokens"]  # others have no stem
        layout = {"width": "170px"}
        self.level = ipywidgets.Dropdown(options=levels, description="level", layout=layout)
        self.view = ipywidgets.ToggleButtons(
            options=["PCA", "norm", "channel"], style={"button_width": "80px"}
        )
        self.channel = ipywidgets.IntSlider(description="channel", min=0, max=0)
        self.model = ipywidgets.Dropdown(
            options=[ALL, *self.models], description="model", layout=layout
        )
        self.scale = ipywidgets.Checkbox(True, description="one scale for all", indent=False)
        self.ratio, self.seed = ratio_slider(1.0), seed_slider()
        self.picture = PatchCanvas(label="the image", size=(SIDE, SIDE))
        self.maps = {name: PatchCanvas(size=(SIDE, SIDE)) for name in self.models}
        self._seen: dict[str, dict[tuple[float, int], Pyramid]] = {}
        self._image: Tensor | None = None
        controls = [self.level, self.view, self.channel, self.model, self.scale]
        self.arrange(
            [self.image, self.upload, self.ratio, self.seed],
            controls if len(self.models) > 1 else controls[:3],
            [self.picture, *self.maps.values()],
        )
        self.watch(self.ratio, self.seed, *controls)
        self.redraw()

    def draw(self) -> str:
        if self._image is not self.chosen:
            self._image = self.chosen
            self._seen = {name: {} for name in self.models}
        shown = list(self.models) if self.model.value == ALL else [self.model.value]
        where = self.ratio.value, self.seed.value
        now = {name: self._pyramid(name, *where) for name in shown}
        full = {name: self._pyramid(name, 1.0, 0) for name in shown}
        level = self.level.value
        most = min(len(found.only(level)[level]) for found in now.values())
        self.channel.max = most - 1
        self.channel.disabled = self.view.value != "channel"
        pictures = self._pictures(
            [found.maps[level] for found in now.values()],
            [found.maps[level] for found in full.values()],
        )
        for name, canvas in self.maps.items():
            canvas.layout.display = None if name in shown else "none"
        for name, (pixels, note) in zip(shown, pictures, strict=True):
            self._show(name, now[name], pixels, note)
        first = now[shown[0]]
        self._show_image(first)
        self.canvases = [self.picture, *(self.maps[name] for name in shown)]
        self.label = (
            f"An image and its map {level} in {', '.join(shown)}: {self.view.value} at ratio "
            f"{self.ratio.value:.2f}."
        )
        moved = {name: _moved(now[name].maps[level], full[name].maps[level]) for name in shown}
        return _status(level, _kept(first), moved, [note for _, note in pictures])

    def _pyramid(self, name: str, ratio: float, seed: int) -> Pyramid:
        """What a model makes of the image; kept for the last setting and for ratio 1."""
        seen = self._seen[name]
        model = self.models[name]
        key = (ratio, seed) if ratio < 1 and model.samples else (1.0, 0)
        if key not in seen:
            for old in [other for other in seen if other != (1.0, 0)]:
                del seen[old]
            seen[key] = pyramid_of(model, self.chosen, sample_ratio=key[0], seed=seed)
        return seen[key]

    def _pictures(
        self, maps: Sequence[Tensor], references: Sequence[Tensor]
    ) -> list[tuple[Pixels, str]]:
        """Each map as pixels and what they show; scales are those of the references."""
        one = self.scale.value and len({len(reference) for reference in references}) == 1
        if self.view.value == "PCA":
            fits = [list(references)] if one else [[reference] for reference in references]
            bases = [fit_basis(*group) for group in fits] * (len(maps) if one else 1)
            notes = [f"3 colours carry {100 * float(b.explained.sum()):.0f} %" for b in bases]
            pixels = [pca_picture(m, basis) for m, basis in zip(maps, bases, strict=True)]
            return list(zip(pixels, notes, strict=True))
        planes, names = self._planes(maps, references)
        scales, _ = self._planes(references, references)
        ends = [(float(values.min()), float(values.max())) for values in scales]
        if one and self.view.value == "norm":
            ends = [(min(low for low, _ in ends), max(high for _, high in ends))] * len(ends)
        notes = [f"{name} {e[0]:.1f} to {e[1]:.1f}" for name, e in zip(names, ends, strict=True)]
        pixels = [draw.heat(plane, *e) for plane, e in zip(planes, ends, strict=True)]
        return list(zip(pixels, notes, strict=True))

    def _planes(
        self, maps: Sequence[Tensor], references: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[str]]:
        """(h, w) of every map: its norm, or the channel that varies so much in its reference."""
        if self.view.value == "norm":
            return [norm_map(features) for features in maps], ["norm"] * len(maps)
        rank = self.channel.value
        chosen = [strongest_channels(reference, rank + 1)[rank] for reference in references]
        planes = [channel_map(m, channel) for m, channel in zip(maps, chosen, strict=True)]
        return planes, [f"channel {channel}" for channel in chosen]

    def _show(self, name: str, found: Pyramid, pixels: Pixels, note: str) -> None:
        level = self.level.value
        title = f"{level}: {' x '.join(map(str, found.maps[level].shape))}"
        if len(self.models) > 1:
            title = f"{name}, {title}"
        self.maps[name].show(draw.enlarged(pixels, SIDE, smooth=False), SIDE, title)
        self.maps[name].label = f"{title}, {note}"

    def _show_image(self, found: Pyramid) -> None:
        pixels = draw.to_pixels(found.image, SIDE)
        if found.sample is not None:
            pixels = pale_dropped(pixels, found.sample, draw.image_size(found.image))
        self.picture.show(pixels, SIDE, "image")


def _status(level: str, kept: str, moved: Mapping[str, float], notes: Sequence[str]) -> str:
    text = f"{level} · {kept} · {' | '.join(notes)}"
    if level in BEFORE_SAMPLING:
        return f"{text} · made before tokens are sampled: the ratio does not matter"
    changes = [f"{100 * change:.1f} %" for change in moved.values()]
    return f"{text} · moved from ratio 1 by {' | '.join(changes)}"


def _kept(found: Pyramid) -> str:
    if found.sample is None:
        return "this backbone sees every token"
    total = math.prod(token_grid(*found.size))
    return f"the encoder sees {len(found.sample.keep[0])} of {total} tokens"


def _moved(now: Tensor, full: Tensor) -> float:
    """Length of the change over length of the map."""
    return float((now - full).norm() / full.norm().clamp(min=1e-12))
