"""What ShapesCOCO draws with: random numbers, colours, outlines, textures, backgrounds.

Everything is a pure function of its arguments and the same on every machine: random numbers are
raw PCG64 output (whose stream numpy guarantees), pixels pass only through operations that IEEE 754
rounds exactly (+ - * / sqrt abs floor min max; no sin, exp or matrix product), and the few sines
and powers of single numbers are rounded far above the last bit.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[Any]
"""(h, w) float32."""
Colour = tuple[float, float, float]
"""RGB in 0..1."""
T = TypeVar("T")


class Draws:
    """Random numbers of one scene; `keys` (non-negative integers) decide all of them."""

    def __init__(self, *keys: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(keys))

    def plane(self, height: int, width: int) -> Plane:
        """(height, width) float32, uniform in [0, 1)."""
        raw = self._bits.random_raw((height, width))
        return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)

    def unit(self, count: int) -> list[float]:
        """`count` uniform numbers in [0, 1)."""
        return [(raw >> 11) * 2.0**-53 for raw in self._bits.random_raw(count).tolist()]

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self.unit(1)[0]

    def between_log(self, low: float, high: float) -> float:
        """Between low and high, its logarithm uniform; rounded to be equal on every platform."""
        return round(low * (high / low) ** self.unit(1)[0], 9)

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        return low + int(self.unit(1)[0] * (high - low + 1))

    def normal(self) -> float:
        """Nearly normal: mean 0, deviation 1, never beyond 3 (a sum of three uniform numbers)."""
        return 2.0 * sum(self.unit(3)) - 3.0

    def chance(self, probability: float) -> bool:
        return self.unit(1)[0] < probability

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.integer(0, len(choices) - 1)]

    def turn(self) -> tuple[float, float]:
        """(cosine, sine) of a uniform angle, rounded to 9 digits to be equal on every platform."""
        angle = self.between(0.0, 2.0 * math.pi)
        return round(math.cos(angle), 9), round(math.sin(angle), 9)


# Outlines: (u, v) coordinates -> distance to the outline, negative inside. Every outline fits a
# circle of about radius 1; u points right and v down before the object is turned.


def _disc(u: Plane, v: Plane) -> Plane:
    return np.sqrt(u * u + v * v) - 1.0


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(np.sqrt(u * u + v * v) - 0.74) - 0.26


def _square(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(v - 0.5, 0.8660254 * np.abs(u) - 0.5 * v - 0.5)


def _star(u: Plane, v: Plane) -> Plane:
    """Five lines; a point of the pentagram lies beyond at most one of them."""
    u = np.abs(u)
    largest = v - 0.31
    second = np.full_like(largest, -9.0)
    for x, y in ((0.9510565, 0.309017), (0.5877853, -0.809017), (-0.9510565, 0.309017)):
        side = x * u + y * v - 0.31
        second = np.maximum(second, np.minimum(largest, side))
        largest = np.maximum(largest, side)
    side = -0.5877853 * u - 0.809017 * v - 0.31
    return np.maximum(second, np.minimum(largest, side))


def _cross(u: Plane, v: Plane) -> Plane:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.95, v - 0.34), np.maximum(v - 0.95, u - 0.34))


def _heart(u: Plane, v: Plane) -> Plane:
    """A square on its corner and a disc on each of its two upper sides."""
    u, v = np.abs(u), v - 0.07
    square = 0.7071068 * (u + np.abs(v)) - 0.5
    across, along = u - 0.3535534, v + 0.3535534
    return np.minimum(square, np.sqrt(across * across + along * along) - 0.5)


def _crescent(u: Plane, v: Plane) -> Plane:
    u = u - 0.2
    cut = u - 0.55
    return np.maximum(np.sqrt(u * u + v * v) - 1.0, 0.8 - np.sqrt(cut * cut + v * v))


def _leaf(u: Plane, v: Plane) -> Plane:
    v = np.abs(v) + 0.85
    return np.sqrt(u * u + v * v) - 1.35


def _hexagon(u: Plane, v: Plane) -> Plane:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(u, 0.5 * u + 0.8660254 * v) - 0.86


def _arrow(u: Plane, v: Plane) -> Plane:
    v = np.abs(v)
    head = np.maximum(-u, 0.7071068 * (u + v) - 0.66)
    shaft = np.maximum(np.abs(u + 0.45) - 0.55, v - 0.32)
    return np.minimum(head, shaft)


def _bar(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.36)


Outline = Callable[[Plane, Plane], Plane]
_CLASSES: tuple[Outline, ...] = (
    *(_cross, _disc, _star, _hexagon, _leaf, _triangle),
    *(_crescent, _arrow, _square, _ring, _bar, _heart),
)
OUTLINES = {outline.__name__.strip("_"): outline for outline in _CLASSES}
"""Every class by its name."""


def _wedge(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.11 * (u + 1.0))


def _strand(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.05)


def _squiggle(u: Plane, v: Plane) -> Plane:
    """Two thin half rings that open to opposite sides."""
    across = np.abs(u) - 0.5
    arc = np.abs(np.sqrt(across * across + v * v) - 0.44) - 0.08
    return np.maximum(arc, np.where(u > 0, v, -v))


def _vee(u: Plane, v: Plane) -> Plane:
    """Two thin arms that meet in an edge."""
    u = np.abs(u)
    return np.maximum(np.abs(v + 0.45 - 0.9 * u) - 0.15, u - 0.95)


CLUTTER: tuple[Outline, ...] = (_wedge, _strand, _squiggle, _vee)
"""Fragments that are no class: thin, bent or uneven."""


def area(outline: Outline) -> float:
    """Area inside an outline, in its own units (a unit disc has 3.14), on a 256 x 256 grid."""
    ticks = (np.arange(256, dtype=np.float32) - 127.5) * np.float32(1.5 / 128)
    inside = outline(ticks[None, :] + 0 * ticks[:, None], ticks[:, None] + 0 * ticks[None, :]) < 0
    return float(np.count_nonzero(inside)) * (1.5 / 128) ** 2


# Textures: (u, v, cycles) -> 0..1, the share of the second colour. `cycles` is the number of
# repeats per unit of u or v; `sharp` ramps from one colour to the other within about a pixel.


def _wave(x: Plane, cycles: float) -> Plane:
    """Triangle wave of x: 0 to 0.5 and back, once a cycle."""
    x = x * cycles
    return np.abs(x - np.floor(x) - 0.5)


def _ramp(x: Plane, sharp: float) -> Plane:
    return np.clip(x * sharp + 0.5, 0.0, 1.0)


def texture(kind: str, u: Plane, v: Plane, cycles: float, sharp: float) -> Plane:
    """A pattern over (u, v), values 0..1; `sharp` is its contrast at edges in cycles^-1."""
    if kind == "stripes":
        return _ramp(_wave(v, cycles) - 0.25, sharp)
    if kind == "checker":
        return np.abs(
            _ramp(_wave(u, 0.5 * cycles) - 0.25, 2.0 * sharp)
            - _ramp(_wave(v, 0.5 * cycles) - 0.25, 2.0 * sharp)
        )
    if kind == "dots":
        x, y = 0.5 - _wave(u, cycles), 0.5 - _wave(v, cycles)
        return _ramp(0.3 - np.sqrt(x * x + y * y), sharp)
    if kind == "rings":
        return _ramp(_wave(np.sqrt(u * u + v * v), cycles) - 0.25, sharp)
    if kind == "gradient":
        return _ramp(u + 0 * v, 0.6)
    return np.zeros_like(u + v)  # plain


TEXTURES = ("plain", "gradient", "stripes", "checker", "dots", "rings")


def rgb(hue: float, saturation: float, value: float) -> Colour:
    """hue in degrees (any number), the others 0..1 (clipped)."""
    hue = (hue / 360.0) % 1.0
    return colorsys.hsv_to_rgb(hue, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))


def column(colour: Sequence[float]) -> NDArray[np.float32]:
    """A colour as (3, 1, 1) float32, ready to broadcast over an image."""
    return np.array(colour, dtype=np.float32).reshape(3, 1, 1)


def enlarge(grid: Plane, height: int, width: int) -> Plane:
    """Bilinear enlargement of (..., gh, gw) to (..., height, width), corners on corners."""
    for axis, length in ((-2, height), (-1, width)):
        place = np.linspace(0.0, grid.shape[axis] - 1.0, length)
        low = np.minimum(place.astype(np.intp), grid.shape[axis] - 2)
        share = (place - low).astype(np.float32)
        if axis == -2:
            share = share[:, None]
        first = np.take(grid, low, axis=axis)
        grid = first + share * (np.take(grid, low + 1, axis=axis) - first)
    return grid


def background(size: int, draws: Draws) -> Plane:
    """(3, size, size): one or two surfaces with a gradient, a faint pattern and smooth blotches."""
    ticks = middles(size)
    image = _surface(ticks, draws)
    if draws.chance(0.75):
        cosine, sine = draws.turn()
        distance = ticks[None, :] * cosine + ticks[:, None] * sine + draws.between(-0.3, 0.3)
        image += np.clip(distance * (size / 2.0), 0.0, 1.0) * (_surface(ticks, draws) - image)
    return image


def middles(count: int) -> Plane:
    """(count,) middles of as many pixels that span -0.5 to 0.5."""
    return (np.arange(count, dtype=np.float32) + 0.5) / np.float32(count) - 0.5


def _surface(ticks: Plane, draws: Draws) -> Plane:
    """(3, size, size) of one material."""
    size = len(ticks)
    hue, saturation, value = draws.between(0.0, 360.0), *draws.unit(2)
    saturation, value = 0.1 + 0.6 * saturation, 0.25 + 0.6 * value
    colour = column(rgb(hue, saturation, value))
    blotches = draws.plane(9, 3).reshape(3, 3, 3) * 0.22 + draws.plane(3, 3) * 0.3
    image = colour + enlarge(blotches - np.float32(0.26), size, size)
    rough = enlarge(draws.plane(25, 25), size, size) - 0.5
    cosine, sine = draws.turn()
    u = ticks[None, :] * cosine + ticks[:, None] * sine
    v = ticks[:, None] * cosine - ticks[None, :] * sine
    cycles = draws.between(5.0, 20.0)
    pattern = texture(draws.pick(TEXTURES), u, v, cycles, 128.0 / cycles / 3.0) - 0.5
    tints = [column([reach * (2.0 * x - 1.0) for x in draws.unit(3)]) for reach in (0.2, 0.25)]
    return image + rough * (0.1 + tints[0]) + pattern * (0.06 + tints[1])
