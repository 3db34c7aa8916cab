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

from mimdet.structures import Crops, rle_to_bitmap

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

    Raises ValueError, naming the object by its index, when nothing of an object is left or its
    segmentation is malformed.
    """
    boxes = np.zeros((len(segmentations), 4))
    bitmaps = np.zeros((len(segmentations), SIDE, SIDE), dtype=np.uint8)
    for i, segmentation in enumerate(segmentations):
        try:
            if isinstance(segmentation, dict):
                boxes[i], bitmaps[i] = _from_run_lengths(segmentation, height, width)
            else:
                boxes[i], bitmaps[i] = _from_polygons(segmentation)
        except (ValueError, TypeError) as error:
            raise ValueError(f"segmentation of object {i}: {error}") from error
    return Crops(_with_ring(boxes, SIDE), torch.from_numpy(bitmaps))


def full_bitmap(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """(height, width): the pixels of polygons or run lengths, as COCO's own tools draw them.

    segmentation: as `crops_from_segmentations` takes it, of one object.
    """
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        return rle_to_bitmap(segmentation)
    rings = coco_mask.frPyObjects(segmentation, height, width)
    return rle_to_bitmap(coco_mask.merge(rings))


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
    from pycocotools import mask as coco_mask

    points = [np.asarray(flat, dtype=np.float64) for flat in polygons if len(flat) >= 6]
    if not points:
        raise ValueError("no polygon of 3 or more points; remove the annotation or redraw it")
    if any(len(flat) % 2 for flat in points):
        raise ValueError("a polygon with an odd number of coordinates; give x0, y0, x1, y1, ...")
    corners = np.concatenate(points).reshape(-1, 2)
    low, high = corners.min(0), corners.max(0)
    if not np.isfinite(corners).all() or (high <= low).any():
        raise ValueError("its polygons enclose nothing; remove the annotation or redraw it")
    scale = (SIDE - 2) / (high - low)
    scaled = [((flat.reshape(-1, 2) - low) * scale + 1).ravel().tolist() for flat in points]
    runs = coco_mask.merge(coco_mask.frPyObjects(scaled, SIDE, SIDE))
    bitmap = coco_mask.decode(runs)
    if not bitmap.any():
        cells = ((corners - low) * scale + 1).clip(1, SIDE - 2).astype(np.intp)
        bitmap[cells[:, 1], cells[:, 0]] = 1
    return np.concatenate([low, high]), bitmap


def _from_run_lengths(
    runs: dict[str, Any], height: int, width: int
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """-> (the extent of the pixels that are set xyxy, bitmap (SIDE, SIDE))."""
    from pycocotools import mask as coco_mask

    if "size" not in runs or "counts" not in runs:
        raise ValueError(f"run lengths need 'size' and 'counts'; it has {sorted(runs)}")
    if list(runs["size"]) != [height, width]:
        raise ValueError(f"run lengths of size {runs['size']} in an image of {[height, width]}")
    if isinstance(runs["counts"], (list, tuple, np.ndarray)):
        counts = [int(count) for count in runs["counts"]]
        if sum(counts) != height * width or min(counts) < 0:
            raise ValueError(f"its runs cover {sum(counts)} pixels of {height * width}")
        runs = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    mask = coco_mask.decode(runs)
    if not mask.any():
        raise ValueError("its mask is empty; remove the annotation or redraw it")
    box = np.array(extent(mask), dtype=np.float64)
    return box, crops_from_bitmaps(mask[None], box[None]).bitmaps[0].numpy()
