"""Pictures as arrays and bytes: what interactive panels draw with.

A matplotlib figure takes a tenth of a second; a panel that answers while a slider moves draws with
numpy and PIL. Pictures are uint8 (H, W, 3), shown in the pixels of the screen.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mimdet.masks import paste
from mimdet.structures import Detections, Target
from mimdet.viz.names import place_names
from mimdet.viz.panels import class_colour, class_name, score_text

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
    _draw_boxes(drawn, boxes, labels, names)
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


def _draw_boxes(
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
