"""A COCO json -> a Hugging Face `datasets` table, built once and memory-mapped ever after.

One row an image, its annotations inside. The table lies in the cache folder under the sha256 of
the json, so that an edited file is read anew, every process and loader worker maps the same pages,
and training on 118,000 images neither parses 450 MB of json nor grows in memory.
"""

import hashlib
import json
import math
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch

from mimdet.data.rasters import crops_from_segmentations
from mimdet.structures import Target

if TYPE_CHECKING:
    from datasets import Dataset as Table


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


FORMAT = 1
"""Part of the cache's file name; raised when the columns or the meaning of `usable` change."""


class CocoTable(NamedTuple):
    digest: str
    """sha256 of the json file."""
    rows: "Table"
    """Columns image_id (json text: ids may be numbers or strings), file_name, height, width, usable
    (number of trainable annotations) and annotations (see `Annotation`)."""
    categories: list[dict[str, Any]]
    """id, name, supercategory; sorted by id."""
    without_mask: list[str]
    """Ids of non-crowd annotations that have no segmentation (at most 5)."""
    with_mask: bool
    """Whether any non-crowd annotation has one."""
    unusable: list[str]
    """Ids of non-crowd annotations with an empty box or mask (at most 5)."""


def cache_folder() -> Path:
    """$MIMDET_CACHE, or `.cache/mimdet` in the home folder."""
    return Path(os.environ.get("MIMDET_CACHE") or Path.home() / ".cache" / "mimdet")


def coco_table(json_path: str | Path) -> CocoTable:
    """Read a COCO instances file through the cache.

    Raises FileNotFoundError, and ValueError naming file, entry and remedy where it is not COCO.
    """
    from datasets import Dataset as Table

    path = Path(json_path)
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist; check the path")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cached = cache_folder() / f"coco-{FORMAT}-{digest}.arrow"
    if not cached.exists():
        _build(path, cached)
    rows = Table.from_file(str(cached))
    return CocoTable(digest, rows, **_stored_head(cached))


def _stored_head(cached: Path) -> dict[str, Any]:
    """What `_build` put into the Arrow schema (`datasets` reads only its own part of it)."""
    import pyarrow as pa

    with pa.memory_map(str(cached)) as file, pa.ipc.open_stream(file) as reader:
        return json.loads(reader.schema.metadata[b"mimdet"])


def _build(path: Path, cached: Path) -> None:
    """Write the table beside its place and rename it: there is never a partial one to be found."""
    import pyarrow as pa

    content = _parse(path)
    rows = list(_rows(content, path))
    schema = _schema().with_metadata({"mimdet": json.dumps(_head(content, rows))})
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f"{cached.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for start in range(0, len(rows), 1000):
                    some = rows[start : start + 1000]
                    writer.write_batch(pa.RecordBatch.from_pylist(some, schema=schema))
            file.flush()
            os.fsync(file.fileno())
        if not cached.exists():  # another process may have been faster; its content is the same
            os.replace(partial, cached)
    finally:
        partial.unlink(missing_ok=True)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # not json, or not text at all
        raise ValueError(f"{path} is not a json file ({error}); was it cut off?") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(
                f"{path} is not a COCO instances file: it has no list {key!r}; it needs "
                "'images', 'annotations' and 'categories'"
            )
    if not content["categories"]:
        raise ValueError(f"{path} has no categories; list at least one with id and name")
    return content


def _rows(content: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    known = _category_ids(content, path)
    by_image: dict[Any, list[Any]] = defaultdict(list)
    for raw in content["annotations"]:
        image_id = _field(raw, "image_id", path, "annotation")
        by_image[image_id if isinstance(image_id, (int, str)) else str(image_id)].append(raw)
    for image in content["images"]:
        image_id = _field(image, "id", path, "image")
        if not isinstance(image_id, (int, str)):
            raise ValueError(f"{path}: image id {image_id!r} is neither a number nor a string")
        if image_id in by_image and by_image[image_id] is None:
            raise ValueError(f"{path}: image id {image_id!r} occurs twice; make image ids unique")
        size = [_field(image, key, path, "image") for key in ("height", "width")]
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(
                f"{path}: image {image_id!r} has height, width {size}; give positive whole pixels"
            )
        annotations = [parse_annotation(raw, str(path), *size) for raw in by_image[image_id]]
        by_image[image_id] = None  # type: ignore[assignment]  # seen
        for annotation in annotations:
            if annotation["category_id"] not in known:
                raise ValueError(
                    f"{path}: annotation {annotation['source_id']} has category_id "
                    f"{annotation['category_id']}, which is not among the categories"
                )
        yield {
            "image_id": json.dumps(image_id),
            "file_name": str(_field(image, "file_name", path, "image")),
            "height": size[0],
            "width": size[1],
            "usable": sum(annotation["usable"] for annotation in annotations),
            "annotations": annotations,
        }
    orphans = [raw for raws in by_image.values() if raws is not None for raw in raws]
    if orphans:
        raise ValueError(
            f"{path}: annotation {orphans[0].get('id')} belongs to image "
            f"{orphans[0]['image_id']!r}, which is not in the file ({len(orphans)} such "
            "annotations); remove them, `mimdet check-data` lists all"
        )


def _category_ids(content: dict[str, Any], path: Path) -> set[int]:
    ids = [_field(category, "id", path, "category") for category in content["categories"]]
    if not all(isinstance(number, int) for number in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{path}: category ids {ids[:20]}; make them whole numbers, each once")
    return set(ids)


def _head(content: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What holds for the whole table; stored in the Arrow schema."""
    objects: list[Annotation] = [
        annotation for row in rows for annotation in row["annotations"] if not annotation["iscrowd"]
    ]
    categories = [
        {
            "id": category["id"],
            "name": str(category.get("name", category["id"])),
            "supercategory": str(category.get("supercategory", "")),
        }
        for category in content["categories"]
    ]
    without = [annotation["source_id"] for annotation in objects if not has_mask(annotation)]
    unusable = [annotation["source_id"] for annotation in objects if not annotation["usable"]]
    return {
        "categories": sorted(categories, key=lambda category: category["id"]),
        "without_mask": without[:5],
        "with_mask": len(without) < len(objects),
        "unusable": unusable[:5],
    }


def _field(entry: Any, key: str, path: Path, kind: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise ValueError(
            f"{path}: {kind} {str(entry)[:80]} has no {key!r}; a COCO instances file needs it"
        )
    return entry[key]


def _schema() -> Any:
    import pyarrow as pa

    annotation = pa.struct(
        {
            "source_id": pa.string(),
            "category_id": pa.int64(),
            "bbox": pa.list_(pa.float64()),
            "area": pa.float64(),
            "iscrowd": pa.bool_(),
            "polygons": pa.list_(pa.list_(pa.float64())),
            "runs": pa.string(),
            "usable": pa.bool_(),
        }
    )
    return pa.schema(
        {
            "image_id": pa.string(),
            "file_name": pa.string(),
            "height": pa.int32(),
            "width": pa.int32(),
            "usable": pa.int32(),
            "annotations": pa.list_(annotation),
        }
    )
