"""A COCO json -> a Hugging Face `datasets` table, built once and memory-mapped ever after.

One row an image, its annotations inside. The table lies in the cache folder under the sha256 of
the json, so that an edited file is read anew, every process and loader worker maps the same pages,
and training on 118,000 images neither parses 450 MB of json nor grows in memory.
"""

import hashlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mimdet.data.annotations import Annotation, has_mask, parse_annotation

if TYPE_CHECKING:
    from datasets import Dataset as Table

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
