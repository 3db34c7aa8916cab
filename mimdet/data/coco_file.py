"""A COCO instances file, read by declared types: the one reader of raw annotations.

`CocoReader` walks over every entry. What is wrong with one goes to its `report`: training refuses
the file at the first, `mimdet check-data` collects them all.
"""

import json
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import torch
from msgspec import Meta, Struct

from mimdet.data.rasters import crops_from_segmentations
from mimdet.structures import Record, Target, as_rle

Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Id = Whole | Annotated[str, Meta(min_length=1)]
Side = Annotated[int, Meta(gt=0, lt=2**31)]
Number = Annotated[float, Meta(gt=-1e9, lt=1e9)]
"""Beyond a billion there are no pixels."""
Polygons = list[list[Number]]
FAR = 10
"""Sides of the image that a polygon may leave it by: pycocotools takes memory for every pixel."""


class RunLengths(TypedDict):
    size: Annotated[list[Side], Meta(min_length=2, max_length=2)]
    """Height, width."""
    counts: str | list[Annotated[int, Meta(ge=0, lt=2**62)]]


Mask = Polygons | RunLengths | None
"""A COCO segmentation."""


class CategoryEntry(Struct):
    id: Whole
    name: str


class ImageEntry(Struct):
    id: Id
    file_name: Annotated[str, Meta(min_length=1)]
    height: Side
    width: Side


class AnnotationEntry(Struct):
    """An annotation as the file has it; None where a field is missing."""

    image_id: Id
    category_id: Whole
    bbox: tuple[Number, Number, Number, Number]
    """x, y, width, height in pixels."""
    id: Id | None = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")
    """Left encoded until the annotation's turn comes: it is most of the file."""
    area: Number | None = None
    iscrowd: Literal[0, 1] | bool | None = None


class Annotation(Struct, gc=False):
    """A checked annotation."""

    source_id: str
    """The file's own id, for messages."""
    category_id: int
    bbox: tuple[float, float, float, float]
    """x, y, width, height in pixels, as the file has it."""
    area: float
    """Of the file; where it has none, the pixels of the mask or else of the box."""
    iscrowd: bool
    mask: Mask = None
    """Polygons or compressed run lengths of the whole image; None where the file has none."""
    usable: bool = True
    """Trainable: no crowd, a box inside the image, no empty mask."""


@dataclass(slots=True, frozen=True)
class Problem:
    """One finding and its place."""

    kind: str
    """A key of `mimdet.data.checks.KINDS`."""
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


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 60


def brief(value: Any) -> str:
    """A value from a file, safe to print: short, on one line, without control characters."""
    return _BRIEF.repr(value)


def refuse(problem: Problem) -> None:
    place = ": ".join(part for part in (problem.file, problem.where) if part)
    raise ValueError(
        f"{place}: {problem.message}; correct it or remove it, `mimdet check-data` lists all "
        "that is wrong"
    )


class Sections(Struct):
    """The file with its entries still encoded."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


class Read(NamedTuple):
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
    left out, and a file that is none is one without entries.
    """

    def __init__(self, path: Path, report: Callable[[Problem], None] = refuse) -> None:
        self.path, self.report = path, report
        self.unsound: dict[str, set[Any]] = defaultdict(set)
        """Ids of entries that were left out: what refers to them is not reported again."""
        self.images: dict[int | str, Read] = {}
        self._sections = self._decoded()
        categories = self._by_id("categories", CategoryEntry, "duplicate-category-id")
        self.categories = {number: read.entry.name for number, read in categories.items()}
        """Category id -> name, in the order of the file."""
        self.images = self._by_id("images", ImageEntry, "duplicate-image-id")

    def problem(self, kind: str, message: str, read: Read | None = None) -> None:
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
            for position in of_image.pop(number, ()):
                entry = _ANNOTATION.decode(self._sections.annotations[position])
                read = Read("annotations", position, entry)
                try:
                    mask = _MASK.decode(entry.segmentation)
                    size = image.entry.height, image.entry.width
                    pairs.append((read, checked(entry, mask, *size)))
                except ValueError as error:
                    self.problem("bad-segmentation", f"segmentation: {error}", read)
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
            self.problem("not-coco", f"it is not a COCO instances file ({error})")
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
                self.problem("bad-field", str(error), Read(section, index, entry))


_ANNOTATION = msgspec.json.Decoder(AnnotationEntry)
_MASK: msgspec.json.Decoder[Mask] = msgspec.json.Decoder(Mask)


def checked(entry: AnnotationEntry, mask: Mask, height: int, width: int) -> Annotation:
    """An annotation of an image of height x width pixels, its mask decoded.

    Uncompressed run lengths are compressed. A box or mask that is only empty makes the annotation
    unusable; a mask that cannot be understood raises ValueError.
    """
    if isinstance(mask, dict):
        mask = compressed(mask, height, width)
    elif any(len(flat) % 2 for flat in mask or []):
        raise ValueError("a polygon has an odd number of coordinates; write x0, y0, x1, y1, ...")
    else:
        reach = FAR * max(height, width)
        if any(max(flat) > reach or min(flat) < -reach for flat in mask or [] if flat):
            raise ValueError(f"a polygon leaves its image by {FAR} times the image's size or more")
    annotation = Annotation(
        "without id" if entry.id is None else str(entry.id),
        entry.category_id,
        entry.bbox,
        0.0 if entry.area is None else entry.area,
        bool(entry.iscrowd),
        mask or None,
    )
    if entry.area is None:
        annotation.area = mask_area(annotation, height, width)
    annotation.usable = not annotation.iscrowd and not _is_empty(annotation, height, width)
    return annotation


def compressed(mask: RunLengths, height: int, width: int) -> RunLengths:
    """Run lengths that are known to fill the image: pycocotools does not look."""
    size, counts = mask["size"], mask["counts"]
    if size != [height, width]:
        swapped = " (height comes first)" if size == [width, height] else ""
        raise ValueError(
            f"its run lengths are for {(*size,)} pixels{swapped}, the image has {height, width}"
        )
    if height * width >= 2**32:
        raise ValueError(f"run lengths count to 2^32, the image has {height} x {width} pixels")
    if isinstance(counts, str):
        from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE

        try:
            (plain,) = toUncompressedRLE([{"size": size, "counts": counts.encode()}])
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        counts = plain["counts"]
    if sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"its runs cover {sum(counts)} of {height * width} pixels")
    if mask["counts"] is not counts:
        return mask
    return RunLengths(size=size, counts=as_rle(mask, height, width)["counts"].decode("ascii"))


def mask_area(annotation: Annotation, height: int, width: int) -> float:
    """Pixels of the mask, or of the box where there is no mask."""
    from pycocotools import mask as coco_mask

    mask = annotation.mask
    if isinstance(mask, list):
        mask = [flat for flat in mask if len(flat) >= 6]
    if mask:
        return float(coco_mask.area(as_rle(mask, height, width)))
    _, _, w, h = annotation.bbox
    return max(w, 0.0) * max(h, 0.0)


def mask_extent(mask: Mask, least: int = 0) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 of a mask, x2 <= x1 or y2 <= y1 if it is empty; None without one.

    least: polygons of fewer numbers than that are left out.
    """
    from pycocotools import mask as coco_mask

    if mask is None:
        return None
    if isinstance(mask, dict):
        x, y, w, h = coco_mask.toBbox(mask).tolist()
        return x, y, x + w, y + h
    flat = [value for flat in mask if len(flat) >= least for value in flat] or [0.0, 0.0]
    return min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])


def _is_empty(annotation: Annotation, height: int, width: int) -> bool:
    boxes = clipped_box(annotation.bbox, height, width), mask_extent(annotation.mask, 6)
    return any(box is not None and (box[2] <= box[0] or box[3] <= box[1]) for box in boxes)


def clipped_box(
    bbox: Sequence[float], height: int, width: int
) -> tuple[float, float, float, float]:
    """x, y, width, height -> x1, y1, x2, y2 inside the image; empty where x2 <= x1 or y2 <= y1."""
    x, y, w, h = bbox
    return max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))


class AnnotatedImages:
    """What data sets of annotations have in common; `Dataset` in `mimdet.data.loader` says what.

    A subclass adds `__len__`, `image`, `image_id`, `image_size` and `annotations`.
    """

    categories: list[str]
    category_ids: list[int]
    has_masks: bool

    def annotations(self, index: int) -> list[Annotation]:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        """The image and its trainable annotations as tensors."""
        dataset: Any = self
        usable = [annotation for annotation in self.annotations(index) if annotation.usable]
        size = dataset.image_size(index)
        boxes = [clipped_box(annotation.bbox, *size) for annotation in usable]
        labels = [self.category_ids.index(annotation.category_id) for annotation in usable]
        masks = [annotation.mask for annotation in usable]
        target = Target(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
            crops_from_segmentations(masks, *size) if self.has_masks else None,
        )
        return Record(dataset.image(index), target, dataset.image_id(index))

    def ground_truth(self) -> dict[str, Any]:
        """A COCO dictionary for evaluation: crowds included, annotation ids renumbered from 1.

        Renumbered because pycocotools takes a match with annotation 0 for no match. A crowd without
        a mask gets its box as one: detections there are left out, as they are of boxes.
        """
        dataset: Any = self
        images: list[dict[str, Any]] = []
        items: list[dict[str, Any]] = []
        for index in range(len(dataset)):
            height, width = dataset.image_size(index)
            images.append({"id": dataset.image_id(index), "height": height, "width": width})
            for annotation in self.annotations(index):
                item = {
                    "id": len(items) + 1,
                    "image_id": images[-1]["id"],
                    "category_id": annotation.category_id,
                    "bbox": list(annotation.bbox),
                    "area": annotation.area,
                    "iscrowd": int(annotation.iscrowd),
                }
                if annotation.mask is not None:
                    item["segmentation"] = annotation.mask
                elif annotation.iscrowd:
                    x1, y1, x2, y2 = clipped_box(annotation.bbox, height, width)
                    item["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
                items.append(item)
        pairs = zip(self.category_ids, self.categories, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        head: dict[str, Any] = {"info": {}, "licenses": []}
        return head | {"images": images, "annotations": items, "categories": categories}
