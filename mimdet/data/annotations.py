"""One COCO annotation: checked once, then turned into a training target or back into ground truth.

`parse_annotation` is the only reader of raw annotation dictionaries. Its result is the form in
which the Arrow table stores them and in which hub tables are brought.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from mimdet.data.rasters import crops_from_segmentations
from mimdet.structures import Target

Box = tuple[float, float, float, float]


class Annotation(TypedDict):
    """A checked annotation. Polygons and run lengths are two fields: Arrow refuses mixed ones."""

    source_id: str
    """The file's own id, for messages."""
    category_id: int
    bbox: list[float]
    """x, y, width, height in pixels, as the file has it."""
    area: float
    iscrowd: bool
    polygons: list[list[float]] | None
    """Flat lists x0, y0, x1, y1, ...; None where the mask is stored as runs or missing."""
    runs: str | None
    """Compressed run lengths of the whole image."""
    usable: bool
    """Trainable: no crowd, a box inside the image, no empty mask."""


def parse_annotation(raw: Any, where: str, height: int, width: int) -> Annotation:
    """Check one COCO annotation of an image of height x width pixels.

    where: the file's name. A missing `area` is computed, a missing `iscrowd` is 0; uncompressed run
    lengths are compressed. A box or mask that is only empty makes the annotation unusable. Raises
    ValueError naming file and annotation where it cannot be understood.
    """
    source_id = str(raw.get("id", "without id")) if isinstance(raw, dict) else repr(raw)[:40]
    try:
        polygons, runs = _segmentation(raw.get("segmentation"), height, width)
        bbox = [float(value) for value in raw["bbox"]]
        if len(bbox) != 4 or not all(math.isfinite(value) for value in bbox):
            raise ValueError(f"bbox {raw['bbox']} is not four finite numbers x, y, width, height")
        area = raw.get("area")
        annotation = Annotation(
            source_id=source_id,
            category_id=int(raw["category_id"]),
            bbox=bbox,
            area=_area(bbox, polygons, runs, height, width) if area is None else float(area),
            iscrowd=bool(raw.get("iscrowd", 0)),
            polygons=polygons,
            runs=runs,
            usable=False,
        )
    except KeyError as error:
        raise ValueError(
            f"{where}: annotation {source_id} has no {error}: not a COCO instances file? "
            "`mimdet check-data` lists every such annotation"
        ) from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{where}: annotation {source_id}: {error}; correct it or remove it, "
            "`mimdet check-data` lists every such annotation"
        ) from error
    annotation["usable"] = _usable(annotation, height, width)
    return annotation


def has_mask(annotation: Annotation) -> bool:
    return annotation["polygons"] is not None or annotation["runs"] is not None


def clipped_box(bbox: Sequence[float], height: int, width: int) -> Box:
    """x, y, width, height -> x1, y1, x2, y2 inside the image; empty where x2 <= x1 or y2 <= y1."""
    x, y, w, h = bbox
    return max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))


def make_target(
    annotations: Iterable[Annotation],
    height: int,
    width: int,
    label_of: dict[int, int],
    masks: bool,
    where: str,
) -> Target:
    """The trainable annotations of one image as tensors.

    label_of: COCO category id -> 0..num_classes-1. masks: whether to make `Target.masks`.
    """
    usable = [annotation for annotation in annotations if annotation["usable"]]
    boxes = [clipped_box(annotation["bbox"], height, width) for annotation in usable]
    labels = [label_of[annotation["category_id"]] for annotation in usable]
    crops = None
    if masks:
        shapes = [coco_segmentation(annotation, height, width) for annotation in usable]
        try:
            crops = crops_from_segmentations(shapes, height, width)
        except ValueError as error:
            ids = ", ".join(annotation["source_id"] for annotation in usable)
            raise ValueError(
                f"{where}: one of the annotations {ids}: {error}; run `mimdet check-data`"
            ) from error
    return Target(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        crops,
    )


def coco_segmentation(annotation: Annotation, height: int, width: int) -> Any:
    """Polygons, or {"size", "counts"}, or None: as COCO files and pycocotools have it."""
    if annotation["runs"] is not None:
        return {"size": [height, width], "counts": annotation["runs"]}
    return annotation["polygons"]


def coco_ground_truth(
    images: Iterable[tuple[dict[str, Any], Sequence[Annotation]]], categories: list[dict[str, Any]]
) -> dict[str, Any]:
    """A COCO dictionary for evaluation: crowds included, annotation ids renumbered from 1.

    images: pairs of a COCO image entry (id, height, width, file_name) and its annotations.
    Ids are renumbered because pycocotools takes a match with annotation 0 for no match. A crowd
    without a mask gets its box as one: detections there are left out, as they are of boxes.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, rows in images:
        entries.append(image)
        for row in rows:
            item = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": row["category_id"],
                "bbox": list(row["bbox"]),
                "area": row["area"],
                "iscrowd": int(row["iscrowd"]),
            }
            if has_mask(row):
                item["segmentation"] = coco_segmentation(row, image["height"], image["width"])
            elif row["iscrowd"]:
                x, y, w, h = row["bbox"]
                item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(item)
    head: dict[str, Any] = {"info": {}, "licenses": []}
    return head | {"images": entries, "annotations": annotations, "categories": categories}


def _segmentation(raw: Any, height: int, width: int) -> tuple[list[list[float]] | None, str | None]:
    """-> (polygons or None, compressed runs or None)."""
    if not raw:
        return None, None
    if not isinstance(raw, dict):
        polygons = [[float(value) for value in flat] for flat in raw]
        if any(len(flat) % 2 for flat in polygons):
            raise ValueError("a polygon has an odd number of coordinates")
        if not all(math.isfinite(value) for flat in polygons for value in flat):
            raise ValueError("a polygon has a coordinate that is not a finite number")
        return polygons, None
    if list(raw["size"]) != [height, width]:
        raise ValueError(
            f"its run lengths are for {list(raw['size'])} pixels, the image has {[height, width]}"
        )
    counts = raw["counts"]
    if isinstance(counts, str):
        return None, counts
    if sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"its runs cover {sum(counts)} of {height * width} pixels")
    from pycocotools import mask as coco_mask

    packed = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return None, packed["counts"].decode("ascii")


def _area(
    bbox: list[float], polygons: list[list[float]] | None, runs: str | None, height: int, width: int
) -> float:
    """Pixels of the mask, or of the box where there is no mask."""
    from pycocotools import mask as coco_mask

    if runs is not None:
        return float(coco_mask.area({"size": [height, width], "counts": runs.encode()}))
    rings = [flat for flat in polygons or [] if len(flat) >= 6]
    if rings:
        return float(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(rings, height, width))))
    return max(bbox[2], 0.0) * max(bbox[3], 0.0)


def _usable(annotation: Annotation, height: int, width: int) -> bool:
    x1, y1, x2, y2 = clipped_box(annotation["bbox"], height, width)
    if annotation["iscrowd"] or x2 <= x1 or y2 <= y1:
        return False
    if annotation["runs"] is not None:
        return _area(annotation["bbox"], None, annotation["runs"], height, width) > 0
    if annotation["polygons"] is None:
        return True
    rings = [flat for flat in annotation["polygons"] if len(flat) >= 6]
    if not rings:
        return False
    corners = np.concatenate([np.asarray(flat) for flat in rings]).reshape(-1, 2)
    return bool((corners.max(0) > corners.min(0)).all())
