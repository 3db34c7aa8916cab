"""What a ShapesCOCO scene is painted on: colours, and the object that each pixel belongs to."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimdet.data import textures
from mimdet.data.textures import CLUTTER, OUTLINES, Colour, Draws, Outline, Plane

MIN_PIXELS = 12
"""Pixels of a 128-pixel scene that an object keeps, whatever its size."""

_AREAS = {outline: textures.area(outline) for outline in (*OUTLINES.values(), *CLUTTER)}


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn image and everything that is true of it; N objects, later ones nearer."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    masks: NDArray[np.bool_]
    """(N, H, W): the visible pixels of each object; no pixel belongs to two."""
    labels: NDArray[np.int64]
    """(N,) index into the level's classes."""
    visible: NDArray[np.float64]
    """(N,) share of an object's pixels inside the image that nothing in front hides."""


@dataclass(slots=True)
class Patch:
    """The part of the image an outline touches, with the outline's own coordinates there."""

    window: tuple[slice, slice]
    u: Plane
    v: Plane
    distance: Plane
    """Pixels to the outline, negative inside."""
    radius: float
    """Pixels of one unit of u or v."""


class Canvas:
    """A scene while it is painted: colours, and the object that each pixel belongs to."""

    def __init__(self, size: int, draws: Draws, least_visible: float) -> None:
        self.draws, self.least_visible = draws, least_visible
        self.image = textures.background(size, draws)  # (3, H, W), 0..1
        self.size = size
        self.scale = self.size / 128
        self.colour = 1.0  # share of its saturation with which everything is painted
        self.owner = np.zeros((self.size, self.size), dtype=np.intp)  # 0: none; k: object k
        self.labels = [-1]
        self.whole = np.zeros(1, dtype=np.int64)  # pixels of object k inside the image
        self.seen = np.zeros(1, dtype=np.int64)  # those of them that are visible so far
        self.centres = [(0.0, 0.0, 0.0)]  # x, y and radius of object k, in pixels

    def patch(
        self,
        outline: Outline,
        side: float,
        x: float,
        y: float,
        turn: tuple[float, float] | None = None,
    ) -> Patch:
        """Stretch an outline at random; its area becomes side^2 pixels around (x, y).

        turn: cosine and sine of the angle that it is turned by; None = any.
        """
        radius = side / math.sqrt(_AREAS[outline])
        stretch = self.draws.between(0.9, 1.11)
        cosine, sine = turn or self.draws.turn()
        reach = 1.2 * radius + 1.0
        left, right = max(int(x - reach), 0), min(int(x + reach) + 1, self.size)
        top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, self.size)
        across = ((np.arange(left, right) + (0.5 - x)) / radius).astype(np.float32)[None, :]
        down = ((np.arange(top, bottom) + (0.5 - y)) / radius).astype(np.float32)[:, None]
        u = across * (cosine / stretch) + down * (sine / stretch)
        v = across * (-sine * stretch) + down * (cosine * stretch)
        window = (slice(top, bottom), slice(left, right))
        return Patch(window, u, v, outline(u, v) * radius, radius)

    def cover(self, patch: Patch, label: int | None, x: float, y: float) -> bool:
        """Claim the patch's pixels for a new object (`label`) or a fragment (None).

        Returns False, and changes nothing, where too little of this or an earlier object would
        stay visible.
        """
        inside = patch.distance < 0
        owner = self.owner[patch.window]
        pixels = int(np.count_nonzero(inside))
        seen = self.seen - np.bincount(owner[inside], minlength=len(self.seen))
        least = np.maximum(self.least_visible * self.whole, MIN_PIXELS * self.scale**2)
        if (seen < least)[1:].any() or (label is not None and pixels < MIN_PIXELS * self.scale**2):
            return False
        owner[inside] = 0 if label is None else len(self.labels)
        self.seen = seen
        if label is not None:
            self.labels.append(label)
            self.whole = np.append(self.whole, pixels)
            self.seen = np.append(seen, pixels)
            self.centres.append((x, y, patch.radius))
        return True

    def fade(self, colour: float) -> None:
        """Leave what is painted, and what will be, only this share of its saturation."""
        self.colour = colour
        grey = self.image.mean(0, keepdims=True)
        self.image = grey + np.float32(colour) * (self.image - grey)

    def paint(self, patch: Patch, hue: float, rims: float, opacity: float, kind: str) -> None:
        """Fill a patch with two tones of a hue in a texture; some get a rim; light from above."""
        target = self.image[(slice(None), *patch.window)]
        under = target[:, target.shape[1] // 2, target.shape[2] // 2].tolist()
        main, second, rim = _tones(hue, under, self.draws, self.colour)
        dense, angle, rimmed = self.draws.unit(3)
        period = max(2.0 * patch.radius / (2.0 + 2.0 * dense), 3.2)  # pixels; finer ones alias
        cycles = patch.radius / period
        share = textures.texture(kind, patch.u + (angle - 0.5), patch.v, cycles, period)
        share = share * min(1.0, 0.25 + patch.radius / (10.0 * self.scale))
        colours = textures.column(main)
        colours = colours + share * (textures.column(second) - colours)
        colours *= 1.0 - 0.25 * textures.middles(patch.distance.shape[0])[:, None]
        if rimmed < rims:
            width = min(1.2 * self.scale, 0.22 * patch.radius)
            edge = np.clip(patch.distance + (width + 0.5), 0.0, 1.0)
            colours += edge * (textures.column(rim) - colours)
        alpha = np.clip(0.5 - patch.distance, 0.0, 1.0) * np.float32(opacity)
        target += alpha * (colours - target)

    def finish(self) -> Scene:
        labels = np.array(self.labels[1:], dtype=np.int64)
        numbers = np.arange(1, len(self.labels)).reshape(-1, 1, 1)
        image = np.floor(np.clip(self.image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        return Scene(
            np.ascontiguousarray(image.transpose(1, 2, 0)),
            self.owner[None] == numbers,
            labels,
            self.seen[1:] / self.whole[1:],
        )


def _tones(
    hue: float, under: list[float], draws: Draws, colour: float
) -> tuple[Colour, Colour, Colour]:
    """Main colour, second colour and rim colour of an object of about this hue.

    under: RGB of the place it will cover; where the main colour would hardly differ, it becomes
    much lighter or darker. colour: share of its saturation.
    """
    saturation, value, change, shift, rim = draws.unit(5)
    saturation, value = colour * (0.55 + 0.4 * saturation), 0.55 + 0.45 * value
    darker = 0.3 + 0.25 * change
    main = textures.rgb(hue, saturation, value)
    if max(abs(a - b) for a, b in zip(main, under, strict=True)) < 0.25:
        value = 1.0 if sum(under) < 1.5 else 0.45
        main = textures.rgb(hue, saturation, value)
    second = textures.rgb(hue + 90.0 * (shift - 0.5), saturation * (0.4 + shift), value - darker)
    edge = textures.rgb(hue, 0.6 * saturation, 0.15 if rim < 0.6 else 0.97)
    return main, second, edge
