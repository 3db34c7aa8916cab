"""COCO-format data as records, and the one function that opens whatever a config names.

A json is read once into a Hugging Face `datasets` table, one row an image with its annotations
inside. The table lies in the cache folder under the sha256 of the json, so that an edited file is
read anew, every process and loader worker maps the same pages, and training on 118,000 images
neither parses 450 MB of json nor grows in memory.
"""

import hashlib
import json
import os
import pkgutil
import uuid
import warnings
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from mimdet.config import DataConfig
from mimdet.data.coco_file import (
    Annotation,
    CocoReader,
    Read,
    coco_ground_truth,
    has_mask,
    make_target,
)
from mimdet.images import read_image
from mimdet.structures import Record

if TYPE_CHECKING:
    from datasets import Dataset as Table

    from mimdet.data.loader import Dataset


FORMAT = 3
"""Part of the cache's file name; raised when the columns or the meaning of `usable` change."""


def cache_folder() -> Path:
    """$MIMDET_CACHE, or `.cache/mimdet` in the home folder."""
    return Path(os.environ.get("MIMDET_CACHE") or Path.home() / ".cache" / "mimdet")


def coco_table(json_path: Path) -> tuple["Table", dict[str, Any]]:
    """A COCO instances file, read through the cache -> (rows, what holds for the whole file).

    Columns: image_id (json text: ids may be numbers or strings), file_name, height, width, usable
    (number of trainable annotations) and annotations (see `Annotation`). For the whole: sha256,
    categories [(id, name), ...] sorted by id, with_mask (whether any single object has one), and
    the ids of at most 5 single objects each that are without_mask and unusable.

    Raises FileNotFoundError, and ValueError naming file, entry and field where it is not COCO.
    """
    import pyarrow as pa
    from datasets import Dataset as Table

    if not json_path.is_file():
        raise FileNotFoundError(f"annotation file {json_path} does not exist; check the path")
    with json_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cached = cache_folder() / f"coco-{FORMAT}-{digest}.arrow"
    if not cached.exists():
        _build(json_path, cached)
    # `datasets` reads only its own part of the schema.
    with pa.memory_map(str(cached)) as file, pa.ipc.open_stream(file) as reader:
        head = json.loads(reader.schema.metadata[b"mimdet"])
    return Table.from_file(str(cached)), head | {"sha256": digest}


def _build(path: Path, cached: Path) -> None:
    """Write the table beside its place and rename it: there is never a partial one to be found."""
    import pyarrow as pa

    reader, schema = CocoReader(path), _schema()
    rows = map(_row, reader.rows())
    batches: list[pa.RecordBatch] = []
    head: dict[str, Any] = {"without_mask": [], "with_mask": False, "unusable": []}
    # As Python objects rows take ten times the memory: some at a time.
    while some := list(islice(rows, 1000)):
        for annotation in (one for row in some for one in row["annotations"]):
            if annotation["iscrowd"]:
                continue
            if has_mask(annotation):
                head["with_mask"] = True
            elif len(head["without_mask"]) < 5:
                head["without_mask"].append(annotation["source_id"])
            if not annotation["usable"] and len(head["unusable"]) < 5:
                head["unusable"].append(annotation["source_id"])
        batches.append(pa.RecordBatch.from_pylist(some, schema=schema))
    head["categories"] = sorted(reader.categories.items())
    schema = schema.with_metadata({"mimdet": json.dumps(head)})
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f"{cached.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        if not cached.exists():  # another process may have been faster; its content is the same
            os.replace(partial, cached)
    finally:
        partial.unlink(missing_ok=True)


def _row(pair: tuple[Read, list[tuple[Read, Annotation]]]) -> dict[str, Any]:
    """A row of the table: an image with its annotations."""
    image, annotations = pair[0].entry, [annotation for _, annotation in pair[1]]
    return {
        "image_id": json.dumps(image.id),
        "file_name": image.file_name,
        "height": image.height,
        "width": image.width,
        "usable": sum(annotation["usable"] for annotation in annotations),
        "annotations": annotations,
    }


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


class CocoDataset:
    """A COCO instances json and its image folder.

    json_path: annotations, read once and cached (see `coco_table`).
    limit: use only the first N images of the file; 0 = all.
    skip_empty: leave out images (of those) without a trainable annotation.

    Labels are the ranks of the category ids. Crowds appear in `ground_truth()` only. Annotations
    with an empty box or mask are left out of training, with a warning. `has_masks` is False for a
    file of boxes only; a file in which some objects have a mask and some do not is an error.
    """

    def __init__(
        self,
        json_path: str | Path,
        image_folder: str | Path,
        limit: int = 0,
        skip_empty: bool = False,
    ) -> None:
        self.json_path = Path(json_path)
        self.image_folder = Path(image_folder)
        self._table, head = coco_table(self.json_path)
        if head["with_mask"] and head["without_mask"]:
            raise ValueError(
                f"{json_path}: some objects have a segmentation and some have none (annotations "
                f"{', '.join(head['without_mask'])}, ...); complete them, or remove all "
                "segmentations to train on boxes only"
            )
        if head["unusable"]:
            warnings.warn(
                f"{json_path}: annotations {', '.join(head['unusable'])}, ... have an empty box or "
                "mask and are left out of training; `mimdet check-data` lists all",
                stacklevel=2,
            )
        self.category_ids = [number for number, _ in head["categories"]]
        self.categories = [name for _, name in head["categories"]]
        self.has_masks = head["with_mask"]
        self.version = f"{self.json_path.name} sha256:{head['sha256']}"
        self._label_of = {number: label for label, number in enumerate(self.category_ids)}
        columns = self._table.data
        heights = columns.column("height").to_numpy()
        self._sizes = np.stack([heights, columns.column("width").to_numpy()], axis=1)
        rows = np.arange(len(heights))[: limit or None]
        if skip_empty:
            rows = rows[columns.column("usable").to_numpy()[rows] > 0]
        self._rows = rows
        if not len(rows):
            raise ValueError(f"{json_path} has no images{' with objects' if skip_empty else ''}")
        if not self._file(0).is_file():
            raise FileNotFoundError(self._missing(self._file(0)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._row(index)
        size = row["height"], row["width"]
        target = make_target(row["annotations"], *size, self._label_of, self.has_masks)
        return Record(self.image(index), target, json.loads(row["image_id"]))

    def image(self, index: int) -> Tensor:
        height, width = self.image_size(index)
        path = self._file(index)
        if not path.is_file():
            raise FileNotFoundError(self._missing(path))
        image = read_image(path)  # (3, H, W)
        if tuple(image.shape[1:]) != (height, width):
            raise ValueError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels, but {self.json_path} says "
                f"{width} x {height}; correct the one or the other (EXIF rotation is not applied: "
                "sizes and boxes refer to stored pixels), `mimdet check-data` lists all"
            )
        return image

    def image_size(self, index: int) -> tuple[int, int]:
        height, width = self._sizes[self._rows[index]]
        return int(height), int(width)

    def image_id(self, index: int) -> int | str:
        return json.loads(self._cell(index, "image_id"))

    def ground_truth(self) -> dict[str, Any]:
        """COCO dictionary of these images: crowds included, annotation ids from 1."""
        rows = (self._row(index)["annotations"] for index in range(len(self)))
        return coco_ground_truth(self, rows)

    def _row(self, index: int) -> dict[str, Any]:
        return self._table[int(self._rows[index])]

    def _cell(self, index: int, column: str) -> Any:
        return self._table.data.column(column)[int(self._rows[index])].as_py()

    def _file(self, index: int) -> Path:
        return self.image_folder / self._cell(index, "file_name")

    def _missing(self, path: Path) -> str:
        return (
            f"image {path}, named in {self.json_path}, does not exist; check the image folder "
            f"{self.image_folder}, `mimdet check-data` lists all missing files"
        )


def build_dataset(cfg: DataConfig, split: Literal["train", "val"], seed: int = 0) -> "Dataset":
    """Open the training or evaluation data a config names.

    data.source may be "module:function", which is called with `cfg` and the split.

    seed: of the scenes of ShapesCOCO that are trained on; its evaluation scenes are the same for
    every seed, so that runs can be compared. Raises ValueError naming the field that is missing.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r}: use 'train' or 'val'")
    if ":" in cfg.source:
        own: Dataset = pkgutil.resolve_name(cfg.source)(cfg, split)
        return own
    files = ("train_json", "train_images", "val_json", "val_images")
    given = [f"data.{name}" for name in files if getattr(cfg, name)]
    if cfg.source != "coco" and given:
        raise ValueError(
            f"data.source={cfg.source!r} does not read {', '.join(given)}: set data.source='coco' "
            "(--source coco), or leave it out"
        )
    train = split == "train"
    limit = cfg.limit_train if train else cfg.limit_val
    skip_empty = train and cfg.skip_empty
    if cfg.source == "shapes":
        from mimdet.data.shapes import ShapesCOCO

        length = cfg.shapes_train if train else cfg.shapes_val
        length = min(length, limit) if limit else length
        return ShapesCOCO(cfg.shapes_level, cfg.shapes_size, length, split, seed if train else 0)
    if cfg.source == "coco":
        json_path, folder = getattr(cfg, f"{split}_json"), getattr(cfg, f"{split}_images")
        if not json_path or not folder:
            raise ValueError(
                f"data.{split}_{'images' if json_path else 'json'} is empty: data.source='coco' "
                "needs an annotation file and an image folder"
            )
        return CocoDataset(json_path, folder, limit, skip_empty)
    if cfg.source == "hub":
        from mimdet.data.hub import HubDataset

        if not cfg.hub_name:
            raise ValueError(
                "data.hub_name is empty: data.source='hub' needs a data set id or path"
            )
        hub_split = cfg.hub_train_split if train else cfg.hub_val_split
        return HubDataset(cfg.hub_name, hub_split, cfg.bbox_format, limit, skip_empty)
    known = "'shapes', 'coco', 'hub' or 'module:function'"
    raise ValueError(f"data.source={cfg.source!r}: use {known}")
