"""Figures that compare inputs: bitmaps, samples of tokens, and what batches spend on padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from mimdet.models.sampling import PATCH, Sample, token_grid
from mimdet.structures import padded_size
from mimdet.viz.panels import draw_image, image_panels, image_size
from mimdet.viz.style import BLUE, INK, NORMAL, ORANGE, WIDTH, NotebookFigure, new_figure

Size = tuple[int, int]
"""(height, width) in pixels."""


def show_bitmaps(bitmaps: Mapping[str, Any], widest: float = 2.3) -> NotebookFigure:
    """Bitmaps in a row under their titles, every cell a sharp square: 1 is blue, 0 is white.

    bitmaps: title -> (H, W) array or tensor of bool or 0/1. widest: inches of one.
    Raises ValueError when there are none.
    """
    if not bitmaps:
        raise ValueError("no bitmaps to show: give at least one")
    planes = {title: np.asarray(plane, bool) for title, plane in bitmaps.items()}
    sizes = [(plane.shape[0], plane.shape[1]) for plane in planes.values()]
    fig, axes = image_panels(sizes, len(sizes), widest=widest)
    ink = np.array([int(BLUE[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
    for ax, (title, plane) in zip(axes, planes.items(), strict=True):
        picture = np.where(plane[..., None], ink, np.uint8(255))
        height, width = plane.shape
        ax.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
        ax.set_title(title, loc="left", fontsize=NORMAL, color=INK, pad=3)
        frame = Rectangle((0, 0), width, height, fill=False, color=INK, linewidth=0.8)
        ax.add_patch(frame)
    fig.has_photographs = False
    covered = [f"{title}: {plane.mean():.0%} covered" for title, plane in planes.items()]
    fig.alt_text = f"{len(planes)} bitmaps. {'; '.join(covered)}."
    return fig


def show_samples(image: Tensor, samples: Mapping[str, Sample], columns: int = 4) -> NotebookFigure:
    """One image under several samples of its tokens: kept ones in colour, the others faded to grey.

    image: uint8 (3, H, W) as fed to the network; samples: title -> a sample of it alone (a batch of
    one). Raises ValueError when there are none, or one is of another grid.
    """
    if not samples:
        raise ValueError("no samples to show: give at least one")
    height, width = image_size(image)
    grid = token_grid(height, width)
    fig, axes = image_panels([(height, width)] * len(samples), columns, widest=3.2)
    pale = (0.25 * image.float().mean(0) + 0.75 * 225).expand(3, -1, -1)
    counts = []
    for ax, (title, sample) in zip(axes, samples.items(), strict=True):
        if tuple(sample.grid) != grid:
            raise ValueError(
                f"{title}: a sample of {tuple(sample.grid)} tokens, the image has {grid}: give the "
                "image as it was fed to the network, with its sides multiples of 32"
            )
        kept = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        kept[sample.keep[0].cpu()] = True
        seen = kept.view(grid).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        seen = seen[:height, :width]
        draw_image(ax, torch.where(seen, image.float(), pale).to(torch.uint8), title)
        counts.append(f"{title}: {int(kept.sum())}")
    fig.alt_text = (
        f"An image of {grid[0]} x {grid[1]} tokens, kept ones in colour, under "
        f"{len(samples)} sample{'' if len(samples) == 1 else 's'}. Tokens kept by "
        f"{', '.join(counts)}."
    )
    return fig


def padding_factor(batches: Sequence[Sequence[Size]]) -> float:
    """Tokens computed / tokens of the images themselves, when each batch is padded to one size.

    batches: (height, width) of the images of every batch.
    """
    computed = sum(len(batch) * _tokens(_canvas(batch)) for batch in batches)
    return computed / sum(_tokens(size) for batch in batches for size in batch)


def show_batches(ways: Mapping[str, Sequence[Sequence[Size]]]) -> NotebookFigure:
    """Batches of images on their common canvas: a row per way to group, blue image, orange padding.

    ways: title -> batches, each the (height, width) of its images. All are drawn to one scale.
    Raises ValueError when there are none.
    """
    if not ways or not all(batch for batches in ways.values() for batch in batches):
        raise ValueError("no batches to show: give at least one, with at least one image")
    gap, between = 40, 220  # pixels of the images
    rows = []
    for batches in ways.values():
        canvases = [_canvas(batch) for batch in batches]
        right = sum(len(b) * (c[1] + gap) for b, c in zip(batches, canvases, strict=True))
        rows.append((right + between * (len(batches) - 1), max(c[0] for c in canvases)))
    scale = (WIDTH - 0.1) / max(width for width, _ in rows)  # inches a pixel
    heading = 0.25
    height = sum(heading + 0.06 + tall * scale for _, tall in rows)
    fig = new_figure(WIDTH, height)
    top = height
    for (title, batches), (_, tall) in zip(ways.items(), rows, strict=True):
        top -= heading + 0.06 + tall * scale
        box = (0.05 / WIDTH, top / height, 1 - 0.1 / WIDTH, tall * scale / height)
        ax = fig.add_axes(box)
        ax.set_axis_off()
        ax.set_xlim(0, (WIDTH - 0.1) / scale)
        ax.set_ylim(tall, 0)
        factor = padding_factor(batches)
        ax.set_title(f"{title}: {factor:.2f} x", loc="left", fontsize=NORMAL, color=INK, pad=3)
        left = 0
        for batch in batches:
            canvas = _canvas(batch)
            for size in batch:
                for extent, colour in ((canvas, ORANGE), (size, BLUE)):
                    ax.add_patch(Rectangle((left, 0), extent[1], extent[0], color=colour, lw=0))
                left += canvas[1] + gap
            left += between
    factors = [f"{title}: {padding_factor(batches):.2f}" for title, batches in ways.items()]
    fig.alt_text = (
        "Images of batches on their common padded canvas; tokens computed per token of an image: "
        f"{', '.join(factors)}."
    )
    return fig


def _canvas(batch: Sequence[Size]) -> Size:
    """(height, width) that every image of the batch is padded to."""
    return padded_size(max(h for h, _ in batch), max(w for _, w in batch))


def _tokens(size: Size) -> int:
    rows, columns = token_grid(*size)
    return rows * columns
