"""Figures of detections, training, samples, ratios and data: one function each, no state.

Every function returns a new `NotebookFigure` (a matplotlib Figure) with its `alt_text`;
`save_figure` writes it as PNG and SVG.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from torch import Tensor

from mimdet.models.sampling import PATCH, Sample, padded_places, token_grid
from mimdet.structures import Detections, Record, Target, padded_size
from mimdet.viz.draw import (
    draw_image,
    draw_objects,
    image_panels,
    image_size,
    score_text,
)
from mimdet.viz.style import (
    BLUE,
    INK,
    NORMAL,
    ORANGE,
    WIDTH,
    NotebookFigure,
    new_figure,
)


def show_detections(
    images: Sequence[Tensor],
    detections: Sequence[Detections],
    targets: Sequence[Target] | None = None,
    categories: Sequence[str] = (),
    score_threshold: float = 0.3,
    columns: int = 4,
) -> NotebookFigure:
    """Each image with its truth (left) and its detections of score_threshold and more (right).

    images: uint8 (3, H, W); detections and targets in the pixels of their image; without targets
    only the detections are drawn. columns: panels in a row; 1 draws them larger.
    Raises ValueError when there are no images, the lists differ in length, or detections belong to
    another image size.
    """
    _check_lists(images, detections, targets)
    group = 1 if targets is None else 2
    sizes = [image_size(image) for image in images for _ in range(group)]
    fig, axes = image_panels(sizes, columns, group, widest=6.4 if columns == 1 else 3.2)
    found = 0
    for i, (image, ax) in enumerate(zip(images, axes[group - 1 :: group], strict=True)):
        likely = detections[i][detections[i].scores >= score_threshold]
        draw_image(ax, image, f"detections ≥ {score_text(score_threshold)}: {len(likely)}")
        draw_objects(ax, likely, image_size(image), categories)
        found += len(likely)
    if targets is not None:
        for image, target, ax in zip(images, targets, axes[::group], strict=True):
            draw_image(ax, image, f"truth: {len(target)}")
            draw_objects(ax, target, image_size(image), categories)
    truth = "" if targets is None else f", beside the {sum(map(len, targets))} true objects"
    fig.alt_text = (
        f"{_count(len(images), 'image')} with {_count(found, 'detection')} of score "
        f"{score_threshold:.2f} or more{truth}: boxes, masks and class names."
    )
    return fig


def show_data(
    items: Iterable[Record | tuple[Tensor, Target]], categories: Sequence[str], columns: int = 4
) -> NotebookFigure:
    """Training images with their objects: records of a data set, or (image, target) pairs.

    Images are uint8 (3, H, W). Raises ValueError when there are none.
    """
    pairs = [(i.image, i.target) if isinstance(i, Record) else (i[0], i[1]) for i in items]
    if not pairs:
        raise ValueError("no images to show: give at least one record or (image, target) pair")
    fig, axes = image_panels([image_size(image) for image, _ in pairs], columns)
    for ax, (image, target) in zip(axes, pairs, strict=True):
        height, width = image_size(image)
        draw_image(ax, image, f"{_count(len(target), 'object')}, {width} × {height} px")
        draw_objects(ax, target, (height, width), categories)
    objects = sum(len(target) for _, target in pairs)
    fig.alt_text = (
        f"{_count(len(pairs), 'image')} with the boxes, masks and class names of "
        f"{_count(objects, 'object')}."
    )
    return fig


def show_sample(image: Tensor, sample: Sample, index: int = 0) -> NotebookFigure:
    """The image as the encoder sees it: kept tokens in colour, the others faded to grey.

    image: uint8 (3, H, W) as fed to the network, before or after padding; sample: of its batch,
    in which the image has place `index`. Padding is white, or grey where it was kept.
    Raises ValueError when the image does not fit the sample.
    """
    if not 0 <= index < len(sample.keep):
        raise ValueError(f"index={index}: the sample is one of {_count(len(sample.keep), 'image')}")
    height, width = image_size(image)
    own_grid = token_grid(height, width)
    if own_grid[0] > sample.grid[0] or own_grid[1] > sample.grid[1]:
        raise ValueError(
            f"an image of {height} x {width} pixels has {own_grid} tokens of {PATCH} pixels, the "
            f"sample's grid only {sample.grid}: give the image as it was fed to the network"
        )
    kept = sample.mask()[index].flatten()
    own = int(kept[padded_places(own_grid, sample.grid, kept.device)].sum())
    total = own_grid[0] * own_grid[1]
    title = f"{own} of {total} tokens ({own / total:.2f})"
    if own < len(sample.keep[index]):
        title += f" + {len(sample.keep[index]) - own} of padding"

    rows, columns = sample.grid[0] * PATCH, sample.grid[1] * PATCH
    fig, (ax,) = image_panels([(rows, columns)], columns=1, widest=5.0)
    draw_image(ax, _faded(image, kept.view(sample.grid)), title, (rows, columns))
    thin = 0.7 if columns <= 640 else 0.4
    ax.vlines(range(0, columns + 1, PATCH), 0, rows, color="white", alpha=0.8, linewidth=thin)
    ax.hlines(range(0, rows + 1, PATCH), 0, columns, color="white", alpha=0.8, linewidth=thin)
    fig.alt_text = (
        f"An image under its grid of {sample.grid[0]} x {sample.grid[1]} tokens: {title} in "
        "colour, the others faded to grey."
    )
    return fig


def _faded(image: Tensor, kept: Tensor) -> Tensor:
    """The image on a canvas of whole tokens, tokens that are not kept (h, w) faded to grey.

    Returns (3, h n, w n) uint8, where n = 16, or more for small images: they are enlarged first, so
    that the edges of tokens stay sharp.
    """
    times = max(1, 512 // max(image_size(image)))
    pixels = image.cpu()[None].float()
    if times > 1:
        pixels = F.interpolate(pixels, scale_factor=times, mode="bicubic").clamp(0, 255)
    height, width = pixels.shape[2:]
    seen = kept.repeat_interleave(PATCH * times, 0).repeat_interleave(PATCH * times, 1)
    canvas = torch.where(seen, 160.0, 250.0).expand(3, -1, -1).clone()  # padding
    grey = 0.25 * pixels[0].mean(0) + 0.75 * 225
    canvas[:, :height, :width] = torch.where(seen[:height, :width], pixels[0], grey)
    return canvas.to(torch.uint8)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _check_lists(
    images: Sequence[Tensor], detections: Sequence[Detections], targets: Sequence[Target] | None
) -> None:
    if not images:
        raise ValueError("no images to show: give at least one")
    lengths = {"images": len(images), "detections": len(detections)}
    if targets is not None:
        lengths["targets"] = len(targets)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one entry per image is needed, but there are {lengths}")
    for i, (image, found) in enumerate(zip(images, detections, strict=True)):
        if tuple(found.image_size) != image_size(image):
            raise ValueError(
                f"image {i} is {image_size(image)} pixels (height, width), its detections belong "
                f"to {tuple(found.image_size)}: draw them on the image that was given to predict"
            )


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
        kept = sample.mask()[0]
        seen = kept.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
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
