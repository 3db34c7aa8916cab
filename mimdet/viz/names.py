"""Where the names of objects go, so that none covers another."""

from collections.abc import Sequence

Box = tuple[float, float, float, float]  # x0, y0, x1, y1; y grows downwards


def place_names(
    boxes: Sequence[Sequence[float]],
    sizes: Sequence[tuple[float, float]],
    width: float,
    height: float,
) -> list[Box | None]:
    """A free rectangle beside each box for a name of size (width, height), first come first served.

    Tried in turn: above and below the box, flush left and flush right; to its right and left;
    inside, at its top and bottom. Rectangles are moved sideways into the image of width x height,
    never overlap each other, and are None where all eight places are taken.
    """
    placed: list[Box | None] = []
    for (x0, y0, x1, y1), (w, h) in zip(boxes, sizes, strict=True):
        corners = [(x0, y0 - h), (x1 - w, y0 - h), (x0, y1), (x1 - w, y1)]
        corners += [(x1, y0), (x0 - w, y0), (x0, y0), (x0, y1 - h)]
        places = [_at(min(max(x, 0), width - w), y, w, h) for x, y in corners]
        inside = [p for p in places if p[0] >= 0 and p[1] >= 0 and p[3] <= height]
        free = [p for p in inside if not any(other and _overlap(p, other) for other in placed)]
        placed.append(free[0] if free else None)
    return placed


def _at(x: float, y: float, w: float, h: float) -> Box:
    return x, y, x + w, y + h


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
