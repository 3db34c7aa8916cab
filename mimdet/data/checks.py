"""What is wrong with a COCO-format data set, and where.

`check_dataset` reads the annotation file as one that may hold anything, looks at every entry and
every image, and never raises for what it finds there: each fault becomes a `Problem` that names the
file, the image and the annotation. What may be found is listed in `check_report.KINDS`.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mimdet.data import check_rules as rules
from mimdet.data.check_files import ImageFolder
from mimdet.data.check_report import Problem, Report, brief

__all__ = ["Problem", "Report", "check_dataset"]

SMALL, MEDIUM = 32**2, 96**2
"""Areas in pixels below which COCO calls an object small, medium."""


def check_dataset(
    json_path: str | Path, image_folder: str | Path, decode: bool = True, progress: bool = False
) -> Report:
    """Check a COCO instances file and its images.

    decode: read every image to its last pixel (finds truncated and identical files); without it
    only the headers are read. progress: show a bar. A missing file or folder is a finding too.
    """
    json_path = Path(json_path)
    check = _Check(json_path.name, Path(image_folder), decode, progress)
    content = check.read(json_path)
    check.categories(content["categories"])
    check.images(content["images"])
    check.annotations(content["annotations"])
    check.whole()
    return Report(check.problems, check.summary())


Where = dict[str, Any]
"""The fields of a `Problem` that say where it is."""


@dataclass(slots=True)
class _Image:
    """What the annotations of an image are checked against."""

    where: Where
    size: tuple[int, int] | None
    """(width, height) of the file or, where it cannot be read, of the annotation file."""
    annotations: int = 0


@dataclass(slots=True)
class _Object:
    """What is kept of an annotation to judge the data set as a whole."""

    where: Where
    category: int | None
    crowd: bool
    masked: bool
    box: list[float] | None
    """x, y, width, height; None if they are not four numbers."""
    size: tuple[int, int] | None
    """(width, height) of the image."""
    area: float
    """In pixels; 0 if unknown."""


@dataclass(slots=True)
class _Check:
    """One walk over a data set: categories, images, annotations, then the whole."""

    file: str
    folder: Path
    decode: bool
    progress: bool
    problems: list[Problem] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    """Category id -> name."""
    known: dict[int | str, _Image] = field(default_factory=dict)
    """Image id -> image."""
    id_types: set[type] = field(default_factory=set)
    """Types of these ids."""
    listed: int = 0
    """Entries in `images`."""
    objects: list[_Object] = field(default_factory=list)

    def add(self, kind: str, message: str, where: Where | None = None) -> None:
        self.problems.append(Problem(kind, message, self.file, **(where or {})))

    def read(self, path: Path) -> dict[str, list[Any]]:
        """The three sections; empty ones where the file has none."""
        sections: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not json, not text
            self.add("json-unreadable", f"{type(error).__name__}: {error}")
            return sections
        if not isinstance(content, dict):
            hint = " (a results file?)" if isinstance(content, list) else ""
            self.add("not-coco", f"it holds {brief(content)}{hint}")
            return sections
        for name in sections:
            if isinstance(content.get(name), list):
                sections[name] = content[name]
            else:
                found = f"is {brief(content[name])}" if name in content else "is not there"
                self.add("missing-section", f"{name} {found}")
        for name in ("images", "categories"):
            if content.get(name) == []:
                self.add("empty-section", f"{name} is an empty list")
        return sections

    def is_entry(self, entry: Any, where: Where, keys: tuple[str, ...]) -> bool:
        """Whether the entry is an object; its missing keys are reported."""
        if not isinstance(entry, dict):
            self.add("bad-entry", f"it is {brief(entry)}", where)
            return False
        for key in keys:
            if key not in entry:
                self.add("missing-key", f"{key} is not there", where)
        return True

    def categories(self, section: list[Any]) -> None:
        names: set[str] = set()
        for index, entry in enumerate(section):
            where = {"entry": f"categories[{index}]"}
            if not self.is_entry(entry, where, ("id", "name")):
                continue
            number, name = entry.get("id"), entry.get("name", "")
            if not isinstance(name, str):
                self.add("bad-category-name", f"name is {brief(name)}", where)
                name = brief(name)
            elif name in names:
                self.add("duplicate-category-name", f"name {brief(name)}", where)
            names.add(name)
            if not rules.is_id(number) or isinstance(number, str):
                if "id" in entry:
                    self.add("bad-id", f"id is {brief(number)}, not a whole number", where)
            elif number in self.names:
                found = f"id {number} of {brief(self.names[number])} and of {brief(name)}"
                self.add("duplicate-category-id", found, where)
            else:
                self.names[number] = name

    def images(self, section: list[Any]) -> None:
        from tqdm import tqdm

        self.listed = len(section)
        files = ImageFolder(self.folder, self.decode) if self.folder.is_dir() else None
        if section and files is None:
            self.add("folder-missing", f"{self.folder} is not a folder")
        names: dict[str, str] = {}
        for index, entry in enumerate(tqdm(section, desc="images", disable=not self.progress)):
            where = _place(f"images[{index}]", entry, image_id="id", file_name="file_name")
            if not self.is_entry(entry, where, ("id", "file_name", "width", "height")):
                continue
            number, name = entry.get("id"), entry.get("file_name")
            if "id" in entry and not rules.is_id(number):
                self.add("bad-id", f"id is {brief(number)}", where)
            size = self.stored_size(entry, where)
            if isinstance(name, str) and name:
                if name in names:
                    self.add("duplicate-file-name", f"also in {names[name]}", where)
                elif files is not None:
                    findings, size = files.check(name, size)
                    self.problems += [Problem(*found, self.file, **where) for found in findings]
                names.setdefault(name, where["entry"])
            elif "file_name" in entry:
                self.add("bad-file-name", f"file_name is {brief(name)}", where)
            if rules.is_id(number) and number in self.known:
                found = f"also the id of {self.known[number].where['entry']}"
                self.add("duplicate-image-id", found, where)
            elif rules.is_id(number):
                self.known[number] = _Image(where, size)
                self.id_types.add(type(number))

    def stored_size(self, entry: dict[str, Any], where: Where) -> tuple[int, int] | None:
        if "width" not in entry or "height" not in entry:
            return None
        width, height = entry["width"], entry["height"]
        if rules.is_count(width) and rules.is_count(height):
            return width, height
        self.add("bad-image-size", f"width {brief(width)}, height {brief(height)}", where)
        return None

    def annotations(self, section: list[Any]) -> None:
        from tqdm import tqdm

        ids: dict[int | str, str] = {}
        boxes: dict[tuple[Any, ...], str] = {}
        bar = tqdm(section, desc="annotations", disable=not self.progress)
        for index, entry in enumerate(bar):
            place = f"annotations[{index}]"
            where = _place(place, entry, annotation_id="id", image_id="image_id")
            image = self.known.get(where.get("image_id"))  # type: ignore[arg-type]
            if image is not None:
                where["file_name"] = image.where.get("file_name")
                image.annotations += 1
            if not self.is_entry(entry, where, ("id", "image_id", "category_id", "bbox")):
                continue
            self.ids_of(entry, where, ids)
            category = self.category_of(entry, where)
            one = self.annotation(entry, where, image, category)
            self.objects.append(one)
            if one.box is None or one.crowd or image is None:
                continue
            twin = boxes.setdefault((where["image_id"], category, *one.box), place)
            if twin != place:
                self.add("duplicate-annotation", f"the same as {twin}", where)

    def ids_of(self, entry: dict[str, Any], where: Where, ids: dict[int | str, str]) -> None:
        """Check the annotation's own id and its image's; ids: id -> the entry that has it."""
        for key in ("id", "image_id"):
            if key in entry and not rules.is_id(entry[key]):
                self.add("bad-id", f"{key} is {brief(entry[key])}", where)
        number, image_id = where.get("annotation_id"), where.get("image_id")
        if number is not None:
            if number == 0:
                self.add("annotation-id-zero", "id is 0", where)
            first = ids.setdefault(number, where["entry"])
            if first != where["entry"]:
                self.add("duplicate-annotation-id", f"also the id of {first}", where)
        if image_id is not None and image_id not in self.known and self.listed:
            alike = type(image_id) in self.id_types
            hint = "" if alike else " (a number in one place and text in the other?)"
            self.add("unknown-image", f"image_id is {brief(image_id)}{hint}", where)

    def category_of(self, entry: dict[str, Any], where: Where) -> int | None:
        number = entry.get("category_id")
        if not rules.is_id(number) or isinstance(number, str):
            if "category_id" in entry:
                self.add("bad-id", f"category_id is {brief(number)}, not a whole number", where)
            return None
        if number not in self.names:
            if self.names:
                self.add("unknown-category", f"category_id is {number}", where)
            return None
        return number

    def annotation(
        self, entry: dict[str, Any], where: Where, image: _Image | None, category: int | None
    ) -> _Object:
        """Check box, mask, area and iscrowd against each other and against the image."""
        size = None if image is None else image.size
        box, segmentation = entry.get("bbox"), entry.get("segmentation")
        crowd, area = entry.get("iscrowd"), entry.get("area")
        findings = list(rules.box_findings(box, size)) if "bbox" in entry else []
        shape = None
        if segmentation not in (None, []):
            faults, shape = rules.segmentation_findings(segmentation, size)
            findings += faults
        if not rules.is_box(box):
            box = None
        elif shape is not None and box[2] > 0 and box[3] > 0:
            findings += rules.shape_findings(shape, box)
        if "area" in entry:
            findings += rules.area_findings(area, box, shape)
        else:
            findings.append(("area-missing", "area is not there"))
        if "iscrowd" not in entry:
            findings.append(("iscrowd-missing", "iscrowd is not there"))
        elif crowd not in (0, 1):
            findings.append(("bad-iscrowd", f"iscrowd is {brief(crowd)}"))
        elif crowd and isinstance(segmentation, list) and segmentation:
            findings.append(("crowd-with-polygon", f"{len(segmentation)} polygons"))
        for kind, message in findings:
            self.add(kind, message, where)
        if not rules.is_number(area):
            area = 0.0 if box is None else box[2] * box[3]
        masked = segmentation not in (None, [])
        return _Object(where, category, crowd == 1, masked, box, size, area)

    def whole(self) -> None:
        """Faults that show only over all annotations."""
        placed = [one for one in self.objects if one.box is not None and one.size is not None]
        if placed:
            boxes = np.array([one.box for one in placed], dtype=np.float64)  # (N, 4)
            sizes = np.array([one.size for one in placed], dtype=np.float64)  # (N, 2)
            for kind, message in rules.layout_findings(boxes, sizes):
                self.add(kind, message)
        bare = [one for one in self.objects if not one.masked]
        if len(bare) < len(self.objects):
            for one in bare:
                found = f"{len(self.objects) - len(bare)} annotations have a mask, this one has not"
                self.add("segmentation-missing", found, one.where)
        used = {one.category for one in self.objects}
        for number, name in self.names.items():
            if number not in used:
                self.add("category-unused", f"category {number} {brief(name)}")
        empty = sum(image.annotations == 0 for image in self.known.values())
        if empty > len(self.known) / 2:
            self.add("mostly-empty-images", f"{empty} of {len(self.known)} images")

    def summary(self) -> dict[str, Any]:
        """See `Report.summary`."""
        single = [one for one in self.objects if not one.crowd]
        classes = Counter(self.names[one.category] for one in single if one.category is not None)
        areas = np.array([one.area for one in single if one.area > 0])
        shares: dict[str, float] = {}
        if len(areas):
            edges = np.digitize(areas, [SMALL, MEDIUM])
            labels = ("small", "medium", "large")
            shares = {label: float(np.mean(edges == i)) for i, label in enumerate(labels)}
        images = self.known.values()
        sizes = [image.size for image in images if image.size is not None]
        return {
            "images": self.listed,
            "empty_images": sum(image.annotations == 0 for image in images),
            "annotations": len(self.objects),
            "crowds": len(self.objects) - len(single),
            "with_masks": sum(one.masked for one in self.objects),
            "categories": len(self.names),
            "class_histogram": {name: classes[name] for name in self.names.values()},
            "instances_per_image": _quartiles([image.annotations for image in images]),
            "image_width": _quartiles([width for width, _ in sizes]),
            "image_height": _quartiles([height for _, height in sizes]),
            "size_share": shares,
        }


def _place(entry_name: str, entry: Any, **keys: str) -> Where:
    """Where an entry is: its place in the file and, as far as they are sound, its ids.

    keys: field of a `Problem` = key of the entry.
    """
    where: Where = {"entry": entry_name}
    if isinstance(entry, dict):
        ids = {name: entry.get(key) for name, key in keys.items()}
        where |= {name: value for name, value in ids.items() if rules.is_id(value)}
    return where


def _quartiles(values: list[int]) -> dict[str, int]:
    """min, 25%, 50%, 75% and max, each a value that occurs; empty for no values."""
    if not values:
        return {}
    cuts = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], method="nearest")
    return dict(zip(("min", "25%", "50%", "75%", "max"), map(int, cuts), strict=True))
