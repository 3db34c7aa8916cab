"""COCO-format data as records, and the one function that opens whatever a config names.

A json is read once into an Arrow table, one row an image with its checked annotations as text. The
table lies in the cache folder under the sha256 of the json, so that an edited file is read anew,
every process and loader worker maps the same pages, and training on 118,000 images neither parses
450 MB of json nor grows in memory.
"""

import gc
import hashlib
import json
import os
import pkgutil
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from filelock import FileLock
from torch import Tensor

from mimdet.config import DataConfig
from mimdet.data.annotations import EMPTY, AnnotatedImages, Annotation
from mimdet.data.checks import Survey, link_target, size_words
from mimdet.data.coco_file import REFUSED, CocoReader, ImageEntry, Problem, Read, refuse
from mimdet.data.foreign import NAMES_OF, recognise
from mimdet.files import SHIPPED, remove_leftovers, write_file
from mimdet.images import read_image

if TYPE_CHECKING:
    from mimdet.data.loader import Dataset


FORMAT = 5
"""Part of the cache's file name; raised when the columns or the meaning of `left_out` change."""
ROWS_AT_A_TIME = 1000
SEAL = 0x2144DF1C
"""The CRC-32 of any file that ends with its own."""


def cache_folder() -> Path:
    """$MIMDET_CACHE, or `.cache/mimdet` in the home folder."""
    return Path(os.environ.get("MIMDET_CACHE") or Path.home() / ".cache" / "mimdet")


class Table:
    """A COCO instances file as a memory-mapped Arrow table; in another process it is mapped anew.

    rows: a `pyarrow.Table` with the columns image_id (json text: ids may be numbers or strings),
    file_name, height, width, usable (number of trainable annotations), left_out (for each of the
    others why, as `Annotation` has it) and annotations (msgpack of a list of `Annotation`).
    head: what holds for the whole file: sha256, categories [(id, name), ...] sorted by id, masks
    (whether any single object has one), and found: kind of fault -> [count, the first `Problem`].
    """

    def __init__(self, path: Path, folder: Any = None) -> None:
        """folder: is kept as long as the table."""
        import pyarrow as pa

        self.path, self._folder = path, folder
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            *batches, last = reader.iter_batches_with_custom_metadata()
        self.rows = pa.Table.from_batches([batch.batch for batch in batches])
        self.head = json.loads(last.custom_metadata[b"mimdet"])

    def __reduce__(self) -> Any:
        return Table, (self.path,)

    def column(self, name: str) -> Any:
        """(rows,) int array."""
        return self.rows.column(name).to_numpy()


def open_table(json_path: Path) -> Table:
    """Read a COCO instances file through the cache; where that cannot be used, with a warning.

    Raises FileNotFoundError, and ValueError naming file, entry and field where it is not COCO.
    """
    if json_path.exists() and (kind := recognise(json_path)):
        raise ValueError(
            f"{json_path} is {NAMES_OF[kind]}, not COCO json; `mimdet convert {json_path} "
            "FILE.json` makes one of it"
        )
    if not json_path.is_file():
        raise FileNotFoundError(f"annotation file {json_path} does not exist; check the path")
    with json_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cached = cache_folder() / f"coco-{FORMAT}-{digest}.arrow"
    if _is_whole(cached):
        return Table(cached)
    # Of several processes one makes it, the others wait and read; without locks each makes its own.
    lock = FileLock(cached.with_suffix(".lock"))
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        return Table(cached) if _is_whole(cached) else _make(cached, json_path, digest)
    finally:
        with suppress(OSError):  # who waits holds the file itself, and finds the table
            Path(lock.lock_file).unlink()
        lock.release()


def _is_whole(cached: Path) -> bool:
    return cached.exists() and _checksum(cached) == SEAL


def _make(cached: Path, json_path: Path, digest: str) -> Table:
    if cached.exists():
        warnings.warn(f"{cached} is damaged: it is made again from {json_path}", stacklevel=5)
    build = partial(_build, json_path, digest)
    try:
        remove_leftovers(cached.parent)
        write_file(cached, build)
        return Table(cached)
    except OSError as error:
        warnings.warn(
            f"{cached} cannot be written ({error}): {json_path} is read anew each time; set "
            "MIMDET_CACHE to a folder with room",
            stacklevel=5,
        )
    folder = tempfile.TemporaryDirectory()
    build(Path(folder.name) / cached.name)
    return Table(Path(folder.name) / cached.name, folder)


def _build(json_path: Path, digest: str, path: Path) -> None:
    """Write the table, some rows at a time: as objects they take ten times the memory."""
    import pyarrow as pa

    kinds = {"image_id": pa.string(), "file_name": pa.string(), "height": pa.int32()}
    kinds |= {"width": pa.int32(), "usable": pa.int32(), "left_out": pa.list_(pa.string())}
    schema = pa.schema(kinds | {"annotations": pa.binary()})
    found: dict[str, list[Any]] = {}

    def report(problem: Problem) -> None:
        # Whether masks are missing depends on whether they are wanted.
        if problem.kind in REFUSED and problem.kind != "segmentation-missing":
            refuse(problem)
        found.setdefault(problem.kind, [0, asdict(problem)])[0] += 1

    enabled = gc.isenabled()
    gc.disable()  # millions of objects, none of them in a cycle: searching takes a twentieth
    try:
        survey = Survey(CocoReader(json_path, report))
        rows = survey.rows()
        with pa.ipc.new_stream(str(path), schema) as writer:
            while some := [_row(image.entry, own) for image, own in islice(rows, ROWS_AT_A_TIME)]:
                writer.write_batch(pa.RecordBatch.from_pylist(some, schema))
            head: dict[str, Any] = {"sha256": digest, "masks": survey.masked[False] > 0}
            head |= {"found": found, "categories": sorted(survey.reader.categories.items())}
            end = pa.RecordBatch.from_pylist([], schema)
            writer.write_batch(end, custom_metadata={"mimdet": json.dumps(head)})
    finally:
        if enabled:
            gc.enable()
    with path.open("ab") as file:
        file.write(_checksum(path).to_bytes(4, "little"))


def _row(image: ImageEntry, pairs: list[tuple[Read, Annotation]]) -> dict[str, Any]:
    """A row of the table."""
    annotations = [annotation for _, annotation in pairs]
    left_out = [annotation.left_out for annotation in annotations if annotation.left_out]
    return {
        "image_id": msgspec.json.encode(image.id).decode(),
        "file_name": image.file_name,
        "height": image.height,
        "width": image.width,
        "usable": len(annotations) - len(left_out),
        "left_out": left_out,
        "annotations": msgspec.msgpack.encode(annotations),
    }


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    import pyarrow as pa

    return zlib.crc32(pa.memory_map(str(path)).read_buffer())


class CocoDataset(AnnotatedImages):
    """A COCO instances json and its image folder.

    json_path: annotations, read once and cached (see `Table`). image_folder: None where no image is
    to be read.
    limit: use only the first N images of the file; 0 = all.
    skip_empty: leave out images (of those) without a trainable annotation.
    masks: False reads boxes only.

    Labels are the ranks of the category ids. Crowds appear in `ground_truth()` only. What
    `mimdet check-data` calls an error raises ValueError, or is named once in a warning; annotations
    with an empty box or mask are left out of training. `has_masks` is False for a file of boxes
    only; a file in which some objects have a mask and some do not is an error, if masks are read.
    """

    def __init__(
        self,
        json_path: str | Path,
        image_folder: str | Path | None,
        limit: int = 0,
        skip_empty: bool = False,
        masks: bool = True,
    ) -> None:
        self.json_path = Path(json_path)
        self.image_folder = Path(image_folder or "")
        self._table = open_table(self.json_path)
        head = self._table.head
        self._report(dict(head["found"]), masks)
        self.category_ids = [number for number, _ in head["categories"]]
        self.categories = [name for _, name in head["categories"]]
        self.has_masks = head["masks"] and masks
        self.version = f"{self.json_path.name} sha256:{head['sha256']}"
        self._sizes = np.stack([self._table.column(name) for name in ("height", "width")], axis=1)
        usable = self._table.column("usable")
        rows = np.arange(len(usable))[: limit or None]
        self._rows = rows[usable[rows] > 0] if skip_empty else rows
        if not len(self._rows):
            raise ValueError(f"{json_path} has no images{' with objects' if skip_empty else ''}")
        reasons = Counter({EMPTY: len(rows) - len(self._rows)})
        reasons.update(
            self._table.rows.column("left_out").take(rows).combine_chunks().flatten().to_pylist()
        )
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        self.summary = (
            f"{self.json_path}: {len(self._rows):,} of {len(usable):,} images, "
            f"{usable[self._rows].sum():,} objects; left out: {left_out or 'nothing'}"
        )
        self._link_told = False
        if image_folder is None:
            return
        if not self.image_folder.is_dir():
            found = f"{self.image_folder} is not a folder"
            raise FileNotFoundError(str(Problem("folder-missing", found, str(json_path))))
        self._path(0)

    def _report(self, found: dict[str, list[Any]], masks: bool) -> None:
        """Refuse, or name once, what is wrong with the file."""
        missing = found.pop("segmentation-missing", None)
        if missing is not None and masks:
            problem = Problem(**missing[1] | {"file": str(self.json_path)})
            raise ValueError(
                f"{problem} (objects without a mask in all: {missing[0]:,}); without masks "
                "(--no-masks) it can be used as it is"
            )
        places = []
        for kind, (count, first) in found.items():
            problem = Problem(**first)
            places.append(f"{count} {kind} ({problem.where}: {problem.message})")
        if places:
            warnings.warn(
                f"{self.json_path}: {'; '.join(places)}. Objects with an empty box or mask are "
                "left out of training; `mimdet check-data` lists all",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Tensor:
        height, width = size = self.image_size(index)
        path = self._path(index)
        target = "" if self._link_told else link_target(self.image_folder, path)
        if target:
            self._link_told = True
            found = self._problem(index, "link-leaves-folder", f"it leads to {target}")
            warnings.warn(str(found), stacklevel=2)
        image = read_image(path, size=size)  # (3, H, W)
        if tuple(image.shape[1:]) != size:
            words = size_words((width, height), (image.shape[2], image.shape[1]))
            raise ValueError(str(self._problem(index, "image-size-wrong", words)))
        return image

    def file_name(self, index: int) -> str:
        return str(self._cell(index, "file_name"))

    def image_size(self, index: int) -> tuple[int, int]:
        height, width = self._sizes[self._rows[index]]
        return int(height), int(width)

    def image_id(self, index: int) -> int | str:
        return json.loads(self._cell(index, "image_id"))

    def annotations(self, index: int) -> list[Annotation]:
        return msgspec.msgpack.decode(self._cell(index, "annotations"), type=list[Annotation])

    def _cell(self, index: int, column: str) -> Any:
        return self._table.rows.column(column)[int(self._rows[index])].as_py()

    def _path(self, index: int) -> Path:
        """The image file. FileNotFoundError if there is none."""
        path = self.image_folder / self.file_name(index)
        if not os.path.isfile(path):  # also False for names no file can have
            found = self._problem(index, "image-missing", f"there is no {path}")
            raise FileNotFoundError(str(found))
        return path

    def _problem(self, index: int, kind: str, message: str) -> Problem:
        name, number = self.file_name(index), self.image_id(index)
        return Problem(kind, message, str(self.json_path), image_id=number, file_name=name)


class Nuclei(CocoDataset):
    """Cell nuclei in one microscope picture, which comes with the package: 94 in six tiles of 170
    pixels to train on, 49 in three that are held out.

    From BBBC038, the 2018 Data Science Bowl (CC0, Caicedo et al. 2019); mimdet/pretrained/README.md
    says how it came here. limit, skip_empty, masks: as of `CocoDataset`.
    """

    area_scale = (170 / 640) ** 2
    """Sizes are beside the picture's, as those of ShapesCOCO: by COCO's pixels all were small."""

    def __init__(
        self,
        split: Literal["train", "val"] = "train",
        limit: int = 0,
        skip_empty: bool = False,
        masks: bool = True,
    ) -> None:
        folder = SHIPPED / "nuclei"
        super().__init__(folder / f"{split}.json", folder / "images", limit, skip_empty, masks)


def named_images(dataset: CocoDataset, files: Iterable[Path]) -> dict[Path, int]:
    """The files that are images of `dataset`, each with its index there: by the longest end of
    their paths that is a file name in it. ValueError where two are one image, or none is any."""
    known = {dataset.file_name(index): index for index in range(len(dataset))}
    found: dict[str, Path] = {}
    for file in files:
        parts = file.absolute().parts
        ends = ("/".join(parts[start:]) for start in range(1, len(parts)))
        name = next((end for end in ends if end in known), "")
        if name in found:
            raise ValueError(
                f"{found[name]} and {file} are both {name!r} of {dataset.json_path}: give one"
            )
        found |= {name: file} if name else {}
    if not found:
        raise ValueError(f"{dataset.json_path} names none of these images; it has {[*known][:3]}")
    return {file: known[name] for name, file in found.items()}


def build_dataset(
    cfg: DataConfig, split: Literal["train", "val"], seed: int = 0, masks: bool = True
) -> "Dataset":
    """Open the training or evaluation data a config names.

    data.source may be "module:function", which is called with `cfg` and the split.

    seed: of the scenes of ShapesCOCO that are trained on; its evaluation scenes are the same for
    every seed, so that runs can be compared. masks: False reads boxes only, of files and tables;
    otherwise masks must be complete. Raises ValueError naming the field that is missing.
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
    if limit < 0:
        raise ValueError(f"data.limit_{split}={limit}: the first N images; 0 = all")
    skip_empty = train and cfg.skip_empty
    if cfg.source == "shapes":
        from mimdet.data.shapes import ShapesCOCO

        length = cfg.shapes_train if train else cfg.shapes_val
        length = min(length, limit) if limit else length
        return ShapesCOCO(cfg.shapes_level, cfg.shapes_size, length, split, seed if train else 0)
    if cfg.source == "nuclei":
        return Nuclei(split, limit, skip_empty, masks)
    if cfg.source == "coco":
        json_path, folder = getattr(cfg, f"{split}_json"), getattr(cfg, f"{split}_images")
        if not json_path or not folder:
            raise ValueError(
                f"data.{split}_{'images' if json_path else 'json'} is empty: data.source='coco' "
                "needs an annotation file and an image folder"
            )
        return CocoDataset(json_path, folder, limit, skip_empty, masks)
    if cfg.source == "hub":
        from mimdet.data.hub import HubDataset

        if not cfg.hub_name:
            raise ValueError(
                "data.hub_name is empty: data.source='hub' needs a data set id or path"
            )
        hub_split = cfg.hub_train_split if train else cfg.hub_val_split
        return HubDataset(cfg.hub_name, hub_split, cfg.bbox_format, limit, skip_empty, masks)
    known = "'shapes', 'nuclei', 'coco', 'hub' or 'module:function'"
    raise ValueError(f"data.source={cfg.source!r}: use {known}")
