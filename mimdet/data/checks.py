"""What is wrong with a COCO-format data set, and where.

`check_dataset` runs the reader of `coco_file` over every entry, collects what it refuses, and looks
for what can be read but is wrong all the same: in the boxes, masks and image files, and in the data
set as a whole. It never raises for what it finds. What may be found is listed in `KINDS`.
"""

import hashlib
import os
import textwrap
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from mimdet.data.coco_file import (
    Annotation,
    CocoReader,
    Problem,
    Read,
    brief,
    mask_area,
    mask_extent,
)
from mimdet.images import open_image

_KINDS = tomllib.loads(Path(__file__).with_name("check_kinds.toml").read_text("utf-8"))
ERRORS: dict[str, str] = _KINDS["errors"]
"""Kinds of faults that spoil training or its numbers, and what to do about each."""
WARNINGS: dict[str, str] = _KINDS["warnings"]
"""Kinds that may be meant so, and what to do if not."""
KINDS = ERRORS | WARNINGS
"""Every kind with its remedy, in the order in which findings are printed."""


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
TOLERANCE = 1.0
"""Pixels a box may reach out of its image: rounding and 1-based tools."""
EXIF_ORIENTATION = 0x0112

Note = Callable[[str, str], None]
"""Takes kind and message of a finding; its place is known."""


def check_dataset(
    json_path: str | Path, image_folder: str | Path, decode: bool = True, progress: bool = False
) -> Report:
    """Check a COCO instances file and its images.

    decode: read every image to its last pixel (finds truncated and identical files); without it
    only the headers are read. progress: show a bar. A missing file or folder is a finding too.
    """
    from tqdm import tqdm

    problems: list[Problem] = []
    reader = CocoReader(Path(json_path), problems.append)
    files = ImageFolder(Path(image_folder), decode)
    if reader.images and not files.folder.is_dir():
        reader.problem("folder-missing", f"{image_folder} is not a folder")
    images: list[_Image] = []
    objects: list[_Object] = []
    count = len(reader.images)
    for image, pairs in tqdm(reader.rows(), "images", count, disable=not progress):
        size = files.check(image, partial(reader.problem, read=image))
        images.append(_Image(*size, len(pairs)))
        for read, annotation in pairs:
            _check_annotation(read, annotation, size, partial(reader.problem, read=read))
            masked = annotation.mask is not None
            objects.append(_Object(read, annotation.iscrowd, masked, size, annotation.area))
    _check_twins(reader, objects)
    _check_layout(reader, objects)
    _check_whole(reader, images, objects)
    return Report(problems, _summary(reader, images, objects))


class _Image(NamedTuple):
    width: int
    height: int
    annotations: int


class _Object(NamedTuple):
    """What is kept of an annotation to judge the data set as a whole."""

    read: Read
    crowd: bool
    masked: bool
    size: tuple[int, int]
    """(width, height) of the image."""
    area: float


def _check_annotation(
    read: Read, annotation: Annotation, size: tuple[int, int], note: Note
) -> None:
    """What is wrong with an annotation that can be read; size: (width, height) of its image."""
    width, height = size
    x, y, w, h = box = annotation.bbox
    polygons = annotation.mask if isinstance(annotation.mask, list) else []
    over = max(-x, -y, x + w - width, y + h - height)
    if w <= 0 or h <= 0:
        note("empty-box", f"width {w:g}, height {h:g}")
    elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
        note("box-outside", f"bbox {brief(box)} in an image of {width} x {height}")
    elif over > TOLERANCE:
        note("box-exceeds-image", f"by {over:.1f} pixels: {brief(box)} in {width} x {height}")
    for part, flat in enumerate(polygons):
        if len(flat) < 6:
            note("polygon-too-short", f"part {part} has {len(flat) // 2} points")
    if annotation.iscrowd and polygons:
        note("crowd-with-polygon", f"{len(polygons)} polygons")
    extent = mask_extent(annotation.mask)
    if extent is not None and (extent[2] <= extent[0] or extent[3] <= extent[1]):
        note("segmentation-empty", "its mask encloses nothing")
        extent = None
    elif extent is not None and w > 0 and h > 0:
        _compare_extents(extent, (x, y, x + w, y + h), note)
    if read.entry.iscrowd is None:
        note("iscrowd-missing", "iscrowd is not there")
    if read.entry.area is None:
        note("area-missing", "area is not there")
    elif annotation.area <= 0:
        note("bad-area", f"area is {annotation.area:g}")
    elif extent is not None:
        # A polygon's area and its pixel count differ by up to half its outline.
        own = mask_area(annotation, height, width)
        outline = extent[2] - extent[0] + extent[3] - extent[1]
        if abs(annotation.area - own) > 0.2 * max(annotation.area, own) + outline:
            note("area-mismatch", f"area is {annotation.area:g}, its mask covers {own:g}")
    elif w > 0 and h > 0 and not polygons:
        own = w * h  # an upper bound: masks may have been dropped, their areas kept
        if not 0.01 * own <= annotation.area <= 1.2 * own + w + h:
            note("area-mismatch", f"area is {annotation.area:g}, its box covers {own:g}")


def _compare_extents(mask: tuple[float, ...], box: tuple[float, ...], note: Note) -> None:
    """Compare a mask's extent with its box, both x1, y1, x2, y2.

    COCO's own boxes are the extents of their polygons to 1e-12. Tools that round or count whole
    pixels stay within 2 pixels; tools that pad their boxes, above an overlap (IoU) of 0.6.
    """
    apart = max(abs(a - b) for a, b in zip(mask, box, strict=True))
    w = min(mask[2], box[2]) - max(mask[0], box[0])
    h = min(mask[3], box[3]) - max(mask[1], box[1])
    common = max(0.0, w) * max(0.0, h)
    union = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (mask, box)) - common
    if apart > 2 and common < 0.6 * union:
        ours, theirs = (", ".join(f"{edge:.1f}" for edge in edges) for edges in (mask, box))
        note("segmentation-box-mismatch", f"mask spans {ours}; box spans {theirs} (x1 y1 x2 y2)")


class ImageFolder:
    """The image folder: every file is opened once, and its content remembered by its digest."""

    def __init__(self, folder: Path, decode: bool) -> None:
        self.folder, self.decode = folder, decode
        self.names: dict[str, int] = {}
        self.digests: dict[str, str] = {}

    def check(self, image: Read, note: Note) -> tuple[int, int]:
        """Look for faults of one image -> its (width, height): the file's, else the entry's.

        Whatever Pillow raises for a file that is broken, cut off, of an unknown format or so large
        that it looks like a decompression bomb is a finding.
        """

        name, stored = image.entry.file_name, (image.entry.width, image.entry.height)
        path = self.folder / name
        first = self.names.setdefault(name, image.position)
        if first != image.position:
            note("duplicate-file-name", f"also in images[{first}]")
            return stored
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            note("file-name-leaves-folder", f"file_name is {brief(name)}")
        if not self.folder.is_dir():
            return stored
        if not os.path.isfile(path):  # also False for names no file can have
            other = self.by_name.get(path.name.lower())
            hint = f"; did you mean {brief(other)}?" if other else ""
            note("image-missing", f"no such file{hint}")
            return stored
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd tags and of large images
                with open_image(path) as opened:
                    if self.decode:
                        opened.load()
                    size, mode = opened.size, opened.mode
                    # Without decoding: a PNG may keep its EXIF behind the pixels.
                    skip = not self.decode and opened.format == "PNG"
                    turned = 1 if skip else opened.getexif().get(EXIF_ORIENTATION, 1)
        except Exception as error:  # Pillow's readers raise nearly anything
            note("image-unreadable", f"{type(error).__name__}: {error}")
            return stored
        if size != stored:
            swapped = " (swapped)" if size == stored[::-1] else ""
            says = f"the annotations say {stored[0]} x {stored[1]}{swapped}"
            note("image-size-wrong", f"{says}, the file is {size[0]} x {size[1]}")
        if turned in range(2, 9):
            note("image-rotated", f"EXIF orientation {turned}")
        if mode.startswith(("F", "I")):
            kind = "image-float" if mode == "F" else "image-16-bit"
            note(kind, f"Pillow's mode is {mode}")
        if self.decode:
            twin = self.digests.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), name)
            if twin != name:
                note("duplicate-image-content", f"the same bytes as {brief(twin)}")
        return size

    @cached_property
    def by_name(self) -> dict[str, str]:
        """All files below the folder, by their names in lower case."""
        files = [path.relative_to(self.folder) for path in self.folder.rglob("*")]
        return {file.name.lower(): file.as_posix() for file in files}


def _check_twins(reader: CocoReader, objects: list[_Object]) -> None:
    """Annotations that occur twice, or whose id does."""
    ids: dict[Any, int] = {}
    boxes: dict[tuple[Any, ...], int] = {}
    for read, crowd, *_ in objects:
        entry = read.entry
        if not entry.id:
            found = "it has no id" if entry.id is None else "id is 0"
            reader.problem("annotation-id", found, read)
        first = ids.setdefault(entry.id, read.position)
        if first != read.position and entry.id is not None:
            reader.problem("duplicate-annotation-id", f"also the id of annotations[{first}]", read)
        key = (entry.image_id, entry.category_id, *entry.bbox)
        if not crowd and boxes.setdefault(key, read.position) != read.position:
            reader.problem("duplicate-annotation", f"the same as annotations[{boxes[key]}]", read)


def _check_layout(reader: CocoReader, objects: list[_Object]) -> None:
    """Judge what the four numbers of all boxes mean; true xywh data meets neither condition."""
    total = len(objects)
    if total < 4:
        return
    boxes = np.array([one.read.entry.bbox for one in objects])  # (N, 4)
    sizes = np.array([one.size for one in objects])  # (N, 2) width, height
    corner, second = boxes[:, :2], boxes[:, 2:]
    if (np.abs(boxes) <= 1).all() and (sizes > 2).all():
        reader.problem("boxes-look-normalised", f"no number in {total} boxes is above 1")
        return
    sound = ((second > corner) & (second <= sizes + TOLERANCE)).all(1).mean()
    beyond = (corner + second > sizes + TOLERANCE).any(1).mean()
    if sound > 0.99 and beyond > 0.2:
        found = f"of {total} boxes {beyond:.0%} leave their image as x, y, width, height; "
        reader.problem("boxes-look-xyxy", found + f"as x1, y1, x2, y2 {sound:.0%} are sound")


def _check_whole(reader: CocoReader, images: list[_Image], objects: list[_Object]) -> None:
    """Faults that show only over all annotations."""
    single = [one for one in objects if not one.crowd]
    masked = sum(one.masked for one in single)
    for one in single:
        if masked and not one.masked:
            found = f"{masked} objects have a mask, this one has not"
            reader.problem("segmentation-missing", found, one.read)
    crowds = len(objects) - len(single)
    if crowds > len(single):
        found = f"{crowds} of {len(objects)} annotations have iscrowd 1"
        reader.problem("mostly-crowds", found)
    used = {one.read.entry.category_id for one in objects}
    names: set[str] = set()
    for number, name in reader.categories.items():
        found = f"category {number} {brief(name)}"
        if name in names:
            reader.problem("duplicate-category-name", found)
        names.add(name)
        if number not in used:
            reader.problem("category-unused", found)
    empty = sum(not image.annotations for image in images)
    if empty > len(images) / 2:
        reader.problem("mostly-empty-images", f"{empty} of {len(images)} images")


def _summary(reader: CocoReader, images: list[_Image], objects: list[_Object]) -> dict[str, Any]:
    """See `Report.summary`."""
    single = [one for one in objects if not one.crowd]
    classes = Counter(reader.categories.get(one.read.entry.category_id) for one in single)
    areas = [one.area for one in single if one.area > 0]
    edges = np.digitize(areas, [SMALL, MEDIUM])
    labels = ("small", "medium", "large")
    return {
        "images": len(images),
        "empty_images": sum(not image.annotations for image in images),
        "annotations": len(objects),
        "crowds": len(objects) - len(single),
        "with_masks": sum(one.masked for one in objects),
        "categories": len(reader.categories),
        "class_histogram": {name: classes[name] for name in reader.categories.values()},
        "instances_per_image": _quartiles([image.annotations for image in images]),
        "image_width": _quartiles([image.width for image in images]),
        "image_height": _quartiles([image.height for image in images]),
        "size_share": {k: float(np.mean(edges == i)) for i, k in enumerate(labels) if areas},
    }


def _quartiles(values: list[int]) -> dict[str, int]:
    """min, 25%, 50%, 75% and max, each a value that occurs; empty for no values."""
    if not values:
        return {}
    cuts = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], method="nearest")
    return dict(zip(("min", "25%", "50%", "75%", "max"), map(int, cuts), strict=True))
