"""COCO-format data as records, and the one function that opens whatever a config names."""

import json
import pkgutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mimdet.config import DataConfig
from mimdet.data.coco_file import coco_ground_truth, coco_table, make_target
from mimdet.images import read_image
from mimdet.structures import Record

if TYPE_CHECKING:
    from mimdet.data.loader import Dataset


class CocoDataset:
    """A COCO instances json and its image folder.

    json_path: annotations, read once and cached (see `tables.coco_table`).
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
        table = coco_table(self.json_path)
        if table.with_mask and table.without_mask:
            raise ValueError(
                f"{json_path}: some objects have a segmentation and some have none (annotations "
                f"{', '.join(table.without_mask)}, ...); complete them, or remove all "
                "segmentations to train on boxes only"
            )
        if table.unusable:
            warnings.warn(
                f"{json_path}: annotations {', '.join(table.unusable)}, ... have an empty box or "
                "mask and are left out of training; `mimdet check-data` lists all",
                stacklevel=2,
            )
        self.categories = [category["name"] for category in table.categories]
        self.category_ids = [category["id"] for category in table.categories]
        self.has_masks = table.with_mask
        self.version = f"{self.json_path.name} sha256:{table.digest}"
        self._coco_categories = table.categories
        self._label_of = {number: label for label, number in enumerate(self.category_ids)}
        self._table = table.rows
        columns = table.rows.data
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
        height, width = row["height"], row["width"]
        path = self.image_folder / row["file_name"]
        if not path.is_file():
            raise FileNotFoundError(self._missing(path))
        image = read_image(path)  # (3, H, W)
        if tuple(image.shape[1:]) != (height, width):
            raise ValueError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels, but {self.json_path} says "
                f"{width} x {height}; correct the one or the other (EXIF rotation is not applied: "
                "sizes and boxes refer to stored pixels), `mimdet check-data` lists all"
            )
        where = str(self.json_path)
        annotations = row["annotations"]
        target = make_target(annotations, height, width, self._label_of, self.has_masks, where)
        return Record(image, target, json.loads(row["image_id"]))

    def image_size(self, index: int) -> tuple[int, int]:
        height, width = self._sizes[self._rows[index]]
        return int(height), int(width)

    def image_id(self, index: int) -> int | str:
        return json.loads(self._row(index)["image_id"])

    def ground_truth(self) -> dict[str, Any]:
        """COCO dictionary of these images: crowds included, annotation ids from 1."""
        rows = (self._row(index) for index in range(len(self)))
        images = ((_image_entry(row), row["annotations"]) for row in rows)
        return coco_ground_truth(images, self._coco_categories)

    def _row(self, index: int) -> dict[str, Any]:
        return self._table[int(self._rows[index])]

    def _file(self, index: int) -> Path:
        return self.image_folder / self._row(index)["file_name"]

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
    if cfg.source != "coco":
        files = ("train_json", "train_images", "val_json", "val_images")
        for name in files:
            if getattr(cfg, name):
                raise ValueError(
                    f"data.{name} is {getattr(cfg, name)!r}, but data.source={cfg.source!r} reads "
                    "no such file: set data.source='coco' (--source coco), or leave it out"
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
        for kind in ("json", "images"):
            if not getattr(cfg, f"{split}_{kind}"):
                raise ValueError(
                    f"data.{split}_{kind} is empty: data.source='coco' needs an annotation file "
                    f"(data.{split}_json) and an image folder (data.{split}_images)"
                )
        json_path = cfg.train_json if train else cfg.val_json
        return CocoDataset(
            json_path, cfg.train_images if train else cfg.val_images, limit, skip_empty
        )
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


def _image_entry(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": json.loads(row["image_id"]),
        "file_name": row["file_name"],
        "height": row["height"],
        "width": row["width"],
    }
