"""How a ShapesCOCO scene is composed and painted: levels of difficulty, classes, occlusion.

A class is an outline with a tendency towards a hue and a texture, as fruits have. Fragments of the
same colours and textures, but of no class, lie behind and in front of the objects, so that colour
alone does not find them. In `shapes-v2-context` most classes look alike: what an object is, only
something far away in the scene tells.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mimdet.data.canvas import Canvas, Patch, Scene
from mimdet.data.textures import CLUTTER, OUTLINES, TEXTURES, Draws

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
    """How hard the scenes are; as it stands here, shapes-v1-medium.

    Lengths are pixels of a 128-pixel scene; they grow with its size.
    """

    classes: tuple[str, ...] = tuple(OUTLINES)
    instances: tuple[int, int] = (3, 10)
    """Fewest and most objects of a scene."""
    small_share: float = 0.44
    """Chance that an object's side is drawn from `small_sides`, else from `sides`."""
    small_sides: tuple[float, float] = (5.6, 6.35)
    sides: tuple[float, float] = (10.0, 42.0)
    """Square root of the area of a whole object; uniform in its logarithm."""
    overlap: float = 0.34
    """Chance that an object is put over the rim of an earlier one."""
    hue_spread: float = 15.0
    """Deviation of an object's hue from that of its class, degrees."""
    typical_texture: float = 0.8
    """Chance of the texture of the class; else any."""
    rims: float = 0.9
    """Chance that an object has a dark or light rim."""
    behind: tuple[int, int] = (2, 5)
    """Fewest and most fragments between background and objects."""
    in_front: tuple[int, int] = (0, 2)
    """Fewest and most fragments that lie over the objects."""
    grain: float = 0.03
    """Range of the noise of a pixel, in 0..1 of full brightness."""
    size: int = 128
    """Side of its scenes in pixels, where nothing else is said."""
    coco_size: int = 640
    """Side of a scene in which COCO's 32 and 96 pixels separate small, medium and large."""
    least_visible: float = 0.4
    """Nothing is put where it would leave an object a smaller share of its pixels: an object that
    could not be recognised would have to be labelled all the same."""
    context: bool = False
    """Classes are told apart by other objects of the scene (`_add_related`), which also says how
    many there are; hues, textures, overlap and small sides then have no effect."""
    revision: int = 1
    """Counts changes of the drawing code that change any pixel; part of every result."""


LAMPS = {"red": 0.0, "green": 120.0, "blue": 240.0}
"""`context`: hue of the one lamp of a scene, in degrees."""
LIT = ("square", "cross", "heart")
"""`context`: outlines whose class is the colour of the lamp, whatever their own."""

LEVELS: dict[str, Level] = {
    "shapes-v1-easy": Level(
        classes=("disc", "star", "leaf", "triangle", "square", "heart"),
        instances=(2, 5),
        small_share=0.0,
        sides=(12.0, 42.0),
        overlap=0.25,
        hue_spread=12.0,
        typical_texture=0.9,
        rims=1.0,
        behind=(0, 3),
        in_front=(0, 0),
        grain=0.02,
    ),
    "shapes-v1-medium": Level(),
    "shapes-v1-hard": Level(
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
    "shapes-v2-medium": Level(
        instances=(2, 8),
        small_share=0.22,
        small_sides=(6.0, 16.0),
        sides=(17.0, 88.0),
        rims=0.8,
        behind=(2, 6),
        in_front=(0, 3),
        size=256,
        coco_size=256,
    ),
    "shapes-v2-context": Level(
        classes=(
            *(f"{outline}, {lamp} lamp" for outline in LIT for lamp in LAMPS),
            *("star, pointed at", "star, not pointed at", "disc, odd one out", "disc, as others"),
            *("lamp", "arrow", "leaf"),
        ),
        instances=(2, 16),
        sides=(12.0, 36.0),
        rims=0.8,
        in_front=(0, 0),
        size=256,
        coco_size=256,
        least_visible=0.75,
        context=True,
        revision=2,  # 1: everything as colourful as the lamp, and the odd disc of another hue
    ),
}

DIM, LAMP_LIGHT = 0.15, 1.5
"""`context`: shares of the usual saturation, of everything but the lamp and of the lamp. The lamp
is easily told from other things; what is asked for is the way from it to the objects."""
FAR = 0.3
"""`context`: an object is at least so many scene sides away from what tells its class."""
FRAGMENT_RIMS = 0.2
"""Chance that a fragment has a rim."""
TRIES = 30
"""Draws of one object before the scene is drawn without it."""


def draw_scene(level: Level, size: int, draws: Draws) -> Scene:
    """Background, fragments behind, objects (from large to small, or those that belong together),
    fragments in front, grain."""
    canvas = Canvas(size, draws, level.least_visible)
    for _ in range(draws.integer(*level.behind)):
        _add_fragment_behind(canvas)
    if level.context:
        _add_related(canvas, level)
    else:
        for side in _sides(level, draws.integer(*level.instances), draws):
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


def _add_object(canvas: Canvas, level: Level, side: float) -> None:
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


Place = tuple[float, float]
"""x and y in pixels."""


def _add_related(canvas: Canvas, level: Level) -> None:
    """A lamp in a corner, the one thing with a colour; objects that it lights, an arrow and two
    stars, discs of which one is striped or one is not, leaves that mean nothing."""
    draws = canvas.draws
    lamp = draws.pick(tuple(LAMPS))
    corner = [canvas.size * draws.pick((0.12, 0.88)) for _ in range(2)]
    light = (corner[0], corner[1])
    canvas.fade(DIM)
    canvas.colour = LAMP_LIGHT
    _put(canvas, level, "lamp", "hexagon", lambda: light, hue=LAMPS[lamp], side=24.0)
    canvas.colour = DIM
    if draws.chance(0.6):
        _add_arrow(canvas, level)
    if draws.chance(0.5):
        _add_discs(canvas, level)
    for _ in range(draws.integer(2, 4)):
        outline = draws.pick(LIT)
        _put(canvas, level, f"{outline}, {lamp} lamp", outline, lambda: _away(canvas, [light]))
    for _ in range(draws.integer(0, 2)):
        _put(canvas, level, "leaf", "leaf", lambda: _away(canvas, []))


def _add_arrow(canvas: Canvas, level: Level) -> None:
    """An arrow, the star that it points at, and one that it does not."""
    draws, side = canvas.draws, canvas.size
    cosine, sine = draws.turn()
    at = _put(canvas, level, "arrow", "arrow", lambda: _away(canvas, []), turn=(cosine, sine))
    if at is None:
        return

    def on_the_ray() -> Place:
        reach = side * draws.between(FAR, 0.8)
        return at[0] + reach * cosine, at[1] + reach * sine

    def off_the_ray() -> Place:
        for _ in range(TRIES):
            x, y = _away(canvas, [at])
            ahead = (x - at[0]) * cosine + (y - at[1]) * sine
            if ahead < 0.7 * math.hypot(x - at[0], y - at[1]):  # by more than 45 degrees
                return x, y
        return -1.0, -1.0

    if _put(canvas, level, "star, pointed at", "star", on_the_ray):
        _put(canvas, level, "star, not pointed at", "star", off_the_ray)


def _add_discs(canvas: Canvas, level: Level) -> None:
    """Three or four discs far from each other: the last is striped and the others plain, or the
    other way round."""
    draws = canvas.draws
    hue, side = draws.between(0.0, 360.0), 0.7 * draws.between_log(*level.sides)
    usual, odd = draws.pick((("plain", "stripes"), ("stripes", "plain")))
    places: list[Place] = []
    somewhere = partial(_away, canvas, places)
    for _ in range(draws.integer(2, 3)):
        at = _put(canvas, level, "disc, as others", "disc", somewhere, hue, side, kind=usual)
        places += [at] if at else []
    if len(places) >= 2:
        _put(canvas, level, "disc, odd one out", "disc", somewhere, hue, side, kind=odd)


def _put(
    canvas: Canvas,
    level: Level,
    name: str,
    outline: str,
    somewhere: Callable[[], Place],
    hue: float | None = None,
    side: float | None = None,
    turn: tuple[float, float] | None = None,
    kind: str = "plain",
) -> Place | None:
    """Paint one object of the class `name`, plain, whole inside the image and hiding little.

    -> where, or None after TRIES draws. side: in pixels of a 128-pixel scene.
    """
    draws = canvas.draws
    hue = draws.between(0.0, 360.0) if hue is None else hue
    side = canvas.scale * (draws.between_log(*level.sides) if side is None else side)
    for _ in range(TRIES):
        x, y = somewhere()
        if not 0.6 * side <= min(x, y) <= max(x, y) <= canvas.size - 0.6 * side:
            continue
        patch = canvas.patch(OUTLINES[outline], side, x, y, turn)
        if canvas.cover(patch, level.classes.index(name), x, y):
            canvas.paint(patch, hue, level.rims, 1.0, kind)
            return x, y
    return None


def _away(canvas: Canvas, places: Sequence[Place]) -> Place:
    """Anywhere at least FAR from all of `places`; after TRIES draws outside the image."""
    for _ in range(TRIES):
        x, y = canvas.draws.between(0.0, canvas.size), canvas.draws.between(0.0, canvas.size)
        if all(math.hypot(x - a, y - b) >= FAR * canvas.size for a, b in places):
            return x, y
    return -1.0, -1.0


def _add_fragment_behind(canvas: Canvas) -> None:
    """Paint a more or less opaque piece of no class anywhere."""
    draws = canvas.draws
    side = canvas.scale * draws.between_log(4.0, 16.0)
    x, y = draws.between(0.0, canvas.size), draws.between(0.0, canvas.size)
    patch = canvas.patch(draws.pick(CLUTTER), side, x, y)
    _paint_fragment(canvas, patch, draws.between(0.3, 0.9))


def _add_fragment_in_front(canvas: Canvas) -> None:
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


def _paint_fragment(canvas: Canvas, patch: Patch, opacity: float) -> None:
    draws = canvas.draws
    hue, kind = draws.between(0.0, 360.0), draws.pick(TEXTURES)
    canvas.paint(patch, hue, FRAGMENT_RIMS, opacity, kind)


def _somewhere(canvas: Canvas, side: float, overlap: float) -> tuple[float, float]:
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
