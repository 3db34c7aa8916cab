"""Boxes, masks and names on pixels: the one place where they are drawn, for figures and panels.

A matplotlib figure takes a tenth of a second; a panel that answers while a slider moves draws with
numpy and PIL, and a figure lays the same marks over its image. Pictures are uint8 (H, W, 3).
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from mimdet.data.rasters import crops_from_segmentations
from mimdet.images import to_rgb
from mimdet.models.sampling import PATCH
from mimdet.structures import Crops, Detections, Target, as_rle, paste
from mimdet.viz import style
from mimdet.viz.style import NotebookFigure

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1; y grows downwards
Size = tuple[int, int]  # height, width
T = TypeVar("T")

UNSAMPLED = (225, 225, 225)
MASK_OPACITY = 0.4
TEXT = 12
"""Pixels of a name's letters in a panel."""
DASH = 6
TALL = 3
"""Times its width that a picture may be high: 400 x 2,000,000 pixels would fill the memory."""
MOST = 200
"""Pictures of one figure."""
MOST_NAMED = 30
"""Objects of one picture that still get a name; with more, the names would hide the image."""


# ------------------------------------------------------------------------------- pictures


def image_size(image: Any) -> Size:
    """(height, width) of whatever `predict` takes: uint8 (3, H, W), a path, an array, a PIL image.
    Raises ValueError for anything else, and without a pixel."""
    height, width = to_rgb(image).shape[1:]
    if not height or not width:
        raise ValueError(f"an image of {height} x {width} pixels: there is nothing to show")
    return height, width


def to_pixels(image: Any, width: int = 0) -> Pixels:
    """An image as of `image_size` -> uint8 (H, W, 3), not a copy; width: at a width of so many
    pixels, as `enlarged`."""
    image_size(image)
    pixels = to_rgb(image).permute(1, 2, 0).cpu().numpy()
    return enlarged(pixels, width) if width else pixels


def enlarged(pixels: Pixels, width: int, smooth: bool = True) -> Pixels:
    """The picture at a width of so many pixels, less where its height would be more than TALL times
    that, up to TALL times as many for a panorama; smooth=False keeps the edges of tokens sharp."""
    rows, columns = pixels.shape[:2]
    least = min(width / TALL / rows, TALL * width / columns)  # a height of a third, if it can be
    return _scaled(pixels, max(least, min(width / columns, TALL * width / rows)), smooth)


def _scaled(pixels: Pixels, scale: float, smooth: bool = True) -> Pixels:
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize(size, way))


def heat(values: Tensor, low: float | None = None, high: float | None = None) -> Pixels:
    """(h, w) numbers as colours; NaN (unsampled places) is light grey. low, high: ends of the
    scale, by default the smallest and largest value."""
    plane = np.ma.masked_invalid(values.float().cpu().numpy())
    low, high = plane.min() if low is None else low, plane.max() if high is None else high
    scaled = ((plane - low) / max(high - low, 1e-12)).clip(0, 1)
    grey = str(UNSAMPLED[0] / 255)  # as matplotlib writes it
    colours = mpl.colormaps["viridis"].with_extremes(bad=grey)(scaled)
    return np.rint(255 * colours[..., :3]).astype(np.uint8)


def beside(pictures: Sequence[Pixels], gap: int = 8) -> Pixels:
    """Pictures in a row on white, tops aligned."""
    if not pictures:
        raise ValueError("nothing to put in a row: give at least one picture")
    height = max(map(len, pictures))
    margins = [((0, height - len(picture)), (0, gap), (0, 0)) for picture in pictures]
    padded = map(partial(np.pad, constant_values=255), pictures, margins)
    return np.concatenate([*padded], axis=1)[:, :-gap]


def below(pictures: Sequence[Pixels], gap: int = 8) -> Pixels:
    """Pictures in a column on white, left edges aligned."""
    return beside([picture.swapaxes(0, 1) for picture in pictures], gap).swapaxes(0, 1)


def captioned(pixels: Pixels, text: str, size: int = 13) -> Pixels:
    """The picture under a line of text, which is smaller where it would be too long."""
    width = pixels.shape[1]
    fitting = min(size, int(size * width / (font(size).getlength(text) + 2)))
    canvas = Image.new("RGB", (width, pixels.shape[0] + size + 7), "white")
    canvas.paste(Image.fromarray(pixels), (0, size + 7))
    write_text(ImageDraw.Draw(canvas), (1, 3 + size / 2), text, "white", max(1, fitting))
    return np.asarray(canvas)


def data_url(pixels: Any) -> str:
    """A picture as text that a page can show. PNG at the lowest compression: made ten times faster
    and read from the same machine."""
    content = png_bytes(Image.fromarray(np.asarray(pixels, np.uint8)), compress_level=1)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def from_data_url(url: str) -> Image.Image:
    """The picture of `data_url`, RGBA."""
    content = base64.b64decode(url.split(",", 1)[1])
    return Image.open(io.BytesIO(content)).convert("RGBA")


def png_bytes(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def with_few_colours(pixels: Pixels, exact: Sequence[str] = ()) -> Image.Image:
    """The picture with a palette of 255 colours, a third of the bytes as PNG. These are in it."""
    picture = Image.fromarray(pixels)
    ours = [part for colour in (*exact, "white", style.INK) for part in ImageColor.getrgb(colour)]
    most = 255 - len(ours) // 3
    palette = Image.new("P", (1, 1))
    palette.putpalette((picture.quantize(most).getpalette() or [])[: 3 * most] + ours)
    return picture.quantize(palette=palette, dither=Image.Dither.NONE)


# ------------------------------------------------------------------------------- words, colours


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The one that matplotlib writes with: it comes with the package and knows many scripts."""
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def write_text(
    pen: ImageDraw.ImageDraw, left_middle: tuple[float, float], text: str, on: str, size: int
) -> None:
    """A line of text, dark or white, whichever is easier to read on the colour `on`."""
    red, green, blue = ImageColor.getrgb(on)[:3]
    ink = style.INK if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else "white"
    pen.text(left_middle, text, fill=ink, font=font(size), anchor="lm")


def class_name(label: int, categories: Sequence[str]) -> str:
    """Its name; its number where no name is known; nothing where there is only one class."""
    if len(categories) == 1:
        return ""
    return categories[label] if 0 <= label < len(categories) else str(label)


def class_colour(label: int) -> str:
    return style.PALETTE[label % len(style.PALETTE)]


def score_text(score: float) -> str:
    """0.871 -> `.87`, 1.0 -> `1.00`."""
    return f"{score:.2f}".removeprefix("0")


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
        lefts = [(min(max(x, 0), width - w), y) for x, y in corners]
        places = [(x, y, x + w, y + h) for x, y in lefts]
        inside = [p for p in places if p[0] >= 0 and p[1] >= 0 and p[3] <= height]
        free = [p for p in inside if not any(other and overlap(p, other) for other in placed)]
        placed.append(free[0] if free else None)
    return placed


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ------------------------------------------------------------------------------- objects


@dataclass(frozen=True, slots=True)
class Mark:
    """An object on a picture, in the pixels of its image."""

    box: Sequence[float]
    """xyxy."""
    colour: str
    name: str = ""
    mask: Crops | None = None
    """One; its bitmap may hold probabilities."""
    strong: bool = True
    """Thick and named; else a thin line."""
    dashed: bool = False


def marks_of(
    objects: Detections | Target, categories: Sequence[str] = (), score_threshold: float = 0.0
) -> list[Mark]:
    """Objects in the colours of their classes. Detections: the best first, each named `class .87`,
    without those below score_threshold."""
    objects = objects.to("cpu")
    if isinstance(objects, Detections):
        objects = objects[objects.scores.argsort(descending=True, stable=True)]
        objects = objects[objects.scores >= score_threshold]
        scores = [score_text(score) for score in objects.scores.tolist()]
        cells = objects.mask_probabilities
        masks = None if cells is None else Crops(objects.boxes, cells)
    else:
        scores = [""] * len(objects)
        masks = objects.masks
    boxes, labels = objects.boxes.tolist(), objects.labels.tolist()
    return [
        Mark(
            box,
            class_colour(label),
            f"{class_name(label, categories)} {score}".strip(),
            None if masks is None else masks[i : i + 1],
        )
        for i, (box, label, score) in enumerate(zip(boxes, labels, scores, strict=True))
    ]


def draw_marks(
    picture: Image.Image, marks: Sequence[Mark], scale: float = 1.0, text: int = TEXT
) -> None:
    """Draw marks on an RGBA picture, the first on top: masks, then boxes, then names.

    scale: pixels of the picture per pixel of the image; text: pixels of a letter, lines follow.
    Names never cover each other or leave the picture; one that finds no place is left out.
    """
    line = max(1, text // 6)
    pen = ImageDraw.Draw(picture)
    for mark in marks[::-1]:
        if mark.mask is not None:
            _paint_mask(picture, mark.mask, mark.colour, scale, line)
    for mark in sorted(marks[::-1], key=lambda mark: mark.strong):
        _paint_box(pen, mark, scale, line)
    named = [mark for mark in marks if mark.strong and mark.name]
    if len(named) > MOST_NAMED:
        return
    sizes = [(font(text).getlength(mark.name) + text / 2, 1.3 * text) for mark in named]
    boxes = [[value * scale for value in mark.box] for mark in named]
    places = place_names(boxes, sizes, *map(float, picture.size))
    for mark, place in zip(named, places, strict=True):
        if place is not None:
            pen.rectangle(place, fill=mark.colour)
            middle = (place[0] + text / 4, (place[1] + place[3]) / 2)
            write_text(pen, middle, mark.name, mark.colour, text)


def with_marks(pixels: Pixels, marks: Sequence[Mark], size: Size, text: int = TEXT) -> Pixels:
    """A picture, of any resolution, of an image of `size` = (height, width) with its marks."""
    picture = Image.fromarray(pixels).convert("RGBA")
    draw_marks(picture, marks, max(picture.size) / max(size), text)
    return np.asarray(picture.convert("RGB"))


def _paint_mask(picture: Image.Image, mask: Crops, colour: str, scale: float, line: int) -> None:
    """A translucent fill and an outline. Only the part of the picture that the mask covers is
    touched: ten times as fast."""
    box = mask.boxes[0].float() * scale
    x0, y0, x1, y1 = box.tolist()
    left, top = max(0, math.floor(x0) - line), max(0, math.floor(y0) - line)
    right = min(picture.width, math.ceil(x1) + line)
    bottom = min(picture.height, math.ceil(y1) + line)
    if right <= left or bottom <= top:
        return
    own = box - torch.tensor([left, top, left, top])
    inside = paste(mask.bitmaps.float(), own[None], bottom - top, right - left)[0].numpy()
    whole = Image.fromarray(np.uint8(255) * inside)
    core = np.asarray(whole.filter(ImageFilter.MinFilter(2 * line - 1)))
    stamp = Image.new("RGBA", whole.size, colour)
    opacity = np.where(core > 0, round(255 * MASK_OPACITY), np.asarray(whole))
    stamp.putalpha(Image.fromarray(opacity.astype(np.uint8)))
    picture.alpha_composite(stamp, (left, top))


def _paint_box(pen: ImageDraw.ImageDraw, mark: Mark, scale: float, line: int) -> None:
    x0, x1 = sorted((scale * mark.box[0], scale * mark.box[2]))
    y0, y1 = sorted((scale * mark.box[1], scale * mark.box[3]))
    if mark.strong:  # a dark rim, so that it is seen on any image
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="#222222", width=line + 2)
    width = line if mark.strong else max(1, line // 2)
    if not mark.dashed:
        pen.rectangle((x0, y0, x1, y1), outline=mark.colour, width=width)
        return
    for x in np.arange(x0, x1, 2 * DASH):
        for y in (y0, y1):
            pen.line([(x, y), (min(x + DASH, x1), y)], mark.colour, width)
    for y in np.arange(y0, y1, 2 * DASH):
        for x in (x0, x1):
            pen.line([(x, y), (x, min(y + DASH, y1))], mark.colour, width)


def box_of(entry: dict[str, Any], size: Sequence[int]) -> Box:
    """xyxy of a COCO result or annotation; without a bbox, that of its mask."""
    if entry.get("bbox") is not None:
        x, y, w, h = entry["bbox"]
    else:
        from pycocotools import mask as coco_mask

        x, y, w, h = coco_mask.toBbox(as_rle(entry["segmentation"], *size)).tolist()
    return x, y, x + w, y + h


def mask_of(entry: dict[str, Any], size: Sequence[int]) -> Crops | None:
    """The mask of a COCO result or annotation; None where it has none, and for an empty one."""
    from pycocotools import mask as coco_mask

    segmentation = entry.get("segmentation")
    if segmentation is None or not coco_mask.area(as_rle(segmentation, *size)):
        return None
    return crops_from_segmentations([segmentation], *size)


# ------------------------------------------------------------------------------- figures


class Picture(NamedTuple):
    """A picture of a figure, under its title."""

    title: str
    pixels: Pixels
    marks: Sequence[Mark] = ()
    """In its pixels."""


def show_rows(
    what: str,
    pictures: Sequence[Picture],
    columns: int = 4,
    group: int = 1,
    widest: float = 3.2,
    sharp: bool = False,
) -> NotebookFigure:
    """Pictures in rows of `columns` under their titles, which are the alt text, after `what`.

    `group` neighbours stand close together; columns is rounded down to whole groups. No picture is
    wider than `widest` inches. sharp: those of few pixels show each as a square, and the notebook
    stores no JPEG. Raises ValueError without pictures.
    """
    pictures = few(pictures)
    edge, near, far = 0.04, 0.05, 0.22  # inches
    heading = 0.05 + 0.18 * max(picture.title.count("\n") + 1 for picture in pictures)
    columns = max(group, min(columns, len(pictures), 12) // group * group)
    gaps = (columns // group - 1) * far + (columns - columns // group) * near
    side = min(widest, (style.WIDTH - 2 * edge - gaps) / columns)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    shapes = [[picture.pixels.shape[:2] for picture in row] for row in rows]
    heights = [side * max(min(h / w, 1.5) for h, w in row) for row in shapes]
    width = 2 * edge + gaps + columns * side
    height = 2 * edge + sum(heights) + len(rows) * heading + (len(rows) - 1) * near
    fig = style.new_figure(width, height)
    fig.has_photographs = not sharp
    fig.alt_text = f"{what}: {'; '.join(picture.title for picture in pictures)}.".replace(
        "\n", ", "
    )
    top = height - edge
    for row, row_height in zip(rows, heights, strict=True):
        left, bottom = edge, top - heading - row_height
        for number, picture in enumerate(row, start=1):
            box = (left / width, bottom / height, side / width, row_height / height)
            ax = fig.add_axes(box, anchor="N")
            ax.set_axis_off()
            ax.imshow(_on_screen(picture, ax.bbox.width, ax.bbox.height, sharp))
            style.write_title(ax, picture.title)
            left += side + (near if number % group else far)
        top = bottom - near
    return fig


def few(items: Iterable[T]) -> list[T]:
    """The items. Raises ValueError for none, and for more than MOST before all of them are read."""
    found = list(islice(items, MOST + 1))
    if not 1 <= len(found) <= MOST:
        much = f"more than {MOST} pictures" if found else "nothing"
        raise ValueError(f"{much} to show: give 1 to {MOST}")
    return found


def _on_screen(picture: Picture, width: float, height: float, sharp: bool) -> Pixels:
    """The picture with its marks, as large as fits into twice so many pixels of the screen."""
    rows, columns = picture.pixels.shape[:2]
    scale = 2 * min(width / columns, height / rows)
    pixels = _scaled(picture.pixels, scale, not sharp or scale < 1)
    text = round(2 * style.DPI / 72 * style.SMALL)
    return with_marks(pixels, picture.marks, (rows, columns), text)


def on_tokens(image: Tensor, grid: Size, patch: int = PATCH) -> Pixels:
    """An image, uint8 (3, H, W), on a canvas of `grid` = (h, w) tokens, padded with white.

    A token is a whole number of pixels, enough for sharp edges. Raises ValueError for an image that
    does not fit.
    """
    height, width = image_size(image)
    right, under = grid[1] * patch - width, grid[0] * patch - height
    if min(right, under) < 0:
        raise ValueError(
            f"an image of {(height, width)} pixels does not fit a grid of {grid} tokens of {patch} "
            "pixels: give the image as it was fed to the network"
        )
    whole = to_pixels(F.pad(to_rgb(image), (0, right, 0, under), value=255))
    return _scaled(whole, max(8, 1024 // max(grid)) / patch)
