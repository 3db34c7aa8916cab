"""Detections drawn by what is right or wrong with them: a colour and a letter for each verdict."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mimdet.analysis.error_overlaps import Bools
from mimdet.analysis.verdicts import Verdict
from mimdet.viz.names import place_names
from mimdet.viz.pixels import Pixels
from mimdet.viz.style import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, YELLOW

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
MASK_OPACITY = 0.4


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
            _fill(picture, mark.mask, _rgb(_colour(mark)))
    drawn = Image.fromarray(np.rint(picture).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for mark in sorted(marks[::-1], key=lambda mark: mark.strong):
        _draw_box(pen, mark)
    _draw_names(pen, [mark for mark in marks if mark.strong], drawn.size)
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
    exact = [part for colour in [*COLOURS.values(), "#FFFFFF", INK] for part in _rgb(colour)]
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


def _draw_names(pen: ImageDraw.ImageDraw, marks: Sequence[Mark], size: tuple[int, int]) -> None:
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


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
