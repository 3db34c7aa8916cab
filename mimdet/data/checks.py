"""What is wrong with a COCO-format data set, and where.

`check_dataset` runs the reader of `coco_file` over every entry, collects what it refuses, and looks
for what can be read but is wrong all the same: in the boxes, masks and image files, and in the data
set as a whole. It never raises for what it finds. What may be found is listed in `KINDS`.
"""

import hashlib
import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import numpy as np

from mimdet.data.coco_file import (
    Annotation,
    CocoReader,
    Problem,
    Read,
    brief,
    coco_segmentation,
    has_mask,
    mask_area,
)


class Kind(NamedTuple):
    """One kind of fault: how bad it is and what to do about it."""

    severity: Literal["error", "warning"]
    remedy: str


KINDS: dict[str, Kind] = {
    # The file and the layout of all boxes.
    "json-unreadable": Kind("error", "Check the path, or export or copy the file again."),
    "not-coco": Kind("error", "Give an object with the lists images, annotations and categories."),
    "empty-section": Kind("error", "Check that the right file was exported, and to its end."),
    "folder-missing": Kind("error", "Check the path of the image folder."),
    "boxes-look-xyxy": Kind("error", "Write x, y, width, height: subtract x1, y1 from x2, y2."),
    "boxes-look-normalised": Kind(
        "error",
        "COCO boxes are in pixels: multiply x and width by the image's width, y and height by its "
        "height (and move x, y to the corner if they are centres, as in YOLO files).",
    ),
    # Entries and their ids.
    "bad-field": Kind(
        "error",
        "Add or correct the field. Ids are whole numbers (of images also text); bbox is x, y, "
        "width, height in pixels; iscrowd is 1 for a region of many objects, else 0.",
    ),
    "duplicate-image-id": Kind("error", "Number the images anew and adapt image_id."),
    "duplicate-annotation-id": Kind("error", "Number the annotations from 1."),
    "duplicate-category-id": Kind("error", "Number the categories and adapt category_id."),
    "duplicate-category-name": Kind("warning", "Merge the two, or tell them apart by name."),
    "unknown-image": Kind("error", "Correct image_id, list the image or remove the annotation."),
    "unknown-category": Kind("error", "Correct category_id, or list the category."),
    "annotation-id": Kind(
        "warning",
        "Number from 1: COCO's own evaluation needs ids, takes 0 for 'not matched' and counts that "
        "object as missed. mimdet numbers anew before it evaluates.",
    ),
    "category-unused": Kind("warning", "Nothing can be learned for it: are annotations lost?"),
    # Images.
    "file-name-leaves-folder": Kind("warning", "Give it relative to the image folder."),
    "duplicate-file-name": Kind(
        "error", "Merge the entries: in each the objects of the other look like background."
    ),
    "image-missing": Kind("error", "Copy it into the folder, or correct file_name."),
    "image-unreadable": Kind("error", "Copy it again, or remove it and its annotations."),
    "image-size-wrong": Kind(
        "error",
        "If the image was resized, resize its boxes and masks too; then write the file's own size.",
    ),
    "image-rotated": Kind(
        "warning",
        "Viewers turn it, mimdet reads the pixels as stored: turn them and remove the tag, unless "
        "the boxes were drawn on the unturned image.",
    ),
    "image-16-bit": Kind(
        "warning",
        "0..65535 is mapped to 0..255, which leaves a 12-bit camera's image nearly black: scale it "
        "to the range it uses and save it with 8 bits.",
    ),
    "image-float": Kind("error", "Scale its floating point pixels to 0..255, save with 8 bits."),
    "duplicate-image-content": Kind("warning", "Keep one of the files, with all annotations."),
    "mostly-empty-images": Kind("warning", "They count as pure background: is anything lost?"),
    # Boxes.
    "empty-box": Kind("error", "Redraw or remove it (mimdet leaves it out)."),
    "box-outside": Kind("error", "Check image_id and the units; redraw or remove it."),
    "box-exceeds-image": Kind("warning", "Cut it at the border (1 pixel is tolerated)."),
    "duplicate-annotation": Kind("warning", "Remove one: image, class and box are the same."),
    "area-missing": Kind("warning", "Add it: AP of small, medium and large objects reads it."),
    "bad-area": Kind("error", "Write the mask's area in pixels."),
    "area-mismatch": Kind(
        "warning", "Write the mask's area, not the box's; without masks, width x height of the box."
    ),
    "iscrowd-missing": Kind("warning", "Add it: 0 is meant here, COCO's own evaluation stops."),
    "mostly-crowds": Kind(
        "warning",
        "Regions of many objects are left out of training. Some tools mark every object stored as "
        "run lengths: set iscrowd to 0 for single objects.",
    ),
    # Masks.
    "segmentation-missing": Kind("error", "Add the masks, or remove all to train on boxes only."),
    "bad-segmentation": Kind(
        "error",
        "Write [[x0, y0, x1, y1, ...], ...] or {size: [height, width], counts: ...} with runs that "
        "fill the image.",
    ),
    "polygon-too-short": Kind("error", "Give this part at least 3 points, or remove it."),
    "segmentation-empty": Kind("error", "Redraw the mask, or remove the annotation."),
    "segmentation-box-mismatch": Kind("error", "The box must be the mask's extent: look at both."),
    "crowd-with-polygon": Kind("warning", "Set iscrowd to 0 if this is a single object."),
}
"""Every kind, in the order in which findings are printed (errors first)."""


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
        return sum(KINDS[problem.kind].severity == "error" for problem in self.problems)

    @property
    def ok(self) -> bool:
        """True without errors; warnings do not count."""
        return not self.errors

    def by_kind(self) -> dict[str, list[Problem]]:
        """Findings by kind, errors first."""
        groups: dict[str, list[Problem]] = {}
        for kind in sorted(KINDS, key=lambda kind: KINDS[kind].severity):  # stable
            found = [problem for problem in self.problems if problem.kind == kind]
            if found:
                groups[kind] = found
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for json."""
        problems = [asdict(problem) | KINDS[problem.kind]._asdict() for problem in self.problems]
        return {"ok": self.ok, "summary": self.summary, "problems": problems}

    def table(self, examples: int = 3) -> str:
        """Text for a terminal: the summary, then each kind with its count, the first `examples`
        places and the remedy."""
        lines = _summary_lines(self.summary)
        for kind, problems in self.by_kind().items():
            lines += ["", f"{KINDS[kind].severity} {kind} ({len(problems)})"]
            lines += [
                f"    {problem.where or problem.file}: {problem.message}"
                for problem in problems[:examples]
            ]
            if len(problems) > examples:
                lines.append(f"    ... and {len(problems) - examples} more")
            lines.append(textwrap.fill(f"-> {KINDS[kind].remedy}", 100, subsequent_indent="   "))
        lines += ["", f"{self.errors} errors, {len(self.problems) - self.errors} warnings"]
        return "\n".join(lines)


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

Finding = tuple[str, str]
"""Kind and message."""


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
        findings, size = files.check(image)
        for kind, message in findings:
            reader.problem(kind, message, image)
        images.append(_Image(*size, len(pairs)))
        for read, annotation in pairs:
            for kind, message in annotation_findings(read, annotation, size):
                reader.problem(kind, message, read)
            crowd, masked = annotation["iscrowd"], has_mask(annotation)
            objects.append(_Object(read, crowd, masked, size, annotation["area"]))
    for kind, message, entry in chain(_twins(objects), _whole(reader, images, objects)):
        reader.problem(kind, message, entry)
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


def annotation_findings(
    read: Read, annotation: Annotation, size: tuple[int, int]
) -> Iterator[Finding]:
    """What is wrong with an annotation that can be read; size: (width, height) of its image."""
    width, height = size
    x, y, w, h = box = annotation["bbox"]
    polygons, crowd = annotation["polygons"], annotation["iscrowd"]
    over = max(-x, -y, x + w - width, y + h - height)
    if w <= 0 or h <= 0:
        yield "empty-box", f"width {w:g}, height {h:g}"
    elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
        yield "box-outside", f"bbox {brief(box)} in an image of {width} x {height}"
    elif over > TOLERANCE:
        yield "box-exceeds-image", f"by {over:.1f} pixels: {brief(box)} in {width} x {height}"
    for part, flat in enumerate(polygons or []):
        if len(flat) < 6:
            yield "polygon-too-short", f"part {part} has {len(flat) // 2} points"
    if crowd and polygons:
        yield "crowd-with-polygon", f"{len(polygons)} polygons"
    extent = _extent(annotation, height, width)
    if extent is not None and (extent[2] <= extent[0] or extent[3] <= extent[1]):
        yield "segmentation-empty", "its mask encloses nothing"
        extent = None
    elif extent is not None and w > 0 and h > 0:
        yield from extent_findings(extent, (x, y, x + w, y + h))
    if read.entry.iscrowd is None:
        yield "iscrowd-missing", "iscrowd is not there"
    if read.entry.area is None:
        yield "area-missing", "area is not there"
    elif annotation["area"] <= 0:
        yield "bad-area", f"area is {annotation['area']:g}"
    elif extent is not None:
        # A polygon's area and its pixel count differ by up to half its outline.
        own = mask_area(annotation, height, width)
        outline = extent[2] - extent[0] + extent[3] - extent[1]
        if abs(annotation["area"] - own) > 0.2 * max(annotation["area"], own) + outline:
            yield "area-mismatch", f"area is {annotation['area']:g}, its mask covers {own:g}"
    elif w > 0 and h > 0 and not polygons:
        own = w * h  # an upper bound: masks may have been dropped, their areas kept
        if not 0.01 * own <= annotation["area"] <= 1.2 * own + w + h:
            yield "area-mismatch", f"area is {annotation['area']:g}, its box covers {own:g}"


def _extent(annotation: Annotation, height: int, width: int) -> tuple[float, ...] | None:
    """x1, y1, x2, y2 of the mask; None without one."""
    from pycocotools import mask as coco_mask

    if annotation["runs"] is not None:
        x, y, w, h = coco_mask.toBbox(coco_segmentation(annotation, height, width)).tolist()
        return x, y, x + w, y + h
    flat = [value for flat in annotation["polygons"] or [] for value in flat]
    if annotation["polygons"] is None:
        return None
    return (min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2])) if flat else (0,) * 4


def extent_findings(mask: tuple[float, ...], box: tuple[float, ...]) -> Iterator[Finding]:
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
        yield "segmentation-box-mismatch", f"mask spans {ours}; box spans {theirs} (x1 y1 x2 y2)"


class ImageFolder:
    """The image folder: every file is opened once, and its content remembered by its digest."""

    def __init__(self, folder: Path, decode: bool) -> None:
        self.folder, self.decode = folder, decode
        self.names: dict[str, int] = {}
        self.digests: dict[str, str] = {}

    def check(self, image: Read) -> tuple[list[Finding], tuple[int, int]]:
        """Faults of one image, and its (width, height): the file's or, failing that, the entry's.

        Whatever Pillow raises for a file that is broken, cut off, of an unknown format or so large
        that it looks like a decompression bomb is a finding.
        """
        from PIL import Image

        name, stored = image.entry.file_name, (image.entry.width, image.entry.height)
        path = self.folder / name
        first = self.names.setdefault(name, image.position)
        if first != image.position:
            return [("duplicate-file-name", f"also in images[{first}]")], stored
        findings: list[Finding] = []
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            findings.append(("file-name-leaves-folder", f"file_name is {brief(name)}"))
        if not self.folder.is_dir():
            return findings, stored
        if not os.path.isfile(path):  # also False for names no file can have
            other = self.by_name.get(path.name.lower())
            hint = f"; did you mean {brief(other)}?" if other else ""
            return [*findings, ("image-missing", f"no such file{hint}")], stored
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd tags and of large images
                with Image.open(path) as opened:
                    if self.decode:
                        opened.load()
                    size, mode = opened.size, opened.mode
                    # Without decoding: a PNG may keep its EXIF behind the pixels.
                    skip = not self.decode and opened.format == "PNG"
                    turned = 1 if skip else opened.getexif().get(EXIF_ORIENTATION, 1)
        except Exception as error:  # Pillow's readers raise nearly anything
            return [*findings, ("image-unreadable", f"{type(error).__name__}: {error}")], stored
        if size != stored:
            swapped = " (swapped)" if size == stored[::-1] else ""
            says = f"the annotations say {stored[0]} x {stored[1]}{swapped}"
            findings.append(("image-size-wrong", f"{says}, the file is {size[0]} x {size[1]}"))
        if turned in range(2, 9):
            findings.append(("image-rotated", f"EXIF orientation {turned}"))
        if mode.startswith(("F", "I")):
            kind = "image-float" if mode == "F" else "image-16-bit"
            findings.append((kind, f"Pillow's mode is {mode}"))
        if self.decode:
            twin = self.digests.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), name)
            if twin != name:
                findings.append(("duplicate-image-content", f"the same bytes as {brief(twin)}"))
        return findings, size

    @cached_property
    def by_name(self) -> dict[str, str]:
        """All files below the folder, by their names in lower case."""
        files = [path.relative_to(self.folder) for path in self.folder.rglob("*")]
        return {file.name.lower(): file.as_posix() for file in files}


def _twins(objects: list[_Object]) -> Iterator[tuple[str, str, Read]]:
    """Annotations that occur twice, or whose id does."""
    ids: dict[Any, int] = {}
    boxes: dict[tuple[Any, ...], int] = {}
    for read, crowd, *_ in objects:
        entry = read.entry
        if not entry.id:
            yield "annotation-id", "it has no id" if entry.id is None else "id is 0", read
        first = ids.setdefault(entry.id, read.position)
        if first != read.position and entry.id is not None:
            yield "duplicate-annotation-id", f"also the id of annotations[{first}]", read
        key = (entry.image_id, entry.category_id, *entry.bbox)
        if not crowd and boxes.setdefault(key, read.position) != read.position:
            yield "duplicate-annotation", f"the same as annotations[{boxes[key]}]", read


def _whole(
    reader: CocoReader, images: list[_Image], objects: list[_Object]
) -> Iterator[tuple[str, str, Read | None]]:
    """Faults that show only over all annotations."""
    for kind, message in _layout(objects):
        yield kind, message, None
    single = [one for one in objects if not one.crowd]
    masked = sum(one.masked for one in single)
    for one in single:
        if masked and not one.masked:
            found = f"{masked} objects have a mask, this one has not"
            yield "segmentation-missing", found, one.read
    crowds = len(objects) - len(single)
    if crowds > len(single):
        yield "mostly-crowds", f"{crowds} of {len(objects)} annotations have iscrowd 1", None
    used = {one.read.entry.category_id for one in objects}
    names: set[str] = set()
    for number, name in reader.categories.items():
        if name in names:
            yield "duplicate-category-name", f"category {number} {brief(name)}", None
        names.add(name)
        if number not in used:
            yield "category-unused", f"category {number} {brief(name)}", None
    empty = sum(not image.annotations for image in images)
    if empty > len(images) / 2:
        yield "mostly-empty-images", f"{empty} of {len(images)} images", None


def _layout(objects: list[_Object]) -> Iterator[Finding]:
    """Judge what the four numbers of all boxes mean; true xywh data meets neither condition."""
    total = len(objects)
    if total < 4:
        return
    boxes = np.array([one.read.entry.bbox for one in objects])  # (N, 4)
    sizes = np.array([one.size for one in objects])  # (N, 2) width, height
    corner, second = boxes[:, :2], boxes[:, 2:]
    if (np.abs(boxes) <= 1).all() and (sizes > 2).all():
        yield "boxes-look-normalised", f"no number in {total} boxes is above 1"
        return
    sound = ((second > corner) & (second <= sizes + TOLERANCE)).all(1).mean()
    beyond = (corner + second > sizes + TOLERANCE).any(1).mean()
    if sound > 0.99 and beyond > 0.2:
        found = f"of {total} boxes {beyond:.0%} leave their image as x, y, width, height; "
        yield "boxes-look-xyxy", found + f"as x1, y1, x2, y2 {sound:.0%} are sound"


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
