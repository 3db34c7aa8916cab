"""Rules for boxes and masks: each says which kinds of faults it finds.

The values come from a file that nobody has checked, so nothing here trusts a type, allocates
memory by a number from the file, or recurses. A rule yields `(kind, what was found)` pairs; the
kinds are those of `check_report.KINDS`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mimdet.data.check_report import brief

LARGEST = 1e9
"""Numbers beyond this are no pixel coordinates (also keeps sums and products finite)."""
TOLERANCE = 1.0
"""Pixels a box may reach out of its image: rounding and 1-based tools."""

Finding = tuple[str, str]
Box = tuple[float, float, float, float]


class Shape(NamedTuple):
    """What a segmentation covers: its extent xyxy and its area, in pixels."""

    extent: Box
    area: float


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number of a size that pixels can have; True, "3", NaN and 1e300 are none."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def is_id(value: Any) -> TypeGuard[int | str]:
    """Text, or a whole number of at most 64 bits (as tables store it)."""
    return type(value) is str or (type(value) is int and -(2**63) <= value < 2**63)


def is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < LARGEST


def box_findings(box: Any, size: tuple[int, int] | None) -> Iterator[Finding]:
    """box: x, y, width, height as the file gives it; size: (width, height) of its image."""
    if not is_box(box):
        yield "bad-box", f"bbox is {brief(box)}"
        return
    x, y, w, h = box
    if w <= 0 or h <= 0:
        yield "empty-box", f"width {w:g}, height {h:g}"
        return
    if size is None:
        return
    width, height = size
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        yield "box-outside", f"bbox {brief(box)} in an image of {width} x {height}"
        return
    over = max(-x, -y, x + w - width, y + h - height)
    if over > TOLERANCE:
        yield "box-exceeds-image", f"by {over:.1f} pixels: {brief(box)} in {width} x {height}"


def is_box(box: Any) -> TypeGuard[list[float]]:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def layout_findings(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> Iterator[Finding]:
    """Judge what the four numbers of all boxes mean; true xywh data meets neither condition.

    boxes: (N, 4) as the file gives them; sizes: (N, 2) width, height of their images.
    """
    total = len(boxes)
    if total < 4:
        return
    corner, second = boxes[:, :2], boxes[:, 2:]
    if (np.abs(boxes) <= 1).all() and (sizes > 2).all():
        yield "boxes-look-normalised", f"no number in {total} boxes is above 1"
        return
    ordered = (second > corner).all(1)
    inside = (second <= sizes + TOLERANCE).all(1)
    beyond = (corner + second > sizes + TOLERANCE).any(1)
    if (ordered & inside).mean() > 0.99 and beyond.mean() > 0.2:
        found = f"of {total} boxes {beyond.mean():.0%} leave their image as x, y, width, height; "
        fits = f"as x1, y1, x2, y2 {(ordered & inside).mean():.0%} are sound"
        yield "boxes-look-xyxy", found + fits


def segmentation_findings(
    segmentation: Any, size: tuple[int, int] | None
) -> tuple[list[Finding], Shape | None]:
    """Faults of a polygon list or run lengths, and what it covers when there are none."""
    if isinstance(segmentation, dict):
        findings, shape = _rle_findings(segmentation, size)
    elif isinstance(segmentation, list):
        findings, shape = _polygon_findings(segmentation)
    else:
        return [("bad-segmentation", f"segmentation is {brief(segmentation)}")], None
    if shape is not None and shape.area == 0:
        return [*findings, ("segmentation-empty", "its area is 0")], None
    return findings, shape


def shape_findings(shape: Shape, box: list[float]) -> Iterator[Finding]:
    """Compare a mask's extent with its box x, y, width, height.

    COCO's own boxes are the extents of their polygons to 1e-12. Tools that round or count whole
    pixels stay within 2 pixels; tools that pad their boxes, above an overlap (IoU) of 0.6.
    """
    x, y, w, h = box
    edges = (x, y, x + w, y + h)
    apart = max(abs(a - b) for a, b in zip(shape.extent, edges, strict=True))
    left, top, right, bottom = shape.extent
    common = max(0.0, min(right, x + w) - max(left, x)) * max(0.0, min(bottom, y + h) - max(top, y))
    union = (right - left) * (bottom - top) + w * h - common
    if apart > 2 and common < 0.6 * union:
        ours = ", ".join(f"{edge:.1f}" for edge in shape.extent)
        theirs = ", ".join(f"{edge:.1f}" for edge in edges)
        yield "segmentation-box-mismatch", f"mask spans {ours}; box spans {theirs} (x1 y1 x2 y2)"


def area_findings(area: Any, box: list[float] | None, shape: Shape | None) -> Iterator[Finding]:
    """Compare the stored area with the mask's or, without one, with the box's.

    A polygon's area and its pixel count differ by up to half its outline, hence the slack.
    """
    if not is_number(area) or area <= 0:
        yield "bad-area", f"area is {brief(area)}"
        return
    if shape is not None:
        left, top, right, bottom = shape.extent
        slack = 0.2 * max(area, shape.area) + (right - left) + (bottom - top)
        if abs(area - shape.area) > slack:
            yield "area-mismatch", f"area is {area:g}, its mask covers {shape.area:g}"
    elif box is not None and box[2] > 0 and box[3] > 0:
        own = box[2] * box[3]  # an upper bound: masks may have been dropped, their areas kept
        if area > 1.2 * own + box[2] + box[3] or area < 0.01 * own:
            yield "area-mismatch", f"area is {area:g}, its box covers {own:g}"


def _polygon_findings(polygons: list[Any]) -> tuple[list[Finding], Shape | None]:
    findings: list[Finding] = []
    for part, flat in enumerate(polygons):
        if not isinstance(flat, list):
            hint = "; one more pair of brackets is needed" if is_number(flat) else ""
            found = f"part {part} is {brief(flat)}{hint}"
            return [*findings, ("bad-segmentation", found)], None
        if not all(map(is_number, flat)):
            wrong = next(value for value in flat if not is_number(value))
            findings.append(("bad-segmentation", f"part {part} holds {brief(wrong)}"))
        elif len(flat) % 2:
            findings.append(("polygon-odd-length", f"part {part} has {len(flat)} numbers"))
        elif len(flat) < 6:
            findings.append(("polygon-too-short", f"part {part} has {len(flat) // 2} points"))
    return findings, None if findings else _polygon_shape(polygons)


def _polygon_shape(polygons: list[list[float]]) -> Shape:
    """Extent of all parts; area as their sum (the shoelace formula), which is COCO's area too."""
    parts = [np.asarray(flat, dtype=np.float64).reshape(-1, 2) for flat in polygons]
    area = 0.0
    for points in parts:
        x, y = (points - points[0]).T  # from the first point, so that the closing edge adds nothing
        area += abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:])) / 2
    corners = np.concatenate(parts)
    return Shape((*map(float, corners.min(0)), *map(float, corners.max(0))), area)  # type: ignore[arg-type]


def _rle_findings(
    rle: dict[str, Any], size: tuple[int, int] | None
) -> tuple[list[Finding], Shape | None]:
    shape = rle.get("size")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(is_count, shape))):
        return [("bad-segmentation", f"the size of its run lengths is {brief(shape)}")], None
    height, width = shape
    if size is not None and (width, height) != size:
        swapped = " (height comes first)" if (height, width) == size else ""
        found = f"size {brief(shape)}{swapped}, the image has height {size[1]}, width {size[0]}"
        return [("rle-size-wrong", found)], None
    try:
        counts = decode_counts(rle.get("counts"))
    except ValueError as error:
        return [("rle-undecodable", str(error))], None
    if sum(counts) != height * width:
        found = f"the runs cover {sum(counts)} pixels of {height} x {width} = {height * width}"
        return [("rle-counts-wrong", found)], None
    return [], _runs_shape(np.array(counts, dtype=np.int64), height)


def decode_counts(counts: Any) -> list[int]:
    """Run lengths (background first) from COCO's list or its compressed text.

    The text holds 5 bits a character (ASCII 48 + bits, 32 = more follow, lowest bits first, the
    last one's 16 = negative); from the fourth run on, each is the difference to the one two before.
    Raises ValueError for anything else and for negative runs.
    """
    if isinstance(counts, str):
        runs = _decode_text(counts)
    elif isinstance(counts, list):
        runs = counts
    else:
        raise ValueError(f"counts is {brief(counts)}, neither a list nor text")
    for index, run in enumerate(runs):
        if type(run) is not int or not 0 <= run < LARGEST:
            raise ValueError(f"run {index} is {brief(run)}")
    return runs


def _decode_text(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for place, character in enumerate(text):
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"character {place} of counts, {brief(character)}, has no place there")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("counts ends in the middle of a number")
    return runs


def _runs_shape(counts: NDArray[np.int64], height: int) -> Shape:
    """Extent and area of run lengths that go down the columns of an image of this height."""
    ends = np.cumsum(counts)
    starts, ends = ends[:-1:2], ends[1::2]
    kept = ends > starts
    first, last = starts[kept], ends[kept] - 1  # pixels, counted down the columns
    if len(first) == 0:
        return Shape((0.0, 0.0, 0.0, 0.0), 0.0)
    left, right = first[0] // height, last[-1] // height
    over = first // height != last // height  # such a run touches the bottom and the top
    top = 0 if over.any() else (first % height).min()
    bottom = height - 1 if over.any() else (last % height).max()
    extent = (float(left), float(top), float(right) + 1, float(bottom) + 1)
    return Shape(extent, float((last - first + 1).sum()))
