"""Panels of images, and objects drawn on them: mask, box, name."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from torch import Tensor

from mimdet.masks import paste
from mimdet.structures import Detections, Target
from mimdet.viz.names import place_names
from mimdet.viz.style import DPI, INK, NORMAL, PALETTE, SMALL, WIDTH, NotebookFigure, new_figure

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
    """A translucent fill and an outline per object, as `mimdet.masks.paste` places its cells.

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
