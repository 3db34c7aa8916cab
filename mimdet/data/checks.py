"""What is wrong with a COCO-format data set, and where.

`check_dataset` runs the reader of `coco_file` over every entry, collects what it refuses, and looks
for what can be read but is wrong all the same: in the boxes, masks and image files, and in the data
set as a whole. It never raises for what it finds. What may be found is listed in `KINDS`.
"""

import hashlib
import os
import textwrap
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mimdet.data.annotations import TOLERANCE, Annotation, Note, brief
from mimdet.data.coco_file import ERRORS, KINDS, CocoReader, Problem, Read
from mimdet.images import SIDEWAYS, open_image, orientation


@dataclass(slots=True)
class Report:
    """All findings in one data set, and what it holds."""

    problems: list[Problem]
    summary: dict[str, Any]
    """Counts: images, annotations, categories, crowds, empty_images, with_masks,
    class_histogram {name: instances}, instances_per_image and image_width / image_height
    {min, 25%, 50%, 75%, max}, size_share {small, medium, large} (areas below 32^2, below 96^2
    and above; crowds left out)."""

    @property
    def errors(self) -> int:
        """How many findings are no mere warnings."""
        return sum(problem.kind in ERRORS for problem in self.problems)

    @property
    def ok(self) -> bool:
        """True without errors; warnings do not count."""
        return not self.errors

    def by_kind(self) -> dict[str, list[Problem]]:
        """Findings by kind, errors first."""
        found = {kind: [one for one in self.problems if one.kind == kind] for kind in KINDS}
        return {kind: problems for kind, problems in found.items() if problems}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for json."""
        problems = [
            asdict(one) | {"severity": _severity(one.kind), "remedy": KINDS[one.kind]}
            for one in self.problems
        ]
        return {"ok": self.ok, "summary": self.summary, "problems": problems}

    def table(self, examples: int = 3) -> str:
        """Text for a terminal: the summary, then each kind with its count, the first `examples`
        places and the remedy."""
        lines = _summary_lines(self.summary)
        for kind, problems in self.by_kind().items():
            lines += ["", f"{_severity(kind)} {kind} ({len(problems)})"]
            lines += [
                f"    {problem.where or problem.file}: {problem.message}"
                for problem in problems[:examples]
            ]
            if len(problems) > examples:
                lines.append(f"    ... and {len(problems) - examples} more")
            lines.append(textwrap.fill(f"-> {KINDS[kind]}", 100, subsequent_indent="   "))
        lines += ["", f"{self.errors} errors, {len(self.problems) - self.errors} warnings"]
        return "\n".join(lines)


def _severity(kind: str) -> str:
    return "error" if kind in ERRORS else "warning"


def _summary_lines(summary: dict[str, Any], classes: int = 10) -> list[str]:
    keys = ("images", "empty_images", "annotations", "crowds", "with_masks", "categories")
    lines = [", ".join(f"{key.replace('_', ' ')} {summary[key]}" for key in keys)]
    groups = {key: summary[key] for key in ("instances_per_image", "image_width", "image_height")}
    groups["object_size"] = {k: f"{share:.0%}" for k, share in summary["size_share"].items()}
    histogram = Counter(summary["class_histogram"]).most_common(classes)
    groups["instances_by_class"] = {brief(name): count for name, count in histogram}
    for title, group in groups.items():
        if group:
            pairs = ", ".join(f"{key} {value}" for key, value in group.items())
            lines.append(f"{title.replace('_', ' ')}: {pairs}")
    more = len(summary["class_histogram"]) - classes
    return [*lines, f"    and {more} more classes"] if more > 0 else lines


SMALL, MEDIUM = 32**2, 96**2
"""Areas in pixels below which COCO calls an object small, medium."""


def check_dataset(
    json_path: str | Path, image_folder: str | Path, decode: bool = True, progress: bool = False
) -> Report:
    """Check a COCO instances file and its images.

    decode: read every image to its last pixel (finds truncated and identical files); without it
    only the headers are read. progress: show a bar. A missing file or folder is a finding too.
    """
    from tqdm import tqdm

    problems: list[Problem] = []
    reader = CocoReader(Path(json_path), problems.append, thorough=True)
    files = ImageFolder(Path(image_folder), decode)
    if reader.images and not files.folder.is_dir():
        reader.problem("folder-missing", f"{image_folder} is not a folder")
    survey, count = Survey(reader), len(reader.images)
    for image, _ in tqdm(survey.rows(), "images", count, disable=not progress):
        files.check(image, partial(reader.problem, read=image))
    return Report(problems, survey.summary())


@dataclass
class Survey:
    """A whole file, image by image: counts, and what is wrong with several entries together."""

    reader: CocoReader
    names: dict[str, int] = field(default_factory=dict)
    """File name -> place of its first image."""
    ids: set[int | str] = field(default_factory=set)
    """Of annotations; without their places, which would take 60 MB of COCO's."""
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    """Width, height and annotations of each image."""
    classes: Counter[int] = field(default_factory=Counter)
    """Category id -> its objects, crowds left out: 0 where it has crowds alone."""
    areas: "array[float]" = field(default_factory=lambda: array("d"))
    """Of the objects, crowds left out."""
    masked: Counter[bool] = field(default_factory=Counter)
    """By whether they are crowds: the annotations that have a mask."""
    without_mask: list[Read] = field(default_factory=list)
    """Single objects; after the first with a mask they are complete only in number."""
    small_boxes: int = 0
    """Boxes without a number above 1, in images of more than 2 pixels."""
    leaving: int = 0
    """Boxes that leave their image as x, y, width, height."""
    as_corners: int = 0
    """Boxes that are sound as x1, y1, x2, y2."""

    def rows(self) -> Iterator[tuple[Read, list[tuple[Read, Annotation]]]]:
        """Those of the reader, after the last of which the whole is judged."""
        for image, pairs in self.reader.rows():
            self._add(image, pairs)
            yield image, pairs
        self._finish()

    def _add(self, image: Read, pairs: list[tuple[Read, Annotation]]) -> None:
        note, name = partial(self.reader.problem, read=image), image.entry.file_name
        first = self.names.setdefault(name, image.position)
        if first != image.position:
            note("duplicate-file-name", f"also in images[{first}]")
        if leaves_folder(name):
            note("file-name-leaves-folder", f"file_name is {brief(name)}")
        width, height = image.entry.width, image.entry.height
        self.sizes.append((width, height, len(pairs)))
        boxes: dict[tuple[Any, ...], int] = {}
        for read, annotation in pairs:
            self._add_object(read, annotation, width, height)
            if not annotation.iscrowd:
                key = annotation.category_id, annotation.bbox
                twin = boxes.setdefault(key, read.position)
                if twin != read.position:
                    found = f"the same as annotations[{twin}]"
                    self.reader.problem("duplicate-annotation", found, read)

    def _add_object(self, read: Read, annotation: Annotation, width: int, height: int) -> None:
        number = read.entry.id
        if not number:
            found = "it has no id" if number is None else "id is 0"
            self.reader.problem("annotation-id", found, read)
        if number is not None:
            if number in self.ids:
                found = f"an annotation before it has the id {brief(number)} too"
                self.reader.problem("duplicate-annotation-id", found, read)
            self.ids.add(number)
        self.classes[annotation.category_id] += not annotation.iscrowd
        masked = annotation.mask is not None
        self.masked[annotation.iscrowd] += masked
        if not annotation.iscrowd:
            self.areas.append(annotation.area)
            if not masked:
                self.without_mask.append(read)
        x, y, second_x, second_y = annotation.bbox
        self.small_boxes += (
            max(annotation.bbox) <= 1 and min(annotation.bbox) >= -1 and min(width, height) > 2
        )
        self.leaving += x + second_x > width + TOLERANCE or y + second_y > height + TOLERANCE
        self.as_corners += x < second_x <= width + TOLERANCE and y < second_y <= height + TOLERANCE

    def _finish(self) -> None:
        """Judge the whole; true xywh boxes meet neither condition on their layout."""
        problem, reader = self.reader.problem, self.reader
        total, single = sum(count for *_, count in self.sizes), len(self.areas)
        if total >= 4 and self.small_boxes == total:
            problem("boxes-look-normalised", f"no number in {total} boxes is above 1")
        elif total >= 4 and self.as_corners > 0.99 * total and self.leaving > 0.2 * total:
            found = f"of {total} boxes {self.leaving / total:.0%} leave their image as x, y, width,"
            sound = f"{self.as_corners / total:.0%} are sound"
            problem("boxes-look-xyxy", f"{found} height; as x1, y1, x2, y2 {sound}")
        for read in self.without_mask if self.masked[False] else ():
            found = f"{self.masked[False]} objects have a mask, this one has not"
            problem("segmentation-missing", found, read)
        if total > 2 * single:
            problem("mostly-crowds", f"{total - single} of {total} annotations have iscrowd 1")
        names: set[str] = set()
        for number, name in reader.categories.items():
            found = f"category {number} {brief(name)}"
            if name in names:
                problem("duplicate-category-name", found)
            names.add(name)
            if number not in self.classes:
                problem("category-unused", found)
        empty = sum(not count for *_, count in self.sizes)
        if empty > len(self.sizes) / 2:
            problem("mostly-empty-images", f"{empty} of {len(self.sizes)} images")

    def summary(self) -> dict[str, Any]:
        """See `Report.summary`."""
        columns = np.array(self.sizes, dtype=np.int64).reshape(-1, 3)
        areas = np.array(self.areas)
        edges = np.digitize(areas[areas > 0], [SMALL, MEDIUM])
        labels = ("small", "medium", "large")
        total = int(columns[:, 2].sum())
        return {
            "images": len(columns),
            "empty_images": int((columns[:, 2] == 0).sum()),
            "annotations": total,
            "crowds": total - len(areas),
            "with_masks": sum(self.masked.values()),
            "categories": len(self.reader.categories),
            "class_histogram": {
                name: self.classes[number] for number, name in self.reader.categories.items()
            },
            "instances_per_image": _quartiles(columns[:, 2]),
            "image_width": _quartiles(columns[:, 0]),
            "image_height": _quartiles(columns[:, 1]),
            "size_share": {
                k: float(np.mean(edges == i)) for i, k in enumerate(labels) if len(edges)
            },
        }


def _quartiles(values: np.ndarray) -> dict[str, int]:
    """min, 25%, 50%, 75% and max, each a value that occurs; empty for no values."""
    if not len(values):
        return {}
    cuts = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], method="nearest")
    return dict(zip(("min", "25%", "50%", "75%", "max"), map(int, cuts), strict=True))


class ImageFolder:
    """The image folder: every file is opened once, and its content remembered by its digest."""

    def __init__(self, folder: Path, decode: bool) -> None:
        self.folder, self.decode = folder, decode
        self.names: set[str] = set()
        self.digests: dict[str, str] = {}

    def check(self, image: Read, note: Note) -> None:
        """Look for faults of one image file.

        Whatever Pillow raises for a file that is broken, cut off, of an unknown format or so large
        that it looks like a decompression bomb is a finding.
        """

        name, said = image.entry.file_name, (image.entry.width, image.entry.height)
        path = self.folder / name
        if name in self.names or not self.folder.is_dir():
            return
        self.names.add(name)
        if not os.path.isfile(path):  # also False for names no file can have
            other = self.by_name.get(path.name.lower())
            hint = f"; did you mean {brief(other)}?" if other else ""
            note("image-missing", f"there is no {path}{hint}")
            return
        target = link_target(self.folder, path)
        if target and not leaves_folder(name):
            note("link-leaves-folder", f"it leads to {target}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd tags and of large images
                with open_image(path) as opened:
                    if self.decode:
                        opened.load()
                    size, mode = opened.size, opened.mode
                    # A PNG may keep its EXIF behind the pixels, which takes decoding.
                    skip = not self.decode and opened.format == "PNG" and size == said
                    turned = 1 if skip else orientation(opened)
        except Exception as error:  # Pillow's readers raise nearly anything
            note("image-unreadable", f"{type(error).__name__}: {error}")
            return
        if size == said and turned != 1:
            note("image-rotated", f"EXIF orientation {turned}")
        elif size != said and not (turned in SIDEWAYS and size == said[::-1]):
            note("image-size-wrong", size_words(said, size))
        if mode.startswith(("F", "I")):
            kind = "image-float" if mode == "F" else "image-16-bit"
            note(kind, f"Pillow's mode is {mode}")
        if self.decode:
            twin = self.digests.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), name)
            if twin != name:
                note("duplicate-image-content", f"the same bytes as {brief(twin)}")

    @cached_property
    def by_name(self) -> dict[str, str]:
        """All files below the folder, by their names in lower case."""
        files = [path.relative_to(self.folder) for path in self.folder.rglob("*")]
        return {file.name.lower(): file.as_posix() for file in files}


def leaves_folder(name: str) -> bool:
    return os.path.isabs(name) or ".." in name.replace(os.sep, "/").split("/")


def size_words(said: tuple[int, int], found: tuple[int, int]) -> str:
    """said, found: (width, height)."""
    swapped = " (swapped)" if found == said[::-1] else ""
    says = f"the annotations say {said[0]} x {said[1]}{swapped}"
    return f"{says}, the file is {found[0]} x {found[1]}"


def link_target(folder: Path, path: Path) -> str:
    """Where a file of the folder lies if a link leads out of it; else empty."""
    target = os.path.realpath(path)
    return "" if Path(target).is_relative_to(os.path.realpath(folder)) else target
