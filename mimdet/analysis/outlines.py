"""Detections as complete COCO annotations, with outlines, which annotation tools read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mimdet.analysis.evaluate import results_for
from mimdet.data.annotations import ring_area
from mimdet.structures import Detections


def coco_annotations(
    found: Detections, image_id: int | str, category_ids: Sequence[int], first: int = 1
) -> list[dict[str, Any]]:
    """What was found in an image as COCO annotations, with ids from `first` on, and their score.

    category_ids: COCO id of each label. Without masks the segmentation is empty.
    """
    annotations = results_for(found, image_id, category_ids, has_masks=False)
    outlines: list[Any] = [[]] * len(found)
    if found.mask_probabilities is not None:
        outlines = mask_outlines(found.mask_probabilities, found.boxes, found.image_size)
    for number, (entry, outline) in enumerate(zip(annotations, outlines, strict=True), first):
        area = sum(map(ring_area, outline)) or entry["bbox"][2] * entry["bbox"][3]
        entry |= {"id": number, "segmentation": outline, "area": round(area, 2), "iscrowd": 0}
    return annotations


def mask_outlines(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Any]:
    """COCO polygons of N masks, without their holes: where the probabilities between the cells are
    a half, which is the border of `paste`. Of an empty mask the outline is that of its box.

    probabilities: (N, M, M') float in 0..1; boxes: (N, 4) xyxy pixels; size: height and width.
    """
    from contourpy import contour_generator  # here, as `mimdet --help` draws nothing

    found: list[Any] = []
    rows, columns = probabilities.shape[1:]
    for cells, (x0, y0, x1, y1) in zip(probabilities.cpu().numpy(), boxes.tolist(), strict=True):
        polygons = []
        rings: Any = contour_generator(z=np.pad(cells, 1)).lines(0.5)
        for ring in rings:  # (P, 2), its end its beginning; cell 0 is at 1, 1
            x = (x0 + (ring[:-1, 0] - 0.5) * (x1 - x0) / columns).clip(0, size[1])
            y = (y0 + (ring[:-1, 1] - 0.5) * (y1 - y0) / rows).clip(0, size[0])
            if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 2:  # negative around a hole
                polygons.append(np.stack([x, y], 1).round(2).flatten().tolist())
        found.append(polygons or [[x0, y0, x1, y0, x1, y1, x0, y1]])
    return found
