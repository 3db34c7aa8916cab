"""Figures of detections, data and samples: one function each, no state.

Every function returns a new `NotebookFigure` (a matplotlib Figure) with its `alt_text`;
`save_figure` writes it as PNG and SVG.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor
from torchvision.ops import box_iou

from mimdet.inference import predict
from mimdet.models.detector import Detector, evaluating
from mimdet.models.sampling import PATCH, Sample, padded_places, token_grid
from mimdet.structures import Detections, Record, Target, padded_size
from mimdet.viz import draw
from mimdet.viz.features import pale_dropped
from mimdet.viz.style import BLUE, ORANGE, SKY, WIDTH, NotebookFigure, plural


def show_detections(
    images: Sequence[Tensor],
    detections: Sequence[Detections],
    targets: Sequence[Target] | None = None,
    categories: Sequence[str] = (),
    score_threshold: float = 0.3,
    columns: int = 4,
    titles: Sequence[str] = (),
) -> NotebookFigure:
    """Each image with its truth (left) and its detections of score_threshold and more (right).

    images: uint8 (3, H, W); detections and targets in the pixels of their image; without targets
    only the detections are drawn. columns: panels in a row; 1 draws them larger. titles: a word
    for each image, before the number of detections.
    Raises ValueError when there are no images, the lists differ in length, or detections belong to
    another image size.
    """
    truths = [None] * len(images) if targets is None else targets
    pictures = []
    names = titles or [""] * len(images)
    for image, found, truth, name in zip(images, detections, truths, names, strict=True):
        size = draw.image_size(image)
        if tuple(found.image_size) != size:
            raise ValueError(
                f"an image is {size} pixels (height, width), its detections belong to "
                f"{tuple(found.image_size)}: draw them on the image that was given to predict"
            )
        pixels, marks = draw.to_pixels(image), draw.marks_of(found, categories, score_threshold)
        if truth is not None:
            true = draw.marks_of(truth, categories)
            pictures.append(draw.Picture(f"truth: {len(true)}", pixels, true))
        cut = f"≥ {draw.score_text(score_threshold)}"
        title = f"{name}: {len(marks)} {cut}" if name else f"detections {cut}: {len(marks)}"
        pictures.append(draw.Picture(title, pixels, marks))
    group, widest = 1 if targets is None else 2, 6.4 if columns == 1 else 3.2
    return draw.show_rows("Images with boxes, masks and names", pictures, columns, group, widest)


def small_picture(
    image: Tensor, found: Detections, categories: Sequence[str], title: str, width: int
) -> draw.Pixels:
    """A picture of a contact sheet: the image with all its detections, under its title."""
    marks, text = draw.marks_of(found, categories), max(9, min(18, width // 40))
    pixels = draw.with_marks(draw.to_pixels(image, width), marks, found.image_size, text)
    return draw.captioned(pixels, title)


def contact_sheet(pictures: Sequence[draw.Pixels], columns: int) -> draw.Pixels:
    """Small pictures in rows, uint8 (H, W, 3). ValueError where there are none."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    return draw.below([draw.beside(row) for row in rows])


def show_stages(model: Detector, record: Record, score_threshold: float = 0.5) -> NotebookFigure:
    """How a detector comes to its boxes: anchors, proposals, detections, and the truth.

    Anchors are those of the middle of the image, all others lie like them; of the proposals the
    surest are drawn, four an object. A true object is named by the highest IoU of any detection of
    score_threshold and more with it. Raises ValueError without an object.
    """
    image, truth = record.image, record.target
    if not len(truth):
        raise ValueError("a picture without objects: choose one that has some")
    batch = model.prepare(image)
    with torch.inference_mode(), evaluating(model):
        levels = list(model.neck(model.features(batch)).values())
        boxes = model.rpn(batch, levels)[0][0].boxes.cpu()
        anchors = [a.cpu() for a in model.rpn.anchors([(m.shape[2], m.shape[3]) for m in levels])]
    zoom, middle = batch.image_sizes[0][0] / image.shape[1], torch.tensor(batch.image_sizes[0]) / 2
    central = []
    for of_level in anchors:
        away = ((of_level[:, :2] + of_level[:, 2:]) / 2 - middle.flip(0)).norm(dim=1)
        central += (
            of_level[away.topk(model.rpn.anchors.per_place, largest=False)[1]] / zoom
        ).tolist()
    found = predict(model, image).to("cpu")
    found = found[found.scores >= score_threshold]
    overlaps = box_iou(truth.boxes, found.boxes) if len(found) else torch.zeros(len(truth), 1)
    pixels, count = draw.to_pixels(image), sum(map(len, anchors))
    best = [draw.Mark(box, SKY) for box in (boxes[: 4 * len(truth)] / zoom).tolist()]
    met = [
        draw.Mark(box, BLUE, f"IoU {draw.score_text(iou)}")
        for box, iou in zip(truth.boxes.tolist(), overlaps.amax(1).tolist(), strict=True)
    ]
    marks = draw.marks_of(found, model.categories)
    stages = {
        f"1 anchors: {len(central)} of {count:,}": [draw.Mark(box, ORANGE) for box in central],
        f"2 proposals: {len(best)} of {len(boxes):,}": best,
        f"3 detections ≥ {draw.score_text(score_threshold)}: {len(marks)}": marks,
        f"4 truth: {len(truth)}": met,
    }
    pictures = [draw.Picture(title, pixels, marks) for title, marks in stages.items()]
    return draw.show_rows("From anchors to detections", pictures)


def show_data(
    items: Iterable[Record | tuple[Tensor, Target]], categories: Sequence[str], columns: int = 4
) -> NotebookFigure:
    """Training images with their objects: records of a data set, or (image, target) pairs.

    Images are uint8 (3, H, W). Raises ValueError when there are none.
    """
    pictures = []
    for item in draw.few(items):
        image, target = (item.image, item.target) if isinstance(item, Record) else item
        height, width = draw.image_size(image)
        title = f"{plural(len(target), 'object')}, {width} × {height} px"
        marks = draw.marks_of(target, categories)
        pictures.append(draw.Picture(title, draw.to_pixels(image), marks))
    return draw.show_rows("Training images with boxes, masks and names", pictures, columns)


def show_sample(
    image: Tensor, sample: Sample | Mapping[str, Sample], index: int = 0
) -> NotebookFigure:
    """The image as the encoder sees it: kept tokens in colour, the others faded to grey.

    image: uint8 (3, H, W) as fed to the network, before or after padding; sample: of its batch,
    in which the image has place `index`, or several of them by title, side by side. Padding is
    light grey, or white where it was kept. Raises ValueError when the image does not fit a sample.
    """
    named = {"": sample} if isinstance(sample, Sample) else dict(sample)
    pictures = []
    for name, own in named.items():
        pixels = draw.on_tokens(image, own.grid)
        title = _kept_in_words(image, own, index)
        size = own.grid[0] * PATCH, own.grid[1] * PATCH
        seen = pale_dropped(pixels, own, size, index)
        token = len(seen) // own.grid[0]
        seen[::token] = seen[:, ::token] = 255
        pictures.append(draw.Picture(f"{name}: {title}" if name else title, seen))
    what = "An image under its grid of tokens, kept ones in colour, the others faded to grey"
    return draw.show_rows(what, pictures, widest=5.0 if len(named) == 1 else 3.2)


def _kept_in_words(image: Tensor, sample: Sample, index: int) -> str:
    if not 0 <= index < len(sample.keep):
        raise ValueError(f"index={index}: the sample is one of {plural(len(sample.keep), 'image')}")
    own_grid = token_grid(*draw.image_size(image))
    kept = sample.mask()[index].flatten()
    own = int(kept[padded_places(own_grid, sample.grid, kept.device)].sum())
    total = math.prod(own_grid)
    padding = len(sample.keep[index]) - own
    text = f"{own} of {total} tokens ({own / total:.2f})"
    return f"{text} + {padding} of padding" if padding else text


def show_bitmaps(bitmaps: Mapping[str, Any]) -> NotebookFigure:
    """Bitmaps in a row under their titles, every cell a sharp square: 1 is blue, 0 is light grey.

    bitmaps: title -> (H, W) array or tensor of bool or 0/1. Raises ValueError when there are none.
    """
    pictures = []
    for title, bitmap in bitmaps.items():
        plane = np.asarray(bitmap, bool)
        pixels = np.where(plane[..., None], _ink(BLUE), np.array(draw.UNSAMPLED, np.uint8))
        pictures.append(draw.Picture(f"{title}: {plane.mean():.0%} covered", pixels))
    return draw.show_rows("Bitmaps", pictures, len(pictures), widest=2.2, sharp=True)


def padding_factor(batches: Sequence[Sequence[draw.Size]]) -> float:
    """Tokens computed / tokens of the images themselves, when each batch is padded to one size.

    batches: (height, width) of the images of every batch.
    """
    computed = sum(len(batch) * math.prod(token_grid(*_canvas(batch))) for batch in batches)
    return computed / sum(math.prod(token_grid(*size)) for batch in batches for size in batch)


def show_batches(ways: Mapping[str, Sequence[Sequence[draw.Size]]]) -> NotebookFigure:
    """Batches of images on their common canvas: a row per way to group, blue image, orange padding.

    ways: title -> batches, each the (height, width) of its images. All are drawn to one scale.
    Raises ValueError when there are none.
    """
    rows = {}
    for name, batches in ways.items():
        groups = [
            draw.beside([_tile(size, _canvas(batch)) for size in batch], 5) for batch in batches
        ]
        rows[f"{name}: {padding_factor(batches):.2f} x"] = draw.beside(groups, 28)
    widest = max([row.shape[1] for row in rows.values()], default=0)
    pictures = [
        draw.Picture(
            title, np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0)), constant_values=255)
        )
        for title, row in rows.items()
    ]
    what = "Images of batches on their padded canvas, and tokens computed per token of an image"
    return draw.show_rows(what, pictures, columns=1, widest=WIDTH, sharp=True)


def _tile(size: draw.Size, canvas: draw.Size) -> draw.Pixels:
    """An image of `size` on its canvas, both (height, width), at an eighth of the scale."""
    pixels = np.full((canvas[0] // 8, canvas[1] // 8, 3), _ink(ORANGE))
    pixels[: size[0] // 8, : size[1] // 8] = _ink(BLUE)
    return pixels


def _ink(colour: str) -> draw.Pixels:
    return np.array(ImageColor.getrgb(colour), np.uint8)


def _canvas(batch: Sequence[draw.Size]) -> draw.Size:
    """(height, width) that every image of the batch is padded to."""
    return padded_size(max(h for h, _ in batch), max(w for _, w in batch))
