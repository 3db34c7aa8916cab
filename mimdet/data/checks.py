"""What is wrong with a COCO-format data set, and where.

`check_dataset` reads the annotation file as one that may hold anything, looks at every entry and
every image, and never raises for what it finds there: each fault becomes a `Problem` that names the
file, the image and the annotation. What may be found is listed in `KINDS`.
"""

import hashlib
import json
import os
import reprlib
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

Severity = Literal["error", "warning"]


class Kind(NamedTuple):
    """One kind of fault: how bad it is, what it is called and what to do about it."""

    severity: Severity
    title: str
    remedy: str


KINDS: dict[str, Kind] = {
    # The file as a whole.
    "json-unreadable": Kind(
        "error", "the annotation file cannot be read", "Check the path, or export or copy it again."
    ),
    "not-coco": Kind(
        "error",
        "the annotation file is not a COCO data set",
        "Give an instances file: one object with the lists images, annotations and categories.",
    ),
    "missing-section": Kind(
        "error", "a list is missing", "The file needs the lists images, annotations, categories."
    ),
    "empty-section": Kind(
        "error", "a list is empty", "Check that the right file was exported, and to its end."
    ),
    "folder-missing": Kind("error", "the image folder is missing", "Check its path."),
    # The layout of all boxes.
    "boxes-look-xyxy": Kind(
        "error",
        "the boxes look like x1, y1, x2, y2",
        "COCO boxes are x, y, width, height: subtract x1 and y1 from the last two numbers.",
    ),
    "boxes-look-normalised": Kind(
        "error",
        "the boxes look like fractions of the image",
        "COCO boxes are in pixels: multiply x and width by the image's width, y and height by its "
        "height (and move x, y to the corner if they are centres, as in YOLO files).",
    ),
    # Entries and their ids.
    "bad-entry": Kind("error", "an entry is not an object", "Each entry must be {key: value}."),
    "missing-key": Kind("error", "an entry lacks a key", "Add it, or export the file again."),
    "bad-id": Kind("error", "an id of the wrong type", "Use whole numbers, the same everywhere."),
    "duplicate-image-id": Kind(
        "error", "two images have one id", "Number the images anew and adapt image_id."
    ),
    "duplicate-annotation-id": Kind(
        "error", "two annotations have one id", "Number the annotations from 1."
    ),
    "duplicate-category-id": Kind(
        "error", "two categories have one id", "Number the categories and adapt category_id."
    ),
    "duplicate-category-name": Kind(
        "warning", "two categories have one name", "Merge them, or tell them apart by name."
    ),
    "bad-category-name": Kind("error", "a category's name is not text", "Give it a name."),
    "unknown-image": Kind(
        "error",
        "an annotation refers to an image that is not listed",
        "Correct image_id, add the image to the list, or remove the annotation.",
    ),
    "unknown-category": Kind(
        "error",
        "an annotation refers to a category that is not listed",
        "Correct category_id, add the category to the list, or remove the annotation.",
    ),
    "annotation-id-zero": Kind(
        "warning",
        "an annotation has id 0",
        "COCO's own evaluation takes id 0 for 'not matched' and counts that object as missed; "
        "mimdet numbers anew before it evaluates, other tools do not: number from 1.",
    ),
    "category-unused": Kind(
        "warning",
        "a category without any instance",
        "Nothing can be learned or measured for it: remove it, or look for lost annotations.",
    ),
    # Images.
    "bad-file-name": Kind("error", "file_name is not text", "Give the name of the image file."),
    "file-name-leaves-folder": Kind(
        "warning",
        "file_name leads out of the image folder",
        "Give it relative to the folder, so that the data set can be moved.",
    ),
    "duplicate-file-name": Kind(
        "error",
        "an image file is listed twice",
        "Merge the two entries: in each of them the objects of the other look like background.",
    ),
    "image-missing": Kind(
        "error", "an image file is missing", "Copy it into the folder, or correct file_name."
    ),
    "image-unreadable": Kind(
        "error", "an image file is broken", "Copy it again, or remove it and its annotations."
    ),
    "bad-image-size": Kind(
        "error", "width or height is not a positive whole number", "Write the file's own size."
    ),
    "image-size-wrong": Kind(
        "error",
        "width and height differ from the file's",
        "If the image was resized, resize its boxes and masks too; then write the file's own size.",
    ),
    "image-size-swapped": Kind(
        "error", "width and height are swapped", "Swap them; look at the boxes of such an image."
    ),
    "image-rotated": Kind(
        "warning",
        "the image carries an EXIF rotation",
        "Viewers turn it, mimdet reads the pixels as stored: turn them and remove the tag, unless "
        "the boxes were drawn on the unturned image.",
    ),
    "image-16-bit": Kind(
        "warning",
        "the image has 16 or 32 bits a channel",
        "0..65535 is mapped to 0..255, which leaves a 12-bit camera's image nearly black: scale it "
        "to the range it uses and save it with 8 bits.",
    ),
    "image-float": Kind(
        "error", "the image has floating point pixels", "Scale it to 0..255, save it with 8 bits."
    ),
    "duplicate-image-content": Kind(
        "warning", "two image files are identical", "Keep one of them, with all annotations."
    ),
    "mostly-empty-images": Kind(
        "warning",
        "most images have no annotation",
        "They are trained on as pure background: check that none of their annotations is lost.",
    ),
    # Boxes.
    "bad-box": Kind(
        "error", "bbox is not four numbers", "Write x, y, width, height in pixels, all finite."
    ),
    "empty-box": Kind(
        "error", "a box without extent", "Redraw or remove it (mimdet leaves it out)."
    ),
    "box-outside": Kind(
        "error", "a box lies outside its image", "Check image_id and the units; redraw or remove."
    ),
    "box-exceeds-image": Kind(
        "warning", "a box reaches out of its image", "Cut it at the border (1 pixel is tolerated)."
    ),
    "duplicate-annotation": Kind(
        "warning",
        "an object is annotated twice",
        "Remove one: same image, class and box (a detector is then blamed for missing the other).",
    ),
    "area-missing": Kind(
        "warning",
        "area is missing",
        "Add it: AP by object size (small, medium, large) is computed from this field.",
    ),
    "bad-area": Kind("error", "area is not a positive number", "Write the mask's area in pixels."),
    "area-mismatch": Kind(
        "warning",
        "area does not match the object",
        "Write the mask's area, not the box's; without masks, width x height of the box.",
    ),
    "bad-iscrowd": Kind(
        "error", "iscrowd is not 0 or 1", "1 marks a region of many objects, 0 a single one."
    ),
    "iscrowd-missing": Kind(
        "warning", "iscrowd is missing", "Add it: it counts as 0 here, COCO's own evaluation stops."
    ),
    # Masks.
    "segmentation-missing": Kind(
        "error",
        "only some annotations have a mask",
        "Add the missing masks, or remove all of them to train with boxes only.",
    ),
    "bad-segmentation": Kind(
        "error",
        "segmentation is neither polygons nor run lengths",
        "Write [[x0, y0, x1, y1, ...], ...] or {size: [height, width], counts: ...}.",
    ),
    "polygon-too-short": Kind(
        "error", "a polygon of fewer than 3 points", "Remove this part or redraw it."
    ),
    "polygon-odd-length": Kind(
        "error", "a polygon with half a point", "Write x0, y0, x1, y1, ...: an even count."
    ),
    "segmentation-empty": Kind(
        "error", "a mask without any area", "Redraw it, or remove the annotation."
    ),
    "segmentation-box-mismatch": Kind(
        "error",
        "mask and box lie in different places",
        "Look at it: the box must be the mask's extent (are x and y, or two objects, mixed up?).",
    ),
    "rle-size-wrong": Kind(
        "error", "run lengths of another image size", "Encode the mask at the image's own size."
    ),
    "rle-undecodable": Kind("error", "run lengths that cannot be decoded", "Encode it again."),
    "rle-counts-wrong": Kind(
        "error", "run lengths that do not fill the image", "Encode it again: an end is missing."
    ),
    "crowd-with-polygon": Kind(
        "warning",
        "a crowd region drawn as polygons",
        "Crowds are run lengths in COCO; set iscrowd to 0 if this is a single object.",
    ),
}
"""Every kind, in the order in which findings are printed (errors first)."""

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 60


def brief(value: Any) -> str:
    """A value from a file, safe to print: short, on one line, without control characters."""
    return _BRIEF.repr(value)


@dataclass(slots=True, frozen=True)
class Problem:
    """One finding and its place."""

    kind: str
    """A key of `KINDS`."""
    message: str
    """What was found there."""
    file: str
    """Name of the annotation file, or the image folder where that is missing."""
    entry: str = ""
    """Place in the annotation file, as `annotations[12]` (counted from 0)."""
    image_id: int | str | None = None
    file_name: int | str | None = None
    """As the annotation file has it, so perhaps not text."""
    annotation_id: int | str | None = None

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity

    @property
    def remedy(self) -> str:
        return KINDS[self.kind].remedy

    @property
    def where(self) -> str:
        """As `train.json annotations[12], annotation 17, image 3 'a.png'`."""
        parts = [f"{self.file} {self.entry}".strip()]
        if self.annotation_id is not None:
            parts.append(f"annotation {brief(self.annotation_id)}")
        image = "" if self.image_id is None else f" {brief(self.image_id)}"
        image += "" if self.file_name is None else f" {brief(self.file_name)}"
        if image:
            parts.append(f"image{image}")
        return ", ".join(parts)


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
    def ok(self) -> bool:
        """True without errors; warnings do not count."""
        return all(problem.severity != "error" for problem in self.problems)

    def by_kind(self) -> dict[str, list[Problem]]:
        """Findings by kind, errors first."""
        groups: dict[str, list[Problem]] = {kind: [] for kind in KINDS}
        for problem in self.problems:
            groups[problem.kind].append(problem)
        found = [kind for kind in groups if groups[kind]]
        found.sort(key=lambda kind: KINDS[kind].severity)  # "error" < "warning"; stable
        return {kind: groups[kind] for kind in found}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for json."""
        problems = [
            {**asdict(problem), "severity": problem.severity, "remedy": problem.remedy}
            for problem in self.problems
        ]
        return {"ok": self.ok, "summary": self.summary, "problems": problems}

    def table(self, examples: int = 3) -> str:
        """Text for a terminal: the summary, then each kind with its count, the first `examples`
        places and the remedy."""
        lines = _summary_lines(self.summary)
        for kind, problems in self.by_kind().items():
            title = f"{KINDS[kind].severity} {kind} ({len(problems)}): {KINDS[kind].title}"
            lines += ["", title]
            lines += [f"    {p.where}: {p.message}" for p in problems[:examples]]
            if len(problems) > examples:
                lines.append(f"    ... and {len(problems) - examples} more")
            lines.append(textwrap.fill(f"-> {KINDS[kind].remedy}", 100, subsequent_indent="   "))
        errors = sum(problem.severity == "error" for problem in self.problems)
        lines += ["", f"{errors} errors, {len(self.problems) - errors} warnings"]
        return "\n".join(lines)


def _summary_lines(summary: dict[str, Any], classes: int = 10) -> list[str]:
    keys = ("images", "empty_images", "annotations", "crowds", "with_masks", "categories")
    lines = [", ".join(f"{key.replace('_', ' ')} {summary[key]}" for key in keys)]
    for key in ("instances_per_image", "image_width", "image_height"):
        if summary[key]:
            lines.append(f"{key.replace('_', ' ')}: {_pairs(summary[key].items())}")
    if summary["size_share"]:
        shares = {size: f"{share:.0%}" for size, share in summary["size_share"].items()}
        lines.append(f"object size: {_pairs(shares.items())}")
    histogram = sorted(summary["class_histogram"].items(), key=lambda pair: -pair[1])
    if histogram:
        shown = _pairs((brief(name), count) for name, count in histogram[:classes])
        more = len(histogram) - classes
        lines.append(f"instances by class: {shown}" + (f", {more} more" if more > 0 else ""))
    return lines


def _pairs(pairs: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{key} {value}" for key, value in pairs)


LARGEST = 1e9
"""Numbers beyond this are no pixel coordinates (also keeps sums and products finite)."""
TOLERANCE = 1.0
"""Pixels a box may reach out of its image: rounding and 1-based tools."""

Finding = tuple[str, str]
Box = tuple[float, float, float, float]


class Shape(NamedTuple):
    """What a segmentation covers: its extent xyxy and its area, in pixels."""

    extent: Box
    area: float


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number of a size that pixels can have; True, "3", NaN and 1e300 are none."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def is_id(value: Any) -> TypeGuard[int | str]:
    """Text, or a whole number of at most 64 bits (as tables store it)."""
    return type(value) is str or (type(value) is int and -(2**63) <= value < 2**63)


def is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < LARGEST


def box_findings(box: Any, size: tuple[int, int] | None) -> Iterator[Finding]:
    """box: x, y, width, height as the file gives it; size: (width, height) of its image."""
    if not is_box(box):
        yield "bad-box", f"bbox is {brief(box)}"
        return
    x, y, w, h = box
    if w <= 0 or h <= 0:
        yield "empty-box", f"width {w:g}, height {h:g}"
        return
    if size is None:
        return
    width, height = size
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        yield "box-outside", f"bbox {brief(box)} in an image of {width} x {height}"
        return
    over = max(-x, -y, x + w - width, y + h - height)
    if over > TOLERANCE:
        yield "box-exceeds-image", f"by {over:.1f} pixels: {brief(box)} in {width} x {height}"


def is_box(box: Any) -> TypeGuard[list[float]]:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def layout_findings(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> Iterator[Finding]:
    """Judge what the four numbers of all boxes mean; true xywh data meets neither condition.

    boxes: (N, 4) as the file gives them; sizes: (N, 2) width, height of their images.
    """
    total = len(boxes)
    if total < 4:
        return
    corner, second = boxes[:, :2], boxes[:, 2:]
    if (np.abs(boxes) <= 1).all() and (sizes > 2).all():
        yield "boxes-look-normalised", f"no number in {total} boxes is above 1"
        return
    ordered = (second > corner).all(1)
    inside = (second <= sizes + TOLERANCE).all(1)
    beyond = (corner + second > sizes + TOLERANCE).any(1)
    if (ordered & inside).mean() > 0.99 and beyond.mean() > 0.2:
        found = f"of {total} boxes {beyond.mean():.0%} leave their image as x, y, width, height; "
        fits = f"as x1, y1, x2, y2 {(ordered & inside).mean():.0%} are sound"
        yield "boxes-look-xyxy", found + fits


def segmentation_findings(
    segmentation: Any, size: tuple[int, int] | None
) -> tuple[list[Finding], Shape | None]:
    """Faults of a polygon list or run lengths, and what it covers when there are none."""
    if isinstance(segmentation, dict):
        findings, shape = _rle_findings(segmentation, size)
    elif isinstance(segmentation, list):
        findings, shape = _polygon_findings(segmentation)
    else:
        return [("bad-segmentation", f"segmentation is {brief(segmentation)}")], None
    if shape is not None and shape.area == 0:
        return [*findings, ("segmentation-empty", "its area is 0")], None
    return findings, shape


def shape_findings(shape: Shape, box: list[float]) -> Iterator[Finding]:
    """Compare a mask's extent with its box x, y, width, height.

    COCO's own boxes are the extents of their polygons to 1e-12. Tools that round or count whole
    pixels stay within 2 pixels; tools that pad their boxes, above an overlap (IoU) of 0.6.
    """
    x, y, w, h = box
    edges = (x, y, x + w, y + h)
    apart = max(abs(a - b) for a, b in zip(shape.extent, edges, strict=True))
    left, top, right, bottom = shape.extent
    common = max(0.0, min(right, x + w) - max(left, x)) * max(0.0, min(bottom, y + h) - max(top, y))
    union = (right - left) * (bottom - top) + w * h - common
    if apart > 2 and common < 0.6 * union:
        ours = ", ".join(f"{edge:.1f}" for edge in shape.extent)
        theirs = ", ".join(f"{edge:.1f}" for edge in edges)
        yield "segmentation-box-mismatch", f"mask spans {ours}; box spans {theirs} (x1 y1 x2 y2)"


def area_findings(area: Any, box: list[float] | None, shape: Shape | None) -> Iterator[Finding]:
    """Compare the stored area with the mask's or, without one, with the box's.

    A polygon's area and its pixel count differ by up to half its outline, hence the slack.
    """
    if not is_number(area) or area <= 0:
        yield "bad-area", f"area is {brief(area)}"
        return
    if shape is not None:
        left, top, right, bottom = shape.extent
        slack = 0.2 * max(area, shape.area) + (right - left) + (bottom - top)
        if abs(area - shape.area) > slack:
            yield "area-mismatch", f"area is {area:g}, its mask covers {shape.area:g}"
    elif box is not None and box[2] > 0 and box[3] > 0:
        own = box[2] * box[3]  # an upper bound: masks may have been dropped, their areas kept
        if area > 1.2 * own + box[2] + box[3] or area < 0.01 * own:
            yield "area-mismatch", f"area is {area:g}, its box covers {own:g}"


def _polygon_findings(polygons: list[Any]) -> tuple[list[Finding], Shape | None]:
    findings: list[Finding] = []
    for part, flat in enumerate(polygons):
        if not isinstance(flat, list):
            hint = "; one more pair of brackets is needed" if is_number(flat) else ""
            found = f"part {part} is {brief(flat)}{hint}"
            return [*findings, ("bad-segmentation", found)], None
        if not all(map(is_number, flat)):
            wrong = next(value for value in flat if not is_number(value))
            findings.append(("bad-segmentation", f"part {part} holds {brief(wrong)}"))
        elif len(flat) % 2:
            findings.append(("polygon-odd-length", f"part {part} has {len(flat)} numbers"))
        elif len(flat) < 6:
            findings.append(("polygon-too-short", f"part {part} has {len(flat) // 2} points"))
    return findings, None if findings else _polygon_shape(polygons)


def _polygon_shape(polygons: list[list[float]]) -> Shape:
    """Extent of all parts; area as their sum (the shoelace formula), which is COCO's area too."""
    parts = [np.asarray(flat, dtype=np.float64).reshape(-1, 2) for flat in polygons]
    area = 0.0
    for points in parts:
        x, y = (points - points[0]).T  # from the first point, so that the closing edge adds nothing
        area += abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:])) / 2
    corners = np.concatenate(parts)
    return Shape((*map(float, corners.min(0)), *map(float, corners.max(0))), area)  # type: ignore[arg-type]


def _rle_findings(
    rle: dict[str, Any], size: tuple[int, int] | None
) -> tuple[list[Finding], Shape | None]:
    shape = rle.get("size")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(is_count, shape))):
        return [("bad-segmentation", f"the size of its run lengths is {brief(shape)}")], None
    height, width = shape
    if size is not None and (width, height) != size:
        swapped = " (height comes first)" if (height, width) == size else ""
        found = f"size {brief(shape)}{swapped}, the image has height {size[1]}, width {size[0]}"
        return [("rle-size-wrong", found)], None
    try:
        counts = decode_counts(rle.get("counts"))
    except ValueError as error:
        return [("rle-undecodable", str(error))], None
    if sum(counts) != height * width:
        found = f"the runs cover {sum(counts)} pixels of {height} x {width} = {height * width}"
        return [("rle-counts-wrong", found)], None
    return [], _runs_shape(np.array(counts, dtype=np.int64), height)


def decode_counts(counts: Any) -> list[int]:
    """Run lengths (background first) from COCO's list or its compressed text.

    The text holds 5 bits a character (ASCII 48 + bits, 32 = more follow, lowest bits first, the
    last one's 16 = negative); from the fourth run on, each is the difference to the one two before.
    Raises ValueError for anything else and for negative runs.
    """
    if isinstance(counts, str):
        runs = _decode_text(counts)
    elif isinstance(counts, list):
        runs = counts
    else:
        raise ValueError(f"counts is {brief(counts)}, neither a list nor text")
    for index, run in enumerate(runs):
        if type(run) is not int or not 0 <= run < LARGEST:
            raise ValueError(f"run {index} is {brief(run)}")
    return runs


def _decode_text(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for place, character in enumerate(text):
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"character {place} of counts, {brief(character)}, has no place there")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("counts ends in the middle of a number")
    return runs


def _runs_shape(counts: NDArray[np.int64], height: int) -> Shape:
    """Extent and area of run lengths that go down the columns of an image of this height."""
    ends = np.cumsum(counts)
    starts, ends = ends[:-1:2], ends[1::2]
    kept = ends > starts
    first, last = starts[kept], ends[kept] - 1  # pixels, counted down the columns
    if len(first) == 0:
        return Shape((0.0, 0.0, 0.0, 0.0), 0.0)
    left, right = first[0] // height, last[-1] // height
    over = first // height != last // height  # such a run touches the bottom and the top
    top = 0 if over.any() else (first % height).min()
    bottom = height - 1 if over.any() else (last % height).max()
    extent = (float(left), float(top), float(right) + 1, float(bottom) + 1)
    return Shape(extent, float((last - first + 1).sum()))


EXIF_ORIENTATION = 0x0112


class ImageFacts(NamedTuple):
    """What an image file says about itself."""

    width: int
    height: int
    mode: str
    """Pillow's: L, RGB, I;16, ..."""
    orientation: int
    """EXIF tag 274: 1 = upright, 2..8 = mirrored or turned."""
    digest: str
    """sha256 of the file; empty when it was not read to its end."""


class ImageFolder:
    """The image folder: every file is opened once, and its content remembered by its digest."""

    def __init__(self, folder: Path, decode: bool) -> None:
        self.folder = folder
        self.decode = decode
        self.digests: dict[str, str] = {}
        self.by_name: dict[str, str] | None = None

    def check(
        self, name: str, stored: tuple[int, int] | None
    ) -> tuple[list[Finding], tuple[int, int] | None]:
        """Faults of one image, and its (width, height): the file's or, failing that, `stored`."""
        findings: list[Finding] = []
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts:
            findings.append(("file-name-leaves-folder", f"file_name is {brief(name)}"))
        if not os.path.isfile(self.folder / name):  # also False for names no file can have
            findings.append(("image-missing", self.elsewhere(path.name)))
            return findings, stored
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd tags and of large images
                facts = inspect_image(self.folder / name, self.decode)
        except Exception as error:  # Pillow's readers raise nearly anything
            findings.append(("image-unreadable", reason(error)))
            return findings, stored
        if stored is not None:
            findings += size_findings(stored, (facts.width, facts.height))
        if facts.orientation in range(2, 9):
            findings.append(("image-rotated", f"EXIF orientation {facts.orientation}"))
        if facts.mode == "F":
            findings.append(("image-float", "Pillow's mode is F"))
        elif facts.mode.startswith("I"):
            findings.append(("image-16-bit", f"Pillow's mode is {facts.mode}"))
        if facts.digest:
            twin = self.digests.setdefault(facts.digest, name)
            if twin != name:
                findings.append(("duplicate-image-content", f"the same bytes as {brief(twin)}"))
        return findings, (facts.width, facts.height)

    def elsewhere(self, name: str) -> str:
        """Where else the folder has a file of this name, case ignored."""
        if self.by_name is None:
            files = (Path(root, file) for root, _, names in os.walk(self.folder) for file in names)
            self.by_name = {
                file.name.lower(): file.relative_to(self.folder).as_posix() for file in files
            }
        other = self.by_name.get(name.lower())
        return "no such file" + (f"; did you mean {brief(other)}?" if other else "")


def inspect_image(path: Path, decode: bool) -> ImageFacts:
    """Read an image's header and, with `decode`, all its pixels.

    Raises whatever Pillow raises for a file that is broken, truncated, of an unknown format, or
    so large that it looks like a decompression bomb.
    """
    from PIL import Image

    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if decode else ""
        file.seek(0)
        with Image.open(file) as image:
            width, height = image.size
            if decode:
                image.load()
            orientation = 1
            if decode or image.format != "PNG":  # a PNG may keep its EXIF behind the pixels
                orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            return ImageFacts(width, height, image.mode, orientation, digest)


def size_findings(stored: tuple[int, int], own: tuple[int, int]) -> Iterator[Finding]:
    """Compare the (width, height) of the annotation file with those of the image file."""
    if stored != own:
        kind = "image-size-swapped" if stored == own[::-1] else "image-size-wrong"
        yield (
            kind,
            f"the annotations say {stored[0]} x {stored[1]}, the file is {own[0]} x {own[1]}",
        )


def reason(error: Exception) -> str:
    """Why an image could not be read, on one line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its text is about our file object
        return "not an image, or of a format that Pillow does not know"
    return f"{type(error).__name__}: {error}"


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
            if not is_id(number) or isinstance(number, str):
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
            if "id" in entry and not is_id(number):
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
            if is_id(number) and number in self.known:
                found = f"also the id of {self.known[number].where['entry']}"
                self.add("duplicate-image-id", found, where)
            elif is_id(number):
                self.known[number] = _Image(where, size)
                self.id_types.add(type(number))

    def stored_size(self, entry: dict[str, Any], where: Where) -> tuple[int, int] | None:
        if "width" not in entry or "height" not in entry:
            return None
        width, height = entry["width"], entry["height"]
        if is_count(width) and is_count(height):
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
            if key in entry and not is_id(entry[key]):
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
        if not is_id(number) or isinstance(number, str):
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
        findings = list(box_findings(box, size)) if "bbox" in entry else []
        shape = None
        if segmentation not in (None, []):
            faults, shape = segmentation_findings(segmentation, size)
            findings += faults
        if not is_box(box):
            box = None
        elif shape is not None and box[2] > 0 and box[3] > 0:
            findings += shape_findings(shape, box)
        if "area" in entry:
            findings += area_findings(area, box, shape)
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
        if not is_number(area):
            area = 0.0 if box is None else box[2] * box[3]
        masked = segmentation not in (None, [])
        return _Object(where, category, crowd == 1, masked, box, size, area)

    def whole(self) -> None:
        """Faults that show only over all annotations."""
        placed = [one for one in self.objects if one.box is not None and one.size is not None]
        if placed:
            boxes = np.array([one.box for one in placed], dtype=np.float64)  # (N, 4)
            sizes = np.array([one.size for one in placed], dtype=np.float64)  # (N, 2)
            for kind, message in layout_findings(boxes, sizes):
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
        where |= {name: value for name, value in ids.items() if is_id(value)}
    return where


def _quartiles(values: list[int]) -> dict[str, int]:
    """min, 25%, 50%, 75% and max, each a value that occurs; empty for no values."""
    if not values:
        return {}
    cuts = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], method="nearest")
    return dict(zip(("min", "25%", "50%", "75%", "max"), map(int, cuts), strict=True))
