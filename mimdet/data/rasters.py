"""Instance masks as box-local bitmaps: rasterised once, when a record is read.

Whatever a data set stores (full bitmaps, polygons, run lengths), an object's mask becomes a small
square bitmap over its own box. The outermost ring of cells is empty: 110 x 110 cells cover the
object from edge to edge and one more cell on each side is 0, so that sampling which clamps to the
border (roi_align) reads background outside the object, never its last row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mimdet.structures import Crops, as_rle, rle_to_bitmap

SIDE = 112
"""Cells along a side of a bitmap, the empty ring included."""


def crops_from_bitmaps(masks: NDArray[Any], boxes: NDArray[Any], side: int = SIDE) -> Crops:
    """Cut full-size masks down to their boxes, by nearest sampling.

    masks: (N, H, W) bool or 0/1; boxes: (N, 4) xyxy pixels, right and bottom edges exclusive, not
    empty. Whatever lies outside its box is lost. Returns N crops of side x side cells.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    inner = side - 2
    bitmaps = np.zeros((len(boxes), side, side), dtype=np.uint8)
    if len(boxes):
        height, width = masks.shape[1:]
        centres = (np.arange(inner) + 0.5) / inner
        columns = boxes[:, :1] + (boxes[:, 2:3] - boxes[:, :1]) * centres  # (N, inner)
        rows = boxes[:, 1:2] + (boxes[:, 3:4] - boxes[:, 1:2]) * centres  # (N, inner)
        columns = np.clip(columns, 0, width - 1).astype(np.intp)
        rows = np.clip(rows, 0, height - 1).astype(np.intp)
        for i, mask in enumerate(masks):
            bitmaps[i, 1:-1, 1:-1] = mask[rows[i]][:, columns[i]]
    return Crops(_with_ring(boxes, side), torch.from_numpy(bitmaps))


def crops_from_segmentations(segmentations: Sequence[Any], height: int, width: int) -> Crops:
    """Rasterise COCO segmentations box-local.

    segmentations: one per object, in the pixels of an image of height x width; either polygons
    (list of flat lists x0, y0, x1, y1, ...; united; those of fewer than 3 points are skipped) or
    run lengths ({"size": [height, width], "counts": list, str or bytes}). Polygons may leave the
    image. No bitmap is ever empty: of a sliver thinner than a cell the corners are kept.
    Returns N crops of 112 x 112 cells.

    Raises ValueError when nothing of an object is left.
    """
    boxes = np.zeros((len(segmentations), 4))
    bitmaps = np.zeros((len(segmentations), SIDE, SIDE), dtype=np.uint8)
    for i, segmentation in enumerate(segmentations):
        if isinstance(segmentation, dict):
            mask = full_bitmap(segmentation, height, width)
            if not mask.any():
                raise ValueError(f"the mask of object {i} is empty: remove it or redraw it")
            boxes[i] = extent(mask)
            bitmaps[i] = crops_from_bitmaps(mask[None], boxes[i]).bitmaps[0].numpy()
        else:
            boxes[i], bitmaps[i] = _from_polygons(segmentation)
    return Crops(_with_ring(boxes, SIDE), torch.from_numpy(bitmaps))


def full_bitmap(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """(height, width): the pixels of polygons or run lengths, as COCO's own tools draw them.

    segmentation: as `crops_from_segmentations` takes it, of one object.
    """
    return rle_to_bitmap(as_rle(segmentation, height, width))


def extent(mask: NDArray[Any]) -> tuple[int, int, int, int]:
    """xyxy of the pixels that are set, right and bottom exclusive; mask: (H, W), not empty."""
    columns = np.flatnonzero(mask.any(0))
    rows = np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _with_ring(boxes: NDArray[np.float64], side: int) -> torch.Tensor:
    """Grow object boxes (N, 4) by the one cell on each side that the empty ring takes."""
    cell = (boxes[:, 2:] - boxes[:, :2]) / (side - 2)
    grown = np.concatenate([boxes[:, :2] - cell, boxes[:, 2:] + cell], axis=1)
    return torch.from_numpy(grown.astype(np.float32))


def _from_polygons(polygons: Any) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """-> (the extent of the polygons xyxy, bitmap (SIDE, SIDE))."""
    parts = [np.asarray(flat, dtype=np.float64) for flat in polygons if len(flat) >= 6]
    corners = np.concatenate([*parts, np.zeros(0)]).reshape(-1, 2)
    if not len(corners) or (np.ptp(corners, axis=0) <= 0).any():
        raise ValueError("polygons that enclose nothing: remove the annotation or redraw it")
    low, high = corners.min(0), corners.max(0)
    scale = (SIDE - 2) / (high - low)
    scaled = [((flat.reshape(-1, 2) - low) * scale + 1).ravel().tolist() for flat in parts]
    bitmap = full_bitmap(scaled, SIDE, SIDE).astype(np.uint8)
    if not bitmap.any():
        cells = ((corners - low) * scale + 1).clip(1, SIDE - 2).astype(np.intp)
        bitmap[cells[:, 1], cells[:, 0]] = 1
    return np.concatenate([low, high]), bitmap
