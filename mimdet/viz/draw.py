"""Pictures as arrays and bytes: what interactive panels draw with.

A matplotlib figure takes a tenth of a second; a panel that answers while a slider moves draws with
numpy and PIL. Pictures are uint8 (H, W, 3), shown in the pixels of the screen.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mimdet.analysis.matching import Bools
from mimdet.analysis.verdicts import Verdict
from mimdet.structures import Detections, Target, paste
from mimdet.viz.style import (
    BLUE,
    DPI,
    GREEN,
    INK,
    NORMAL,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    SMALL,
    VERMILLION,
    WIDTH,
    YELLOW,
    NotebookFigure,
    new_figure,
)

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


Size = tuple[int, int]

MASK_SIDE = 640
"""Masks are pasted into a canvas whose long side has this many pixels, whatever the image's size:
the outlines of a 128-pixel image are smooth and those of a large one cost little."""
MOST_NAMED = 30
"""Objects of one panel that still get a name; with more, the names would hide the image."""


def image_panels(
    sizes: Sequence[tuple[int, int]], columns: int, group: int = 1, widest: float = 3.2
) -> tuple[NotebookFigure, list[Axes]]:
    """A figure with one frameless panel per image, in rows of `columns`, room for a title on each.

    sizes: (height, width) of the images. `group` neighbours stand close together; columns is
    rounded down to whole groups. No panel is wider than `widest` inches.
    """
    edge, near, far, heading = 0.04, 0.05, 0.22, 0.23  # inches
    columns = max(group, min(columns, len(sizes)) // group * group)
    gaps = (columns // group - 1) * far + (columns - columns // group) * near
    side = min(widest, (WIDTH - 2 * edge - gaps) / columns)
    rows = [sizes[start : start + columns] for start in range(0, len(sizes), columns)]
    heights = [side * max(min(h / w, 1.5) for h, w in row) for row in rows]
    width = 2 * edge + gaps + columns * side
    height = 2 * edge + sum(heights) + len(rows) * heading + (len(rows) - 1) * near
    fig = new_figure(width, height)
    fig.has_photographs = True

    axes = []
    top = height - edge
    for row, row_height in zip(rows, heights, strict=True):
        bottom = top - heading - row_height
        left = edge
        for column in range(len(row)):
            box = (left / width, bottom / height, side / width, row_height / height)
            ax = fig.add_axes(box, anchor="N")
            ax.set_axis_off()
            axes.append(ax)
            left += side + (near if (column + 1) % group else far)
        top = bottom - near
    return fig, axes


def image_size(image: Tensor) -> Size:
    """(height, width) of a (3, H, W) uint8 image. Raises ValueError for anything else."""
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"an image of shape {tuple(image.shape)} and {image.dtype}: give uint8 (3, H, W) RGB"
        )
    return image.shape[1], image.shape[2]


def draw_image(ax: Axes, image: Tensor, title: str, size: Size | None = None) -> None:
    """Show a uint8 (3, H, W) image; a panel's coordinates are its pixels, or those of `size`."""
    height, width = size or image_size(image)
    smooth = "bicubic" if max(image.shape) < MASK_SIDE // 2 else "antialiased"
    pixels = image.permute(1, 2, 0).cpu().numpy()
    ax.imshow(pixels, extent=(0, width, height, 0), interpolation=smooth)
    ax.set_title(title, loc="left", fontsize=NORMAL, color=INK, pad=3)


def draw_target(ax: Axes, target: Target, size: Size, categories: Sequence[str]) -> None:
    """Draw the true objects of an image of `size` (height, width)."""
    target = target.to("cpu")
    names = [class_name(label, categories) for label in target.labels.tolist()]
    if target.masks is not None:
        _draw_masks(ax, target.masks.bitmaps, target.masks.boxes, target.labels, size)
    _draw_boxes(ax, target.boxes, target.labels, names, size)


def draw_detections(ax: Axes, detections: Detections, categories: Sequence[str]) -> None:
    """Draw detections, the best score on top, each named `class .87`."""
    found = detections.to("cpu")
    found = found[found.scores.argsort()]
    names = [
        f"{class_name(label, categories)} {score_text(score)}".strip()
        for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    ]
    if found.mask_probabilities is not None:
        _draw_masks(ax, found.mask_probabilities, found.boxes, found.labels, found.image_size)
    _draw_boxes(ax, found.boxes, found.labels, names, found.image_size)


def class_name(label: int, categories: Sequence[str]) -> str:
    """Its name; its number where no name is known; nothing where there is only one class."""
    if len(categories) == 1:
        return ""
    return categories[label] if 0 <= label < len(categories) else str(label)


def score_text(score: float) -> str:
    """0.871 -> `.87`, 1.0 -> `1.00`."""
    return f"{score:.2f}".removeprefix("0")


def class_colour(label: int) -> str:
    return PALETTE[label % len(PALETTE)]


def _draw_masks(ax: Axes, cells: Tensor, boxes: Tensor, labels: Tensor, size: Size) -> None:
    """A translucent fill and an outline per object, as `mimdet.structures.paste` places its cells.

    cells: (N, M, M') probabilities or bitmaps over boxes (N, 4). Only the part of the canvas that a
    box covers is pasted.
    """
    scale = MASK_SIDE / max(size)  # canvas pixels per image pixel
    for i, label in enumerate(labels.tolist()):
        x0, y0, x1, y1 = (boxes[i] * scale).tolist()
        left, top = max(0, math.floor(x0) - 1), max(0, math.floor(y0) - 1)
        right = min(math.ceil(size[1] * scale), math.ceil(x1) + 1)
        bottom = min(math.ceil(size[0] * scale), math.ceil(y1) + 1)
        if right - left < 2 or bottom - top < 2:
            continue  # outside the image: there is no contour to draw
        box = torch.tensor([[x0 - left, y0 - top, x1 - left, y1 - top]])
        mask = paste(cells[i : i + 1], box, bottom - top, right - left)[0].float().numpy()
        if not mask.any():
            continue
        x = (np.arange(left, right) + 0.5) / scale
        y = (np.arange(top, bottom) + 0.5) / scale
        colour = class_colour(label)
        fill = ax.contourf(x, y, mask, levels=[0.5, 1.5], colors=[to_rgba(colour, 0.4)])
        fill.set(edgecolor=colour, linewidth=1.0)


def _draw_boxes(ax: Axes, boxes: Tensor, labels: Tensor, names: Sequence[str], size: Size) -> None:
    corners = boxes.tolist()
    colours = [class_colour(label) for label in labels.tolist()]
    for (x0, y0, x1, y1), colour in zip(corners, colours, strict=True):
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=0.8))
    if any(names) and len(names) <= MOST_NAMED:
        _draw_names(ax, names, corners, colours, size)
    ax.set_xlim(0, size[1])
    ax.set_ylim(size[0], 0)


def _draw_names(
    ax: Axes,
    names: Sequence[str],
    boxes: Sequence[Sequence[float]],
    colours: Sequence[str],
    size: Size,
) -> None:
    """Write each name at the first free place around its box, the last object's first.

    Names never cover each other or leave the image; one that finds no place is left out.
    """
    height, width = size
    shown = 72 / DPI * min(ax.bbox.width / width, ax.bbox.height / height)  # points per image pixel
    sizes = [((_text_width(name) + 3) / shown, 1.35 * SMALL / shown) for name in names]
    places = place_names(boxes[::-1], sizes[::-1], width, height)[::-1]
    for name, place, colour in zip(names, places, colours, strict=True):
        if place is not None:
            x0, y0, x1, y1 = place
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color=colour, linewidth=0, zorder=4))
            ax.text(
                (x0 + x1) / 2,
                y1 - 0.3 * (y1 - y0),
                name,
                ha="center",
                va="baseline",
                fontsize=SMALL,
                color=_text_colour(colour),
                zorder=5,
            )


def _text_width(text: str) -> float:
    """Points."""
    font = FontProperties(size=SMALL)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def _text_colour(background: str) -> str:
    """Black or white, whichever is easier to read on it."""
    red, green, blue = to_rgb(background)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


Pixels = NDArray[np.uint8]

UNSAMPLED = (225, 225, 225)
MASK_OPACITY = 0.4


def to_pixels(image: Tensor) -> Pixels:
    """uint8 (3, H, W), or float (3, H, W) in 0..1 -> uint8 (H, W, 3)."""
    if image.dtype != torch.uint8:
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())


def enlarged(pixels: Pixels, width: int, smooth: bool = True) -> Pixels:
    """The picture at a width of so many pixels; smooth=False keeps the edges of tokens sharp."""
    height = max(1, round(width * pixels.shape[0] / pixels.shape[1]))
    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize((width, height), way))


def heat(
    values: Tensor, low: float | None = None, high: float | None = None, colours: str = "viridis"
) -> Pixels:
    """(h, w) numbers as colours; NaN (unsampled places) is light grey. low, high: ends of the
    scale, by default the smallest and largest value."""
    plane = values.float().cpu().numpy()
    known = np.isfinite(plane)
    if low is None:
        low = float(plane[known].min()) if known.any() else 0.0
    if high is None:
        high = float(plane[known].max()) if known.any() else 1.0
    scaled = np.where(known, (plane - low) / max(high - low, 1e-12), 0).clip(0, 1)
    picture = np.rint(colormaps[colours](scaled)[..., :3] * 255).astype(np.uint8)
    picture[~known] = UNSAMPLED
    return picture


def with_objects(
    pixels: Pixels,
    objects: Detections | Target,
    size: tuple[int, int],
    categories: Sequence[str] = (),
    score_threshold: float = 0.3,
) -> Pixels:
    """Boxes, masks and names drawn on a picture of an image of `size` = (height, width).

    The picture may be larger than the image. Detections below score_threshold are left out.
    """
    scale = pixels.shape[1] / size[1]
    if isinstance(objects, Detections):
        objects = objects[objects.scores >= score_threshold]
        scores: list[float] = objects.scores.tolist()
        cells, covered = objects.mask_probabilities, objects.boxes
    else:
        scores = []
        masks = objects.masks
        cells, covered = (None, objects.boxes) if masks is None else (masks.bitmaps, masks.boxes)
    picture = pixels.astype(np.float32)
    labels: list[int] = objects.labels.tolist()
    if cells is not None:
        _fill_masks(picture, cells, covered * scale, labels)
    drawn = Image.fromarray(np.rint(picture).astype(np.uint8))
    boxes = (objects.boxes * scale).tolist()
    names = [class_name(label, categories) for label in labels]
    if scores:
        pairs = zip(names, scores, strict=True)
        names = [f"{name} {score_text(score)}".strip() for name, score in pairs]
    _draw_outlines(drawn, boxes, labels, names)
    return np.asarray(drawn)


def beside(pictures: Sequence[Pixels], gap: int = 8) -> Pixels:
    """Pictures in a row on white, tops aligned."""
    if not pictures:
        raise ValueError("nothing to put in a row: give at least one picture")
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    row = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for picture in pictures:
        row[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap
    return row


def captioned(pixels: Pixels, text: str, size: int = 15) -> Pixels:
    """The picture under a line of text."""
    canvas = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + size + 7), "white")
    canvas.paste(Image.fromarray(pixels), (0, size + 7))
    ImageDraw.Draw(canvas).text((1, 1), text, fill="#333333", font=ImageFont.load_default(size))
    return np.asarray(canvas)


def png_bytes(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def data_url(pixels: Any) -> str:
    """A picture as text that a page can show. PNG at the lowest compression: made ten times faster
    and read from the same machine."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def from_data_url(url: str) -> Image.Image:
    """The picture of `data_url`, RGBA."""
    content = base64.b64decode(url.split(",", 1)[1])
    return Image.open(io.BytesIO(content)).convert("RGBA")


def _fill_masks(
    picture: NDArray[np.float32], cells: Tensor, boxes: Tensor, labels: Sequence[int]
) -> None:
    height, width = picture.shape[:2]
    for i, label in enumerate(labels):
        x0, y0, x1, y1 = boxes[i].tolist()
        left, top = max(0, int(x0) - 1), max(0, int(y0) - 1)
        right, bottom = min(width, int(x1) + 2), min(height, int(y1) + 2)
        if right <= left or bottom <= top:
            continue
        own = boxes[i : i + 1] - boxes.new_tensor([left, top, left, top])
        inside = paste(cells[i : i + 1].float(), own, bottom - top, right - left)[0].numpy()
        colour = np.array(_rgb(label), np.float32)
        region = picture[top:bottom, left:right]
        region[inside] = (1 - MASK_OPACITY) * region[inside] + MASK_OPACITY * colour


def _draw_outlines(
    drawn: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], names: list[str]
) -> None:
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(12)
    for box, label in zip(boxes, labels, strict=True):
        pen.rectangle(list(box), outline=_rgb(label), width=2)
    extents = [font.getbbox(name) for name in names]
    sizes = [(float(right + 4), float(bottom + 3)) for _, _, right, bottom in extents]
    places = place_names(boxes, sizes, *map(float, drawn.size))
    for name, label, place in zip(names, labels, places, strict=True):
        if place is None or not name:
            continue
        pen.rectangle(place, fill=_rgb(label))
        dark = sum(weight * c for weight, c in zip((0.3, 0.59, 0.11), _rgb(label), strict=True))
        pen.text((place[0] + 2, place[1]), name, fill="black" if dark > 127 else "white", font=font)


def _rgb(label: int) -> tuple[int, int, int]:
    colour = class_colour(label)
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


COLOURS: dict[Verdict, str] = {
    "correct": GREEN,
    "classification": ORANGE,
    "localisation": SKY,
    "both": PURPLE,
    "duplicate": YELLOW,
    "background": BLUE,
    "missed": VERMILLION,
}
LETTERS: dict[Verdict, str] = {
    "correct": "+",
    "classification": "C",
    "localisation": "L",
    "both": "B",
    "duplicate": "D",
    "background": "N",  # nothing there
    "missed": "M",
}
WORDS: dict[Verdict, str] = {
    "correct": "correct",
    "classification": "classification",
    "localisation": "localisation",
    "both": "both",
    "duplicate": "duplicate",
    "background": "background (nothing there)",
    "missed": "missed (dashed)",
}
WHITE_TEXT = ("background", "correct", "missed")
DASH = 6


@dataclass(slots=True)
class Mark:
    """A detection or a missed object on a picture."""

    box: tuple[float, float, float, float]
    """xyxy in pixels of the picture."""
    verdict: Verdict | None
    """None for a true object, which is white."""
    text: str
    """After the letter: class and score."""
    strong: bool = True
    """Thick, named and filled; else a thin line."""
    mask: Bools | None = None
    """(H, W) at any resolution; it covers the whole picture."""


def with_marks(pixels: Pixels, marks: Sequence[Mark]) -> Pixels:
    """The picture with its marks, the first on top; missed objects are dashed."""
    picture = pixels.astype(np.float32)
    for mark in marks[::-1]:
        if mark.strong and mark.mask is not None and mark.mask.any():
            _fill(picture, mark.mask, _rgb_of_hex(_colour(mark)))
    drawn = Image.fromarray(np.rint(picture).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for mark in sorted(marks[::-1], key=lambda mark: mark.strong):
        _draw_box(pen, mark)
    _draw_mark_names(pen, [mark for mark in marks if mark.strong], drawn.size)
    return np.asarray(drawn)


def legend(width: int, size: int = 13) -> Pixels:
    """What the colours and letters mean, in lines of at most `width` pixels."""
    font = ImageFont.load_default(size)
    line, gap = size + 9, 14
    entries, left, top = [], 0.0, 0
    for verdict, word in WORDS.items():
        tag, text = font.getlength(LETTERS[verdict]) + 8, font.getlength(word)
        if left and left + tag + 5 + text > width:
            left, top = 0.0, top + line
        entries.append((verdict, left, top, tag))
        left += tag + 5 + text + gap
    picture = Image.new("RGB", (width, top + line), "white")
    pen = ImageDraw.Draw(picture)
    for verdict, left, top, tag in entries:
        pen.rectangle((left, top + 1, left + tag, top + line - 4), fill=COLOURS[verdict])
        ink = "white" if verdict in WHITE_TEXT else "black"
        pen.text((left + 4, top + 1), LETTERS[verdict], fill=ink, font=font)
        pen.text((left + tag + 5, top + 1), WORDS[verdict], fill=INK, font=font)
    return np.asarray(picture)


def legend_html() -> str:
    """The same for a page."""
    tags = (
        f"<span style='margin-right:12px;white-space:nowrap'><b style='background:{colour};"
        f"color:{'white' if verdict in WHITE_TEXT else 'black'};padding:0 5px'>"
        f"{LETTERS[verdict]}</b> {WORDS[verdict]}</span>"
        for verdict, colour in COLOURS.items()
    )
    return f"<div style='line-height:1.8'>{' '.join(tags)}</div>"


def with_few_colours(pixels: Pixels) -> Image.Image:
    """The picture with a palette of 255 colours, a third of the bytes as PNG; ours stay exact."""
    picture = Image.fromarray(pixels)
    exact = [part for colour in [*COLOURS.values(), "#FFFFFF", INK] for part in _rgb_of_hex(colour)]
    most = 255 - len(exact) // 3
    palette = Image.new("P", (1, 1))
    palette.putpalette((picture.quantize(most).getpalette() or [])[: 3 * most] + exact)
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


def _fill(picture: NDArray[np.float32], mask: Bools, colour: tuple[int, int, int]) -> None:
    """Only the part of the picture that the mask reaches is touched: ten times as fast."""
    spans = []
    for axis in (0, 1):
        reached = np.flatnonzero(mask.any(1 - axis))
        start, end = int(reached[0]), int(reached[-1]) + 1
        scale = picture.shape[axis] / mask.shape[axis]
        spans.append((start, end, round(start * scale), max(1, round((end - start) * scale))))
    (y0, y1, top, height), (x0, x1, left, width) = spans
    crop = Image.fromarray(mask[y0:y1, x0:x1])
    inside = np.asarray(crop.resize((width, height), Image.Resampling.NEAREST))
    part = picture[top : top + height, left : left + width]
    inside = inside[: part.shape[0], : part.shape[1]]
    part[inside] += MASK_OPACITY * (np.array(colour, np.float32) - part[inside])


def _draw_box(pen: ImageDraw.ImageDraw, mark: Mark) -> None:
    x0, y0, x1, y1 = mark.box
    box = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
    colour = _colour(mark)
    if mark.strong:  # a dark rim, so that it is seen on any image
        rim = [box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1]
        pen.rectangle(rim, outline="#222222", width=4)
    width = 2 if mark.strong else 1
    if mark.verdict != "missed":
        pen.rectangle(box, outline=colour, width=width)
        return
    x0, y0, x1, y1 = box
    for corner, end in (((x0, y0), (x1, y0)), ((x0, y1), (x1, y1))):
        for x in np.arange(corner[0], end[0], 2 * DASH):
            pen.line([(x, corner[1]), (min(x + DASH, end[0]), corner[1])], colour, width)
    for corner, end in (((x0, y0), (x0, y1)), ((x1, y0), (x1, y1))):
        for y in np.arange(corner[1], end[1], 2 * DASH):
            pen.line([(corner[0], y), (corner[0], min(y + DASH, end[1]))], colour, width)


def _draw_mark_names(
    pen: ImageDraw.ImageDraw, marks: Sequence[Mark], size: tuple[int, int]
) -> None:
    font = ImageFont.load_default(12)
    letters = [LETTERS[mark.verdict] if mark.verdict else "" for mark in marks]
    names = [f"{letter} {mark.text}".strip() for letter, mark in zip(letters, marks, strict=True)]
    extents = [font.getbbox(name) for name in names]
    sizes = [(float(right + 5), float(bottom + 3)) for _, _, right, bottom in extents]
    places = place_names([mark.box for mark in marks], sizes, *map(float, size))
    for mark, name, place in zip(marks, names, places, strict=True):
        if place is None or not name:
            continue
        pen.rectangle(place, fill=_colour(mark))
        ink = "white" if mark.verdict in WHITE_TEXT else "black"
        pen.text((place[0] + 2, place[1]), name, fill=ink, font=font)


def _colour(mark: Mark) -> str:
    return COLOURS[mark.verdict] if mark.verdict else "#FFFFFF"


def _rgb_of_hex(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
