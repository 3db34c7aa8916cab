"""What `mimdet check-data` can find, and how a finding is named and printed.

An error means that training or evaluation would stop or be silently wrong; a warning is worth a
look and may be true of a sound data set.
"""

import reprlib
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

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
