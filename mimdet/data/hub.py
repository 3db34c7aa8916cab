"""Hugging Face tables with an `image` and an `objects` column -> records.

`objects` holds `bbox`, `category` (or `label`, `category_id`) and, optionally, `segmentation`,
`area`, `iscrowd`, `id`; as one dictionary of lists or as a list of dictionaries. The layout of the
boxes differs from table to table and is never guessed: `bbox_format` must be given.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from torch import Tensor

from mimdet.data.annotations import (
    EMPTY,
    AnnotatedImages,
    Annotation,
    AnnotationEntry,
    Mask,
    brief,
    checked,
)
from mimdet.data.coco_file import ERRORS, in_words
from mimdet.images import read_image, stored_size

if TYPE_CHECKING:
    from datasets import Dataset as Table

FORMATS = ("xywh", "xyxy", "cxcywh_normalised")
CATEGORY_NAMES = ("category", "label", "category_id")


class HubDataset(AnnotatedImages):
    """A table of images and objects.

    table: a `datasets.Dataset`, a folder, or a data set id for `datasets.load_dataset` (which
    downloads it unless it is cached). bbox_format: "xywh" (pixels), "xyxy" (pixels) or
    "cxcywh_normalised" (centre and size as shares of the image).

    Category names come from the ClassLabel feature where there is one; else they are the values
    themselves. Raises ValueError naming table, column and row where boxes contradict the format.
    """

    def __init__(
        self,
        table: "Table | str",
        split: str = "train",
        bbox_format: str = "",
        limit: int = 0,
        skip_empty: bool = False,
        masks: bool = True,
    ) -> None:
        self.name = table if isinstance(table, str) else "table"
        if bbox_format not in FORMATS:
            raise ValueError(
                f"{self.name}: data.bbox_format={bbox_format!r}; say how `objects.bbox` is laid "
                f"out, one of {', '.join(FORMATS)} (it is never guessed)"
            )
        self.bbox_format = bbox_format
        rows = _open(table, split) if isinstance(table, str) else table
        self._table, self._key, names = _check_columns(rows, self.name)
        values, kept, self.has_masks, digest = self._scan(skip_empty, masks)  # of all rows
        kept = [index for index in kept if not limit or index < limit]
        empty = min(limit or len(rows), len(rows)) - len(kept)
        self.summary = (
            f"{self.name} {split}: {len(kept):,} of {len(rows):,} images"
            f"; left out: {f'{empty:,} {EMPTY}' if empty else 'nothing'}"
        )
        if not kept:
            raise ValueError(f"{self.name} has no images{' with objects' if skip_empty else ''}")
        if "image_id" in rows.column_names:
            twice = [i for i, count in Counter(rows["image_id"]).items() if count > 1]
            if twice:
                raise ValueError(
                    f"{self.name}: image_id {brief(twice[0])} stands in more than one row; number "
                    "the images anew, or drop the column"
                )
        self.version = f"{self.name} {split} objects sha256:{digest}"
        if names is not None:
            values = list(range(len(names)))
        numbered = all(isinstance(value, int) for value in values)  # names are numbered from 1
        self._value_ids = {v: v if numbered else rank for rank, v in enumerate(values, start=1)}
        self.category_ids = list(self._value_ids.values())
        self.categories = names or [str(value) for value in values]
        self._table = self._table.select(kept)
        self._told: set[str] = set()
        self._known_sizes: dict[int, tuple[int, int]] = {}
        self._check_extents(range(min(len(kept), 100)))

    def __len__(self) -> int:
        return len(self._table)

    def image(self, index: int) -> Tensor:
        height, width = size = self.image_size(index)
        image = read_image(self.source(index), f"{self.name}, row {index}, image", size)
        if tuple(image.shape[1:]) != (height, width):
            raise ValueError(
                f"{self.name}, row {index}: the image is {image.shape[2]} x {image.shape[1]}, the "
                f"columns say {width} x {height} pixels; correct or drop these columns"
            )
        return image

    def image_size(self, index: int) -> tuple[int, int]:
        """From the columns `height` and `width`, else from the header of the image."""
        if index not in self._known_sizes:
            row = self._table[index]
            size = row.get("height"), row.get("width")
            self._known_sizes[index] = size if all(size) else stored_size(self.source(index))
        return self._known_sizes[index]

    def image_id(self, index: int) -> int | str:
        """The column `image_id`, else the row's number."""
        if "image_id" in self._table.column_names:
            return self._table[index]["image_id"]
        return index

    def annotations(self, index: int) -> list[Annotation]:
        height, width = self.image_size(index)
        found = []
        with self._row(index):
            for item in _listed(self._table[index]["objects"]):
                raw: dict[str, Any] = {name: item.get(name) for name in ("id", "area", "iscrowd")}
                if self.bbox_format == "cxcywh_normalised":
                    raw["area"] = None  # of unknown unit: computed anew, in pixels
                raw["bbox"] = _to_xywh(item["bbox"], self.bbox_format, height, width)
                raw |= {"image_id": index, "category_id": self._value_ids[item[self._key]]}
                mask = msgspec.convert(item.get("segmentation"), Mask)
                entry = msgspec.convert(raw, AnnotationEntry)
                found.append(checked(entry, mask, height, width, partial(self._note, index)))
        return found

    def _note(self, index: int, kind: str, message: str) -> None:
        """Name the first fault of a kind."""
        if kind in ERRORS and kind not in self._told:
            self._told.add(kind)
            warnings.warn(
                f"{self.name}, row {index}: {message} ({kind}). {ERRORS[kind]}", stacklevel=5
            )

    @contextmanager
    def _row(self, index: int) -> Iterator[None]:
        """Errors inside name table and row."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name}, row {index}: {in_words(error)}") from error

    def _scan(self, skip_empty: bool, with_masks: bool) -> tuple[list[Any], list[int], bool, str]:
        """One pass over the objects.

        -> (category values, rows to keep, whether the objects have masks, sha256 of the objects)
        """
        content = hashlib.sha256()
        values: set[Any] = set()
        kept: list[int] = []
        masks: list[bool] = []
        for index, row in enumerate(self._table.select_columns(["objects"])):
            content.update(json.dumps(row["objects"], sort_keys=True, default=str).encode())
            trainable = 0
            with self._row(index):
                for item in _listed(row["objects"]):
                    _, _, w, h = _to_xywh(item["bbox"], self.bbox_format)
                    if item.get(self._key) in (None, -1):  # -1: unlabelled
                        raise ValueError(f"an object has no {self._key}: add it or remove it")
                    values.add(item[self._key])
                    if not item.get("iscrowd"):
                        trainable += w > 0 and h > 0
                        masks.append(bool(item.get("segmentation")))
            if trainable or not skip_empty:
                kept.append(index)
        if with_masks and any(masks) and not all(masks):
            raise ValueError(
                f"{self.name}: {masks.count(False)} of {len(masks)} objects have no segmentation; "
                "complete them, or remove the column to train on boxes only"
            )
        return sorted(values), kept, with_masks and any(masks), content.hexdigest()

    def _check_extents(self, rows: Iterable[int]) -> None:
        """Corners read as sizes reach far out of the image; shares read as pixels cover nothing."""
        ends = []
        for index in rows:
            height, width = self.image_size(index)
            for item in _listed(self._table[index]["objects"]):
                x, y, w, h = _to_xywh(item["bbox"], self.bbox_format, height, width)
                ends.append(max(x + w, y + h))
                if x + w > 1.5 * width or y + h > 1.5 * height:
                    raise ValueError(
                        f"{self.name}, row {index}: box {item['bbox']}, read as "
                        f"{self.bbox_format}, leaves the image of {width} x {height} pixels; set "
                        "another data.bbox_format"
                    )
        if ends and max(ends) <= 1.5:
            raise ValueError(
                f"{self.name}: no box reaches beyond 1.5, so these are not pixels; is "
                "data.bbox_format 'cxcywh_normalised'?"
            )

    def source(self, index: int) -> bytes | str:
        """The image as the table holds it: a file's bytes, or its path."""
        cell = self._table[index]["image"]
        source = (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else None
        if source is None:
            raise ValueError(f"{self.name}, row {index}: the `image` column is empty")
        return source


def _open(name: str, split: str) -> "Table":
    import datasets

    folder = Path(name)
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        saved = datasets.load_from_disk(name)
        if not isinstance(saved, dict):
            return saved
        if split not in saved:
            raise ValueError(f"{name} has no split {split!r}; it has {sorted(saved)}")
        return saved[split]
    return datasets.load_dataset(name, split=split)


def _check_columns(table: "Table", name: str) -> tuple["Table", str, list[str] | None]:
    """-> (the table with images left encoded, the name of the category field, its classes)."""
    import datasets

    if not isinstance(table, datasets.Dataset):
        raise ValueError(f"{name} is a {type(table).__name__}; give a `datasets.Dataset`")
    if not {"image", "objects"} <= set(table.column_names):
        raise ValueError(
            f"{name} has the columns {table.column_names}; it needs `image` and `objects`"
        )
    feature = table.features["objects"]
    if not isinstance(feature, dict):  # List({name: feature}), else {name: List(feature)}
        feature = feature.feature
    key = next((key for key in CATEGORY_NAMES if key in feature), "")
    if "bbox" not in feature or not key:
        raise ValueError(
            f"{name}: `objects` has the fields {sorted(feature)}; it needs `bbox` and one of "
            f"{', '.join(CATEGORY_NAMES)}"
        )
    names = getattr(getattr(feature[key], "feature", feature[key]), "names", None)
    return table.cast_column("image", datasets.Image(decode=False)), key, names


def _listed(objects: Any) -> list[dict[str, Any]]:
    """Objects of one image as a list of dictionaries, whichever way the table nests them."""
    if objects is None or isinstance(objects, list):
        return objects or []
    columns = {name: column for name, column in objects.items() if column is not None}
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"the fields {sorted(columns)} of `objects` differ in length")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _to_xywh(box: Any, bbox_format: str, height: int = 1, width: int = 1) -> list[float]:
    """A box of an image of height x width; ValueError where it contradicts the format."""
    if box is None or len(box) != 4:
        raise ValueError(f"bbox {box} has not four numbers; correct or remove the object")
    a, b, c, d = box
    if bbox_format == "xyxy":
        c, d = c - a, d - b
    if c < 0 or d < 0 or (bbox_format == "cxcywh_normalised" and max(box) > 1.5):
        raise ValueError(
            f"box {list(box)} contradicts bbox_format={bbox_format!r}; set another of "
            f"{', '.join(FORMATS)}, or correct the box"
        )
    if bbox_format == "cxcywh_normalised":
        return [(a - c / 2) * width, (b - d / 2) * height, c * width, d * height]
    return [a, b, c, d]
