"""PyramidViewer: every map of one or several detectors, level by level."""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import ipywidgets
from torch import Tensor

from mimdet.models.detector import Detector
from mimdet.models.sampling import token_grid
from mimdet.viz import draw, features
from mimdet.viz.draw import Picture
from mimdet.viz.widgets.canvas import PatchCanvas
from mimdet.viz.widgets.panel import ImagePanel, dropdown, toggles

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

    def __init__(self, models: Detector | Mapping[str, Detector], images: Any = None) -> None:
        """models: a detector, or name -> detector; images: as `predict` takes them, default: drawn
        scenes. Raises ValueError when there is no model.
        """
        super().__init__(images, ratio=1.0)
        self.models = {"model": models} if isinstance(models, Detector) else dict(models)
        if not self.models:
            raise ValueError("no model to look into: give a detector, or name -> detector")
        sampled = all(model.samples for model in self.models.values())
        levels = [level for level in features.LEVELS if sampled or level != "tokens"]
        self.level = dropdown("level", levels)
        self.view = toggles("view", ["PCA", "norm", "channel"])
        self.channel = ipywidgets.IntSlider(description="channel", min=0, max=0)
        self.model = dropdown("model", [ALL, *self.models])
        self.scale = ipywidgets.Checkbox(True, description="one scale for all", indent=False)
        self.picture = PatchCanvas()
        self.maps = {name: PatchCanvas() for name in self.models}
        controls = [self.level, self.view, self.channel, self.model, self.scale]
        self.open(
            self.inputs,
            controls if len(self.models) > 1 else controls[:3],
            [self.picture, *self.maps.values()],
        )

    def draw(self) -> str:
        shown = list(self.models) if self.model.value == ALL else [self.model.value]
        level, ratio, seed = self.level.value, self.ratio.value, self.seed.value
        now = [self._pyramid(name, ratio, seed) for name in shown]
        full = [self._pyramid(name, 1.0, 0).maps[level] for name in shown]
        found = [pyramid.maps[level] for pyramid in now]
        self.channel.max = min(map(len, found)) - 1
        self.channel.disabled = self.view.value != "channel"
        for name, canvas in self.maps.items():
            canvas.layout.display = None if name in shown else "none"
        pictures = [self._picture(*pair, full) for pair in zip(found, full, strict=True)]
        for name, values, (note, pixels, _) in zip(shown, found, pictures, strict=True):
            title = f"{level}: {' x '.join(map(str, values.shape))}"
            title = f"{name}, {title}" if len(self.models) > 1 else title
            self.maps[name].show(draw.enlarged(pixels, SIDE, smooth=False), title=title)
            self.maps[name].label = f"{title}, {note}"
        first = now[0]
        image, kept = draw.to_pixels(first.image, SIDE), "this backbone sees every token"
        if first.sample is not None:
            image = features.pale_dropped(image, first.sample, draw.image_size(first.image))
            total = math.prod(token_grid(*first.size))
            kept = f"the encoder sees {len(first.sample.keep[0])} of {total} tokens"
        self.picture.show(image, title="image")
        self.canvases = [self.picture, *(self.maps[name] for name in shown)]
        what = f"{self.view.value} at ratio {self.ratio.label}"
        self.label = f"An image and its map {level} in {', '.join(shown)}: {what}."
        moved = "made before tokens are sampled: the ratio does not matter"
        if level not in BEFORE_SAMPLING:
            shares = [float((m - f).norm() / f.norm()) for m, f in zip(found, full, strict=True)]
            moved = f"moved from ratio 1 by {' | '.join(f'{100 * s:.1f} %' for s in shares)}"
        return " · ".join([level, kept, " | ".join(picture.title for picture in pictures), moved])

    def _pyramid(self, name: str, ratio: float, seed: int) -> features.Pyramid:
        """What a model makes of the image; kept for the last setting and for ratio 1."""
        model = self.models[name]
        if ratio == 1 or not model.samples:
            ratio, seed = 1.0, 0
        return self.once(
            (name, ratio == 1),
            (self.image.value, ratio, seed),
            lambda: features.pyramid_of(model, self.chosen, sample_ratio=ratio, seed=seed),
        )

    def _picture(self, values: Tensor, own: Tensor, among: Sequence[Tensor]) -> Picture:
        """A map as pixels, under what they show; own: the same map at ratio 1; among: those whose
        PCA or scale it shares, where they are on one."""
        if not self.scale.value or len({len(other) for other in among}) > 1:
            among = [own]
        if self.view.value == "PCA":
            basis = features.fit_basis(*among)
            return Picture(features.explained(basis), features.pca_picture(values, basis))
        title = "norm"
        plane: Callable[[Tensor], Tensor] = features.norm_map
        if self.view.value == "channel":
            channel = features.strongest_channels(own, self.channel.value + 1)[-1]
            title, among = f"channel {channel}", [own]
            plane = itemgetter(channel)
        return features.plane_of(title, plane(values), *features.scale_of(map(plane, among)))
