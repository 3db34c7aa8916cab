"""A COCO instances file, read by declared types: the one reader of raw annotations.

`CocoReader` walks over every entry. What is wrong with one goes to its `report`: training refuses
the file at the first, `mimdet check-data` collects them all.
"""

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from mimdet.data.annotations import (
    Annotation,
    AnnotationEntry,
    Id,
    Mask,
    Side,
    Whole,
    brief,
    checked,
)

_KINDS = tomllib.loads(Path(__file__).with_name("check_kinds.toml").read_text("utf-8"))
REFUSED: dict[str, str] = _KINDS["refused"]
"""Kinds of faults with which nothing is trained or evaluated, and what to do about each."""
ERRORS: dict[str, str] = REFUSED | _KINDS["named"]
"""And those that spoil an object or its number: training and evaluation name them once."""
WARNINGS: dict[str, str] = _KINDS["warnings"]
"""Kinds that may be meant so, and what to do if not."""
KINDS = ERRORS | WARNINGS
"""Every kind with its remedy, in the order in which findings are printed."""


class CategoryEntry(Struct):
    id: Whole
    name: str


class ImageEntry(Struct):
    id: Id
    file_name: Annotated[str, Meta(min_length=1)]
    height: Side
    width: Side


@dataclass(slots=True, frozen=True)
class Problem:
    """One finding and its place."""

    kind: str
    """A key of `KINDS`."""
    message: str
    """What was found there."""
    file: str
    """Path of the annotation file."""
    entry: str = ""
    """Place in the annotation file, as `annotations[12]` (counted from 0)."""
    image_id: int | str | None = None
    file_name: str | None = None
    annotation_id: int | str | None = None

    @property
    def where(self) -> str:
        """As `annotations[12], annotation 17, image 3 'a.png'`; empty for the file as a whole."""
        parts = [self.entry] if self.entry else []
        if self.annotation_id is not None:
            parts.append(f"annotation {brief(self.annotation_id)}")
        image = [brief(part) for part in (self.image_id, self.file_name) if part is not None]
        if image:
            parts.append(" ".join(["image", *image]))
        return ", ".join(parts)

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.file, self.where) if part)
        return (
            f"{place}: {self.message} ({self.kind}). {KINDS[self.kind]} `mimdet check-data` lists "
            "all that is wrong"
        )


def refuse(problem: Problem) -> None:
    raise ValueError(str(problem))


def in_words(error: Exception, field: str = "") -> str:
    """What msgspec says of a value, with the field first, as the file names it.

    field: what the value is called that msgspec calls `$`.
    """
    found = re.fullmatch(r"(.*) - at `\$(.*)`", str(error))
    name = (field + (found[2] if found else "")).lstrip(".")
    message = found[1] if found else str(error)
    return f"{name} is wrong: {message}" if name else message


class Sections(Struct):
    """The file with its entries still encoded."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


class Read(Struct, frozen=True, gc=False):
    """An entry and its place in the file."""

    section: str
    position: int
    """Counted from 0."""
    entry: Any
    """One of the types above; where it is none of them, a dictionary or anything else."""


PLACES = {
    "images": {"image_id": "id", "file_name": "file_name"},
    "annotations": {"annotation_id": "id", "image_id": "image_id"},
    "categories": {},
}
"""What names an entry, as far as it is sound: field of a `Problem` -> field of the entry."""


class CocoReader:
    """A COCO instances file, entry by entry.

    report: is called with each problem. `refuse` raises ValueError; where it returns, the entry is
    left out, and a file that is none is one without entries. thorough: compare areas too.
    """

    def __init__(
        self, path: Path, report: Callable[[Problem], None] = refuse, thorough: bool = False
    ) -> None:
        self.path, self.report, self.thorough = path, report, thorough
        self.unsound: dict[str, set[Any]] = defaultdict(set)
        """Ids of entries that were left out: what refers to them is not reported again."""
        self.images: dict[int | str, Read] = {}
        self._sections = self._decoded()
        categories = self._by_id("categories", CategoryEntry, "duplicate-category-id")
        self.categories = {number: read.entry.name for number, read in categories.items()}
        """Category id -> name, in the order of the file."""
        self.images = self._by_id("images", ImageEntry, "duplicate-image-id")

    def problem(self, kind: str, message: str, read: Read | None = None) -> None:
        if not self.thorough and kind in WARNINGS:
            return
        place: dict[str, Any] = {}
        if read is not None:
            entry = read.entry
            fields = msgspec.structs.asdict(entry) if isinstance(entry, Struct) else entry
            for name, field in PLACES[read.section].items():
                value = fields.get(field) if isinstance(fields, dict) else None
                if type(value) in (int, str):
                    place[name] = value
            image = self.images.get(place.get("image_id", ""))
            if image is not None:
                place.setdefault("file_name", image.entry.file_name)
            place["entry"] = f"{read.section}[{read.position}]"
        self.report(Problem(kind, message, str(self.path), **place))

    def rows(self) -> Iterator[tuple[Read, list[tuple[Read, Annotation]]]]:
        """Each image with its annotations, as far as they are sound."""
        of_image = self._by_image()
        for number, image in self.images.items():
            pairs = []
            height, width = image.entry.height, image.entry.width
            for position in of_image.pop(number, ()):
                entry = _ANNOTATION.decode(self._sections.annotations[position])
                read = Read("annotations", position, entry)
                note = partial(self.problem, read=read)
                try:
                    mask = _MASK.decode(entry.segmentation)
                    annotation = checked(entry, mask, height, width, note, self.thorough)
                    pairs.append((read, annotation))
                except ValueError as error:
                    note("bad-segmentation", in_words(error, "segmentation"))
            yield image, pairs

    def _by_image(self) -> dict[int | str, list[int]]:
        """Places of the annotations of each image: as objects all would take a gigabyte."""
        of_image: dict[int | str, list[int]] = defaultdict(list)
        types = {type(number) for number in self.images}
        for read in self._entries("annotations", _ANNOTATION):
            image_id, category_id = read.entry.image_id, read.entry.category_id
            if image_id in self.images:
                of_image[image_id].append(read.position)
            elif image_id not in self.unsound["images"]:
                hint = "" if type(image_id) in types else " (a number here and text there?)"
                found = f"image_id {brief(image_id)} is not among the images{hint}"
                self.problem("unknown-image", found, read)
            if category_id not in self.categories and category_id not in self.unsound["categories"]:
                found = f"category_id {category_id} is not among the categories"
                self.problem("unknown-category", found, read)
        return of_image

    def _by_id(self, section: str, kind: type[Struct], duplicate: str) -> dict[Any, Read]:
        found: dict[Any, Read] = {}
        for read in self._entries(section, msgspec.json.Decoder(kind)):
            first = found.setdefault(read.entry.id, read)
            if first is not read:
                taken = f"id {brief(read.entry.id)} is also that of {section}[{first.position}]"
                self.problem(duplicate, taken, read)
        return found

    def _decoded(self) -> Sections:
        try:
            data = self.path.read_bytes()
            try:
                sections = msgspec.json.decode(data, type=Sections)
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:  # NaN is no json, but some tools write it: name the entry
                content = json.loads(data, parse_constant=str)
                sections = msgspec.json.decode(json.dumps(content), type=Sections)
        except msgspec.ValidationError as error:
            self.problem("not-coco", f"it is not a COCO instances file ({in_words(error)})")
        except (OSError, ValueError, RecursionError) as error:
            self.problem("json-unreadable", f"it is not a json file ({error}); was it cut off?")
        else:
            for name in ("images", "categories"):
                if not getattr(sections, name):
                    self.problem("empty-section", f"it has no {name}")
            return sections
        return Sections([], [], [])

    def _entries(self, section: str, decoder: msgspec.json.Decoder[Any]) -> Iterator[Read]:
        for index, raw in enumerate(getattr(self._sections, section)):
            try:
                yield Read(section, index, decoder.decode(raw))
            except (ValueError, RecursionError) as error:
                entry = None
                with suppress(ValueError, RecursionError):
                    entry = msgspec.json.decode(raw)
                if isinstance(entry, dict) and type(entry.get("id")) in (int, str):
                    self.unsound[section].add(entry["id"])
                self.problem("bad-field", in_words(error), Read(section, index, entry))


_ANNOTATION = msgspec.json.Decoder(AnnotationEntry)
_MASK: msgspec.json.Decoder[Mask] = msgspec.json.Decoder(Mask)
