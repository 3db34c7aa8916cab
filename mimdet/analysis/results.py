"""Detections -> COCO results, and results -> a file that pycocotools reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mimdet.files import write_json
from mimdet.masks import probabilities_to_rle
from mimdet.structures import Detections


def results_for(
    detections: Detections,
    image_id: int | str,
    category_ids: Sequence[int | None],
    has_masks: bool,
) -> list[dict[str, Any]]:
    """COCO results of one image: image_id, category_id, bbox (x, y, width, height) and score as
    plain floats, and with `has_masks` the pasted mask as compressed RLE under `segmentation`.

    category_ids: COCO id of each label; detections whose label has None are left out. Boxes and
    masks are in pixels of `detections.image_size`, which must be the size of the image file.
    Raises ValueError when masks are wanted of detections that have none.
    """
    known = [category_ids[label] is not None for label in detections.labels.tolist()]
    detections = detections[torch.tensor(known, dtype=torch.bool, device=detections.labels.device)]
    boxes = detections.boxes.float().cpu()
    xywh = boxes.clone()
    xywh[:, 2:] -= boxes[:, :2]
    labels, scores = detections.labels.tolist(), detections.scores.tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": bbox, "score": score}
        for label, score, bbox in zip(labels, scores, xywh.tolist(), strict=True)
    ]
    if not has_masks:
        return results
    if detections.mask_probabilities is None:
        raise ValueError(
            f"image {image_id!r}: the detections have no masks; use has_masks=False or a detector "
            "with a mask head"
        )
    height, width = detections.image_size
    rles = probabilities_to_rle(detections.mask_probabilities, boxes, height, width)
    return [result | {"segmentation": rle} for result, rle in zip(results, rles, strict=True)]


def save_results(results: list[dict[str, Any]], path: str | Path) -> None:
    """Write a COCO results file: complete or, if interrupted, as it was before."""
    write_json(path, results, indent=None)
