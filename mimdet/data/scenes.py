"""How a ShapesCOCO scene is composed and painted: levels of difficulty, classes, occlusion.

A class is an outline with a tendency towards a hue and a texture, as fruits have. Fragments of the
same colours and textures, but of no class, lie behind and in front of the objects, so that colour
alone does not find them.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimdet.data import textures
from mimdet.data.textures import CLUTTER, OUTLINES, TEXTURES, Colour, Draws, Outline, Plane

REVISION = 1
"""Counts changes of the drawing code that change any pixel; part of every result."""

HUES = {name: 30.0 * i for i, name in enumerate(OUTLINES)}
"""Typical hue of a class in degrees; classes of similar outline lie far apart."""

TYPICAL_TEXTURES = {
    "cross": "plain",
    "disc": "stripes",
    "star": "gradient",
    "hexagon": "dots",
    "leaf": "stripes",
    "triangle": "checker",
    "crescent": "gradient",
    "arrow": "plain",
    "square": "checker",
    "ring": "plain",
    "bar": "stripes",
    "heart": "dots",
}


@dataclass(frozen=True, slots=True)
class Level:
    """How hard the scenes are. Lengths are pixels of a 128-pixel scene; they grow with its size."""

    classes: tuple[str, ...]
    instances: tuple[int, int]
    """Fewest and most objects of a scene."""
    small_share: float
    """Chance that an object's side is drawn from `small_sides`, else from `sides`."""
    small_sides: tuple[float, float]
    sides: tuple[float, float]
    """Square root of the area of a whole object; uniform in its logarithm."""
    overlap: float
    """Chance that an object is put over the rim of an earlier one."""
    hue_spread: float
    """Deviation of an object's hue from that of its class, degrees."""
    typical_texture: float
    """Chance of the texture of the class; else any."""
    rims: float
    """Chance that an object has a dark or light rim."""
    behind: tuple[int, int]
    """Fewest and most fragments between background and objects."""
    in_front: tuple[int, int]
    """Fewest and most fragments that lie over the objects."""
    grain: float
    """Range of the noise of a pixel, in 0..1 of full brightness."""


LEVELS: dict[str, Level] = {
    "shapes-v1-easy": Level(
        classes=("disc", "star", "leaf", "triangle", "square", "heart"),
        instances=(2, 5),
        small_share=0.0,
        small_sides=(5.0, 6.3),
        sides=(12.0, 42.0),
        overlap=0.25,
        hue_spread=12.0,
        typical_texture=0.9,
        rims=1.0,
        behind=(0, 3),
        in_front=(0, 0),
        grain=0.02,
    ),
    "shapes-v1-medium": Level(
        classes=tuple(OUTLINES),
        instances=(3, 10),
        small_share=0.44,
        small_sides=(5.6, 6.35),
        sides=(10.0, 42.0),
        overlap=0.34,
        hue_spread=15.0,
        typical_texture=0.8,
        rims=0.9,
        behind=(2, 5),
        in_front=(0, 2),
        grain=0.03,
    ),
    "shapes-v1-hard": Level(
        classes=tuple(OUTLINES),
        instances=(5, 16),
        small_share=0.5,
        small_sides=(4.5, 6.3),
        sides=(7.0, 42.0),
        overlap=0.5,
        hue_spread=60.0,
        typical_texture=0.4,
        rims=0.5,
        behind=(10, 20),
        in_front=(3, 6),
        grain=0.06,
    ),
}

MIN_VISIBLE = 0.4
"""Nothing is put where it would leave an object a smaller share of its pixels: an object that
could not be recognised would have to be labelled all the same."""
MIN_PIXELS = 12
"""The same as a count of pixels of a 128-pixel scene."""
FRAGMENT_RIMS = 0.2
"""Chance that a fragment has a rim."""
TRIES = 30
"""Draws of one object before the scene is drawn without it."""

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
class _Patch:
    """The part of the image an outline touches, with the outline's own coordinates there."""

    window: tuple[slice, slice]
    u: Plane
    v: Plane
    distance: Plane
    """Pixels to the outline, negative inside."""
    radius: float
    """Pixels of one unit of u or v."""


class _Canvas:
    """A scene while it is painted: colours, and the object that each pixel belongs to."""

    def __init__(self, size: int, draws: Draws) -> None:
        self.draws = draws
        self.image = textures.background(size, draws)  # (3, H, W), 0..1
        self.size = size
        self.scale = self.size / 128
        self.owner = np.zeros((self.size, self.size), dtype=np.intp)  # 0: none; k: object k
        self.labels = [-1]
        self.whole = np.zeros(1, dtype=np.int64)  # pixels of object k inside the image
        self.seen = np.zeros(1, dtype=np.int64)  # those of them that are visible so far
        self.centres = [(0.0, 0.0, 0.0)]  # x, y and radius of object k, in pixels

    def patch(self, outline: Outline, side: float, x: float, y: float) -> _Patch:
        """Turn and stretch an outline at random; its area becomes side^2 pixels around (x, y)."""
        radius = side / math.sqrt(_AREAS[outline])
        stretch = self.draws.between(0.9, 1.11)
        cosine, sine = self.draws.turn()
        reach = 1.2 * radius + 1.0
        left, right = max(int(x - reach), 0), min(int(x + reach) + 1, self.size)
        top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, self.size)
        across = ((np.arange(left, right) + (0.5 - x)) / radius).astype(np.float32)[None, :]
        down = ((np.arange(top, bottom) + (0.5 - y)) / radius).astype(np.float32)[:, None]
        u = across * (cosine / stretch) + down * (sine / stretch)
        v = across * (-sine * stretch) + down * (cosine * stretch)
        window = (slice(top, bottom), slice(left, right))
        return _Patch(window, u, v, outline(u, v) * radius, radius)

    def cover(self, patch: _Patch, label: int | None, x: float, y: float) -> bool:
        """Claim the patch's pixels for a new object (`label`) or a fragment (None).

        Returns False, and changes nothing, where too little of this or an earlier object would
        stay visible.
        """
        inside = patch.distance < 0
        owner = self.owner[patch.window]
        pixels = int(np.count_nonzero(inside))
        seen = self.seen - np.bincount(owner[inside], minlength=len(self.seen))
        least = np.maximum(MIN_VISIBLE * self.whole, MIN_PIXELS * self.scale**2)
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

    def paint(self, patch: _Patch, hue: float, rims: float, opacity: float, kind: str) -> None:
        """Fill a patch with two tones of a hue in a texture; some get a rim; light from above."""
        target = self.image[(slice(None), *patch.window)]
        under = target[:, target.shape[1] // 2, target.shape[2] // 2].tolist()
        main, second, rim = _tones(hue, under, self.draws)
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


def draw_scene(level: Level, size: int, draws: Draws) -> Scene:
    """Background, fragments behind, objects from large to small, fragments in front, grain."""
    canvas = _Canvas(size, draws)
    for _ in range(draws.integer(*level.behind)):
        _add_fragment_behind(canvas)
    count = draws.integer(*level.instances)
    for side in _sides(level, count, draws):
        _add_object(canvas, level, side)
    for _ in range(draws.integer(*level.in_front)):
        _add_fragment_in_front(canvas)
    canvas.image += (draws.plane(size, size) - 0.5) * (2.0 * level.grain)
    return canvas.finish()


def _sides(level: Level, count: int, draws: Draws) -> list[float]:
    """Sides of the objects in pixels of a 128-pixel scene, roughly from large to small."""
    sides = []
    for _ in range(count):
        low, high = level.small_sides if draws.chance(level.small_share) else level.sides
        sides.append(draws.between_log(low, high))
    order = [side * draws.between(0.5, 1.5) for side in sides]
    return [side for _, side in sorted(zip(order, sides, strict=True), reverse=True)]


def _add_object(canvas: _Canvas, level: Level, side: float) -> None:
    """Paint one object where it and all earlier ones stay recognisable; none after TRIES draws."""
    draws, side = canvas.draws, side * canvas.scale
    label = draws.integer(0, len(level.classes) - 1)
    name = level.classes[label]
    for _ in range(TRIES):
        x, y = _somewhere(canvas, side, level.overlap)
        patch = canvas.patch(OUTLINES[name], side, x, y)
        if canvas.cover(patch, label, x, y):
            kind = TYPICAL_TEXTURES[name]
            if not draws.chance(level.typical_texture):
                kind = draws.pick(TEXTURES)
            hue = HUES[name] + level.hue_spread * draws.normal()
            canvas.paint(patch, hue, level.rims, 1.0, kind)
            return


def _add_fragment_behind(canvas: _Canvas) -> None:
    """Paint a more or less opaque piece of no class anywhere."""
    draws = canvas.draws
    side = canvas.scale * draws.between_log(4.0, 16.0)
    x, y = draws.between(0.0, canvas.size), draws.between(0.0, canvas.size)
    patch = canvas.patch(draws.pick(CLUTTER), side, x, y)
    _paint_fragment(canvas, patch, draws.between(0.3, 0.9))


def _add_fragment_in_front(canvas: _Canvas) -> None:
    """Paint a thin piece of no class across an object, where it hides none too far."""
    draws = canvas.draws
    for _ in range(TRIES):
        x, y, radius = canvas.centres[draws.integer(1, len(canvas.centres) - 1)]
        away = radius * draws.between(0.0, 0.7)
        cosine, sine = draws.turn()
        x = _clamp(x + away * cosine, 0.0, canvas.size)
        y = _clamp(y + away * sine, 0.0, canvas.size)
        side = canvas.scale * draws.between_log(3.5, 9.0)
        patch = canvas.patch(draws.pick(CLUTTER), side, x, y)
        if canvas.cover(patch, None, x, y):
            _paint_fragment(canvas, patch, 1.0)
            return


def _paint_fragment(canvas: _Canvas, patch: _Patch, opacity: float) -> None:
    draws = canvas.draws
    hue, kind = draws.between(0.0, 360.0), draws.pick(TEXTURES)
    canvas.paint(patch, hue, FRAGMENT_RIMS, opacity, kind)


def _somewhere(canvas: _Canvas, side: float, overlap: float) -> tuple[float, float]:
    """A centre inside the image: over the rim of an earlier object with a chance of `overlap`."""
    draws = canvas.draws
    low, high = 0.45 * side, canvas.size - 0.45 * side
    if len(canvas.centres) == 1 or not draws.chance(overlap):
        return draws.between(low, high), draws.between(low, high)
    x, y, radius = canvas.centres[draws.integer(1, len(canvas.centres) - 1)]
    away = draws.between(0.55, 0.95) * (radius + 0.6 * side)
    cosine, sine = draws.turn()
    return _clamp(x + away * cosine, low, high), _clamp(y + away * sine, low, high)


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _tones(hue: float, under: list[float], draws: Draws) -> tuple[Colour, Colour, Colour]:
    """Main colour, second colour and rim colour of an object of about this hue.

    under: RGB of the place it will cover; where the main colour would hardly differ, it becomes
    much lighter or darker.
    """
    saturation, value, change, shift, rim = draws.unit(5)
    saturation, value = 0.55 + 0.4 * saturation, 0.55 + 0.45 * value
    darker = 0.3 + 0.25 * change
    main = textures.rgb(hue, saturation, value)
    if max(abs(a - b) for a, b in zip(main, under, strict=True)) < 0.25:
        value = 1.0 if sum(under) < 1.5 else 0.45
        main = textures.rgb(hue, saturation, value)
    second = textures.rgb(hue + 90.0 * (shift - 0.5), saturation * (0.4 + shift), value - darker)
    edge = textures.rgb(hue, 0.6 * saturation, 0.15 if rim < 0.6 else 0.97)
    return main, second, edge
