"""Errors as pictures: what the detector said, next to the truth, cut out of the image."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mimdet.analysis.error_overlaps import as_rle
from mimdet.analysis.errors import DetectionError
from mimdet.data.loader import Dataset
from mimdet.data.rasters import crops_from_segmentations
from mimdet.structures import Crops, Record, Target
from mimdet.viz.panels import class_colour, draw_image, draw_target, image_panels, score_text
from mimdet.viz.style import INK, SMALL, NotebookFigure

Window = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels, right and bottom exclusive."""

CONTEXT = 1.8
"""Side of a cut-out, in long sides of what it is about."""
SMALLEST = 32
"""Pixels of the smallest cut-out: fewer show nothing of the surroundings."""


def show_error_gallery(
    errors: Sequence[DetectionError], dataset: Dataset, columns: int = 6
) -> NotebookFigure:
    """For each error what the detector said (left) and all true objects around it (right).

    errors: of `ErrorReport.errors`, as `report.errors("background")[:12]`; dataset: the images they
    were made on; columns: panels in a row, two for each error. Among the true objects the dashed
    box is the detection's, the thick one that of the object it concerns; a missed object's place is
    dashed on the left. Raises ValueError when there are no errors, or an image is not in the data
    set.
    """
    if not errors:
        raise ValueError("no errors to show: this type has none, or the list was cut to nothing")
    places = {dataset.image_id(index): index for index in range(len(dataset))}
    unknown = [error.image_id for error in errors if error.image_id not in places]
    if unknown:
        raise ValueError(
            f"image {unknown[0]!r} is not in the data set {dataset.version}: give the one that the "
            "results were made on"
        )
    records = [dataset[places[error.image_id]] for error in errors]
    windows = [_window(e, r.image.shape[1:]) for e, r in zip(errors, records, strict=True)]
    sizes = [(y1 - y0, x1 - x0) for x0, y0, x1, y1 in windows for _ in range(2)]
    fig, axes = image_panels(sizes, columns, group=2)
    pairs = zip(axes[::2], axes[1::2], strict=True)
    for error, record, window, (said, truth) in zip(errors, records, windows, pairs, strict=True):
        x0, y0, x1, y1 = window
        pixels = record.image[:, y0:y1, x0:x1]
        draw_image(said, pixels, _said(error))
        draw_image(truth, pixels, _truth(error))
        _draw_detection(said, error, window, dataset, record)
        _draw_truth(truth, error, window, dataset, record)
    kinds = sorted({error.kind for error in errors})
    said_of_first = f"{_said(errors[0])} in image {errors[0].image_id}, {_truth(errors[0])}"
    fig.alt_text = (
        f"{len(errors)} cut-outs of images with errors of type {', '.join(kinds)}: the detection "
        f"on the left, the true objects on the right. The first: {said_of_first}."
    )
    return fig


def _said(error: DetectionError) -> str:
    return (
        "nothing points to it"
        if error.result is None
        else f"{error.said} {score_text(error.score)}"
    )


def _truth(error: DetectionError) -> str:
    if error.kind == "missed":
        return f"truth: {error.true}"
    overlap = f"IoU {score_text(error.iou)}"
    if error.kind == "background":
        return f"no object, {overlap}" if error.iou > 0 else "no object"
    return f"found before, {overlap}" if error.kind == "duplicate" else f"{error.true}, {overlap}"


def _draw_detection(
    ax: Axes, error: DetectionError, window: Window, dataset: Dataset, record: Record
) -> None:
    """Its mask and box in the colour of its class, or the place of a missed object, and the image's
    id in a corner."""
    height, width = record.image.shape[1:]
    if error.result is not None:
        box = torch.tensor([_box(error.result, height, width)], dtype=torch.float32)
        label = dataset.category_ids.index(error.result["category_id"])
        masks = _mask(error.result, height, width)
        found = Target(box, torch.tensor([label]), masks)
        draw_target(ax, _shifted(found, window), _size(window), [""])  # the title names it
    elif error.truth is not None:
        _draw_dashed(ax, error.truth, (height, width), window)
    ax.text(
        0.02,
        0.02,
        f"image {error.image_id}",
        transform=ax.transAxes,
        fontsize=SMALL,
        color=INK,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.5},
        zorder=6,
    )


def _draw_truth(
    ax: Axes, error: DetectionError, window: Window, dataset: Dataset, record: Record
) -> None:
    """The true objects in the window: thick the one it is about, dashed the detection."""
    x0, y0, x1, y1 = window
    target, boxes = record.target, record.target.boxes
    seen = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    masks = None if target.masks is None else target.masks[seen]
    around = Target(boxes[seen], target.labels[seen], masks)
    draw_target(ax, _shifted(around, window), _size(window), dataset.categories)
    size = record.image.shape[1:]
    if error.truth is not None:
        label = dataset.category_ids.index(error.truth["category_id"])
        outline = _outline(error.truth, size, window)
        outline.set(edgecolor=class_colour(label), linewidth=2.2)
        ax.add_patch(outline)
    if error.result is not None:
        _draw_dashed(ax, error.result, size, window)


def _draw_dashed(
    ax: Axes, entry: dict[str, Any], image_size: Sequence[int], window: Window
) -> None:
    """The box of a result or annotation, black and white so that it is seen on any image."""
    solid, dashed = (_outline(entry, image_size, window) for _ in range(2))
    solid.set_edgecolor("black")
    dashed.set_edgecolor("white")
    dashed.set_linestyle((0, (3, 3)))
    ax.add_patch(solid)
    ax.add_patch(dashed)


def _outline(entry: dict[str, Any], image_size: Sequence[int], window: Window) -> Rectangle:
    left, top, right, bottom = _box(entry, *image_size)
    corner = (left - window[0], top - window[1])
    return Rectangle(corner, right - left, bottom - top, fill=False, linewidth=1.0)


def _window(error: DetectionError, image_size: Sequence[int]) -> Window:
    """The square around the detection and the object it concerns, moved into the image; the whole
    of a side that is shorter."""
    height, width = image_size
    entries = [entry for entry in (error.result, error.truth) if entry is not None]
    boxes = torch.tensor([_box(entry, height, width) for entry in entries])
    low, high = boxes[:, :2].min(0).values, boxes[:, 2:].max(0).values
    side = max(SMALLEST, round(CONTEXT * float((high - low).max())))
    spans = []
    for centre, pixels in zip(((low + high) / 2).tolist(), (width, height), strict=True):
        start = min(max(0, round(centre - side / 2)), max(0, pixels - side))
        spans.append((start, min(pixels, start + side)))
    (x0, x1), (y0, y1) = spans
    return x0, y0, x1, y1


def _box(entry: dict[str, Any], height: int, width: int) -> list[float]:
    """xyxy of a COCO result or annotation; without a bbox, that of its mask."""
    if entry.get("bbox") is not None:
        x, y, w, h = entry["bbox"]
    else:
        from pycocotools import mask as coco_mask

        x, y, w, h = coco_mask.toBbox(as_rle(entry["segmentation"], height, width)).tolist()
    return [x, y, x + w, y + h]


def _mask(result: dict[str, Any], height: int, width: int) -> Crops | None:
    """None for results of boxes, and for an empty mask."""
    from pycocotools import mask as coco_mask

    rle = result.get("segmentation")
    if rle is None or not coco_mask.area(as_rle(rle, height, width)):
        return None
    return crops_from_segmentations([rle], height, width)


def _shifted(target: Target, window: Window) -> Target:
    """The target in the pixels of a window of its image."""
    corner = torch.tensor([window[0], window[1]] * 2)
    masks = target.masks
    if masks is not None:
        masks = Crops(masks.boxes - corner, masks.bitmaps)
    return Target(target.boxes - corner, target.labels, masks)


def _size(window: Window) -> tuple[int, int]:
    return window[3] - window[1], window[2] - window[0]
