"""Figures of detections, data and samples: one function each, no state.

Every function returns a new `NotebookFigure` (a matplotlib Figure) with its `alt_text`;
`save_figure` writes it as PNG and SVG.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import ImageColor
from torch import Tensor

from mimdet.models.sampling import PATCH, Sample, padded_places, token_grid
from mimdet.structures import Detections, Record, Target, padded_size
from mimdet.viz.draw import (
    Size,
    draw_image,
    draw_objects,
    image_panels,
    image_size,
    score_text,
)
from mimdet.viz.style import (
    BLUE,
    INK,
    ORANGE,
    WIDTH,
    NotebookFigure,
    plural,
    write_title,
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
    group = 1 if targets is None else 2
    sizes = [image_size(image) for image in images for _ in range(group)]
    fig, axes = image_panels(sizes, columns, group, widest=6.4 if columns == 1 else 3.2)
    count = 0
    for image, found, ax in zip(images, detections, axes[group - 1 :: group], strict=True):
        if tuple(found.image_size) != image_size(image):
            raise ValueError(
                f"an image is {image_size(image)} pixels (height, width), its detections belong to "
                f"{tuple(found.image_size)}: draw them on the image that was given to predict"
            )
        likely = found[found.scores >= score_threshold]
        draw_image(ax, image, f"detections ≥ {score_text(score_threshold)}: {len(likely)}")
        draw_objects(ax, likely, image_size(image), categories)
        count += len(likely)
    for image, target, ax in zip(images, targets or (), axes[::group], strict=targets is not None):
        draw_image(ax, image, f"truth: {len(target)}")
        draw_objects(ax, target, image_size(image), categories)
    truth = "" if targets is None else f", beside the {sum(map(len, targets))} true objects"
    fig.alt_text = (
        f"{plural(len(images), 'image')} with {plural(count, 'detection')} of score "
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
    fig, axes = image_panels([image_size(image) for image, _ in pairs], columns)
    for ax, (image, target) in zip(axes, pairs, strict=True):
        height, width = image_size(image)
        draw_image(ax, image, f"{plural(len(target), 'object')}, {width} × {height} px")
        draw_objects(ax, target, (height, width), categories)
    objects = sum(len(target) for _, target in pairs)
    fig.alt_text = (
        f"{plural(len(pairs), 'image')} with the boxes, masks and class names of "
        f"{plural(objects, 'object')}."
    )
    return fig


def show_sample(
    image: Tensor, sample: Sample | Mapping[str, Sample], index: int = 0, columns: int = 4
) -> NotebookFigure:
    """The image as the encoder sees it: kept tokens in colour, the others faded to grey.

    image: uint8 (3, H, W) as fed to the network, before or after padding; sample: of its batch,
    in which the image has place `index`, or several of them by title, side by side. Padding is
    white, or grey where it was kept. Raises ValueError when the image does not fit a sample.
    """
    named = {"": sample} if isinstance(sample, Sample) else dict(sample)
    sizes = [(own.grid[0] * PATCH, own.grid[1] * PATCH) for own in named.values()]
    fig, axes = image_panels(sizes, columns, widest=5.0 if len(named) == 1 else 3.2)
    titles = []
    for ax, (name, own) in zip(axes, named.items(), strict=True):
        title = f"{name}: " if name else ""
        titles.append(title + _kept_in_words(image, own, index))
        _draw_sample(ax, image, own.mask()[index], titles[-1])
    fig.alt_text = (
        f"An image under its grid of tokens, kept ones in colour, the others faded to grey. "
        f"{'; '.join(titles)}."
    )
    return fig


def _kept_in_words(image: Tensor, sample: Sample, index: int) -> str:
    if not 0 <= index < len(sample.keep):
        raise ValueError(f"index={index}: the sample is one of {plural(len(sample.keep), 'image')}")
    own_grid = token_grid(*image_size(image))
    if own_grid[0] > sample.grid[0] or own_grid[1] > sample.grid[1]:
        raise ValueError(
            f"an image of {image_size(image)} pixels has {own_grid} tokens of {PATCH} pixels, the "
            f"sample's grid only {sample.grid}: give the image as it was fed to the network"
        )
    kept = sample.mask()[index].flatten()
    own = int(kept[padded_places(own_grid, sample.grid, kept.device)].sum())
    total = own_grid[0] * own_grid[1]
    padding = len(sample.keep[index]) - own
    text = f"{own} of {total} tokens ({own / total:.2f})"
    return f"{text} + {padding} of padding" if padding else text


def _draw_sample(ax: Axes, image: Tensor, kept: Tensor, title: str) -> None:
    """The image on a canvas of whole tokens, tokens that are not kept (h, w) faded to grey.

    Small images are enlarged first, so that the edges of tokens stay sharp.
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
    rows, columns = kept.shape[0] * PATCH, kept.shape[1] * PATCH
    draw_image(ax, canvas.to(torch.uint8), title, (rows, columns))
    line: dict[str, Any] = {"color": "white", "alpha": 0.8}
    line["linewidth"] = 0.7 if columns <= 640 else 0.4
    ax.vlines(range(0, columns + 1, PATCH), 0, rows, **line)
    ax.hlines(range(0, rows + 1, PATCH), 0, columns, **line)


def show_bitmaps(bitmaps: Mapping[str, Any], widest: float = 2.3) -> NotebookFigure:
    """Bitmaps in a row under their titles, every cell a sharp square: 1 is blue, 0 is white.

    bitmaps: title -> (H, W) array or tensor of bool or 0/1. widest: inches of one.
    Raises ValueError when there are none.
    """
    planes = {title: np.asarray(plane, bool) for title, plane in bitmaps.items()}
    sizes = [(plane.shape[0], plane.shape[1]) for plane in planes.values()]
    fig, axes = image_panels(sizes, len(sizes), widest=widest)
    ink = np.array(ImageColor.getrgb(BLUE), np.uint8)
    for ax, (title, plane) in zip(axes, planes.items(), strict=True):
        height, width = plane.shape
        picture = np.where(plane[..., None], ink, np.uint8(255))
        ax.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
        ax.add_patch(Rectangle((0, 0), width, height, fill=False, color=INK, linewidth=0.8))
        write_title(ax, title)
    fig.has_photographs = False
    covered = [f"{title}: {plane.mean():.0%} covered" for title, plane in planes.items()]
    fig.alt_text = f"{len(planes)} bitmaps. {'; '.join(covered)}."
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
    heights = [max(_canvas(batch)[0] for batch in batches) for batches in ways.values()]
    width = max(
        sum(len(batch) * (_canvas(batch)[1] + gap) + between for batch in batches) - between
        for batches in ways.values()
    )
    fig, axes = image_panels([(height, width) for height in heights], columns=1, widest=WIDTH)
    titles = [f"{name}: {padding_factor(batches):.2f}" for name, batches in ways.items()]
    for ax, batches, height, title in zip(axes, ways.values(), heights, titles, strict=True):
        left = 0
        for batch in batches:
            canvas = _canvas(batch)
            for size in batch:
                for extent, colour in ((canvas, ORANGE), (size, BLUE)):
                    ax.add_patch(Rectangle((left, 0), extent[1], extent[0], color=colour, lw=0))
                left += canvas[1] + gap
            left += between
        ax.set(xlim=(0, width), ylim=(height, 0))
        write_title(ax, f"{title} x")
    fig.has_photographs = False
    fig.alt_text = (
        "Images of batches on their common padded canvas; tokens computed per token of an image: "
        f"{', '.join(titles)}."
    )
    return fig


def _canvas(batch: Sequence[Size]) -> Size:
    """(height, width) that every image of the batch is padded to."""
    return padded_size(max(h for h, _ in batch), max(w for _, w in batch))


def _tokens(size: Size) -> int:
    rows, columns = token_grid(*size)
    return rows * columns
