"""COCO-format data as records, and the one function that opens whatever a config names.

A json is read once into an Arrow table, one row an image with its checked annotations as text. The
table lies in the cache folder under the sha256 of the json, so that an edited file is read anew,
every process and loader worker maps the same pages, and training on 118,000 images neither parses
450 MB of json nor grows in memory.
"""

import hashlib
import json
import os
import pkgutil
import warnings
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from torch import Tensor

from mimdet.config import DataConfig
from mimdet.data.coco_file import AnnotatedImages, Annotation, CocoReader, ImageEntry
from mimdet.files import write_file
from mimdet.images import read_image

if TYPE_CHECKING:
    from mimdet.data.loader import Dataset


FORMAT = 4
"""Part of the cache's file name; raised when the columns or the meaning of `usable` change."""
ROWS_AT_A_TIME = 1000


def cache_folder() -> Path:
    """$MIMDET_CACHE, or `.cache/mimdet` in the home folder."""
    return Path(os.environ.get("MIMDET_CACHE") or Path.home() / ".cache" / "mimdet")


class Table:
    """A COCO instances file, read through the cache; in another process it is opened anew.

    rows: a memory-mapped `pyarrow.Table` with the columns image_id (json text: ids may be numbers
    or strings), file_name, height, width, usable (number of trainable annotations) and annotations
    (json text of a list of `Annotation`). head: what holds for the whole file: sha256, categories
    [(id, name), ...] sorted by id, with_mask (whether any single object has one), and the ids of at
    most 5 single objects each that are without_mask and unusable.

    Raises FileNotFoundError, and ValueError naming file, entry and field where it is not COCO.
    """

    def __init__(self, json_path: Path) -> None:
        import pyarrow as pa

        if not json_path.is_file():
            raise FileNotFoundError(f"annotation file {json_path} does not exist; check the path")
        with json_path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.json_path = json_path
        cached = cache_folder() / f"coco-{FORMAT}-{digest}.arrow"
        if not cached.exists():
            write_file(cached, partial(_build, CocoReader(json_path)))
        with pa.ipc.open_stream(pa.memory_map(str(cached))) as reader:
            *batches, last = reader.iter_batches_with_custom_metadata()
        self.rows = pa.Table.from_batches([batch.batch for batch in batches])
        self.head = json.loads(last.custom_metadata[b"mimdet"]) | {"sha256": digest}

    def __reduce__(self) -> Any:
        return Table, (self.json_path,)

    def column(self, name: str) -> Any:
        """(rows,) int array."""
        return self.rows.column(name).to_numpy()


def _build(reader: CocoReader, path: Path) -> None:
    """Write the table, some rows at a time: as objects they take ten times the memory."""
    import pyarrow as pa

    kinds = {"image_id": pa.string(), "file_name": pa.string(), "height": pa.int32()}
    kinds |= {"width": pa.int32(), "usable": pa.int32(), "annotations": pa.binary()}
    schema = pa.schema(kinds)
    head: dict[str, Any] = {"without_mask": [], "with_mask": False, "unusable": []}
    head["categories"] = sorted(reader.categories.items())
    rows = (_row(image.entry, [one for _, one in pairs], head) for image, pairs in reader.rows())
    with pa.ipc.new_stream(str(path), schema) as writer:
        while some := list(islice(rows, ROWS_AT_A_TIME)):
            writer.write_batch(pa.RecordBatch.from_pylist(some, schema))
        end = pa.RecordBatch.from_pylist([], schema)
        writer.write_batch(end, custom_metadata={"mimdet": json.dumps(head)})


def _row(image: ImageEntry, annotations: list[Annotation], head: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; what it says of the whole goes into the head."""
    for annotation in annotations:
        if annotation.iscrowd:
            continue
        head["with_mask"] |= annotation.mask is not None
        if annotation.mask is None and len(head["without_mask"]) < 5:
            head["without_mask"].append(annotation.source_id)
        if not annotation.usable and len(head["unusable"]) < 5:
            head["unusable"].append(annotation.source_id)
    return {
        "image_id": json.dumps(image.id),
        "file_name": image.file_name,
        "height": image.height,
        "width": image.width,
        "usable": sum(annotation.usable for annotation in annotations),
        "annotations": msgspec.json.encode(annotations),
    }


class CocoDataset(AnnotatedImages):
    """A COCO instances json and its image folder.

    json_path: annotations, read once and cached (see `Table`).
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
        self._table = Table(self.json_path)
        head = self._table.head
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
        self._sizes = np.stack([self._table.column(name) for name in ("height", "width")], axis=1)
        rows = np.arange(len(self._sizes))[: limit or None]
        if skip_empty:
            rows = rows[self._table.column("usable")[rows] > 0]
        self._rows = rows
        if not len(rows):
            raise ValueError(f"{json_path} has no images{' with objects' if skip_empty else ''}")
        if not os.path.isfile(self._file(0)):
            raise FileNotFoundError(self._missing(self._file(0)))

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Tensor:
        height, width = self.image_size(index)
        path = self._file(index)
        if not os.path.isfile(path):  # also False for names no file can have
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

    def annotations(self, index: int) -> list[Annotation]:
        return msgspec.json.decode(self._cell(index, "annotations"), type=list[Annotation])

    def _cell(self, index: int, column: str) -> Any:
        return self._table.rows.column(column)[int(self._rows[index])].as_py()

    def _file(self, index: int) -> Path:
        return self.image_folder / self._cell(index, "file_name")

    def _missing(self, path: Path) -> str:
        return (
            f"image {path}, named in {self.json_path}, does not exist; check the image folder "
            f"{self.image_folder}, `mimdet check-data` lists all missing files"
        )


def ids_of_files(cfg: DataConfig, files: Iterable[Path]) -> dict[Path, int | str]:
    """Image ids of the files that belong to the data of `cfg`, as its annotation files have them;
    files of elsewhere are left out."""
    found: dict[Path, int | str] = {}
    for split in ("train", "val"):
        folder = Path(getattr(cfg, f"{split}_images")).resolve()
        annotations = Path(getattr(cfg, f"{split}_json"))
        inside = [file for file in files if file.resolve().is_relative_to(folder)]
        if cfg.source == "coco" and inside and annotations.is_file():
            rows = Table(annotations).rows
            columns = (rows.column(name).to_pylist() for name in ("file_name", "image_id"))
            known = dict(zip(*columns, strict=True))
            names = {file: file.resolve().relative_to(folder).as_posix() for file in inside}
            found |= {f: json.loads(known[name]) for f, name in names.items() if name in known}
    return found


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
