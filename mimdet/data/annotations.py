"""One annotation, checked: its box, its mask, and why it is left out of training if it is."""

import reprlib
from collections.abc import Callable, Sequence
from operator import mul, sub
from typing import Annotated, Any, Literal, TypedDict

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
Box = tuple[float, float, float, float]
Polygons = list[list[Number]]
EMPTY = "images without objects (--no-skip-empty trains on them)"
FAR = 10
"""Sides of the image that a polygon may leave it by: pycocotools takes memory for every pixel."""


class RunLengths(TypedDict):
    size: Annotated[list[Side], Meta(min_length=2, max_length=2)]
    """Height, width."""
    counts: str | list[Annotated[int, Meta(ge=0, lt=2**62)]]


Mask = Polygons | RunLengths | None
"""A COCO segmentation."""


class AnnotationEntry(Struct, gc=False):
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
    left_out: str = ""
    """Why it is not trained on: "crowd", or the kind of what is wrong with it; empty if it is."""


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 60


def brief(value: Any) -> str:
    """A value from a file, safe to print: short, on one line, without control characters."""
    return _BRIEF.repr(value)


Note = Callable[[str, str], None]
"""Takes kind and message of a finding; its place is known."""
TOLERANCE = 1.0
"""Pixels a box may reach out of its image: rounding and 1-based tools."""


def checked(
    entry: AnnotationEntry, mask: Mask, height: int, width: int, note: Note, thorough: bool = False
) -> Annotation:
    """An annotation of an image of height x width pixels, its mask decoded.

    Uncompressed run lengths are compressed. What is wrong, but can be read, goes to `note`;
    thorough: compare areas too. A mask that cannot be understood raises ValueError.
    """
    if isinstance(mask, dict):
        mask = compressed(mask, height, width)
    elif mask:
        for part, flat in enumerate(mask):
            if len(flat) % 2:
                raise ValueError(f"polygon {part} has an odd number of coordinates")
            if len(flat) < 6:
                note("polygon-too-short", f"part {part} has {len(flat) // 2} points")
        mask = [flat for flat in mask if len(flat) >= 6] or mask
    extent = mask_extent(mask) if mask else None
    if extent is not None and max(map(abs, extent)) > FAR * max(height, width):
        raise ValueError(f"a polygon leaves its image by {FAR} times the image's size or more")
    annotation = Annotation(
        "without id" if entry.id is None else str(entry.id),
        entry.category_id,
        entry.bbox,
        0.0 if entry.area is None else entry.area,
        bool(entry.iscrowd),
        mask or None,
    )
    annotation.left_out = _why_left_out(annotation, extent, height, width, note)
    if annotation.iscrowd and isinstance(annotation.mask, list):
        note("crowd-with-polygon", f"{len(annotation.mask)} polygons")
    if entry.iscrowd is None:
        note("iscrowd-missing", "iscrowd is not there")
    if entry.area is None:
        note("area-missing", "area is not there")
        annotation.area = mask_area(annotation.mask, annotation.bbox, height, width)
    elif entry.area <= 0:
        note("bad-area", f"area is {entry.area:g}")
    elif thorough:
        _check_area(annotation, extent, height, width, note)
    return annotation


def _why_left_out(
    annotation: Annotation, extent: Box | None, height: int, width: int, note: Note
) -> str:
    """Compare box, mask and image -> `Annotation.left_out`."""
    x, y, w, h = annotation.bbox
    left, top, right, bottom = box = x, y, x + w, y + h
    over = max(-left, -top, right - width, bottom - height)
    reason = "crowd" if annotation.iscrowd else ""
    if w <= 0 or h <= 0:
        reason = reason or "empty-box"
        note("empty-box", f"width {w:g}, height {h:g}")
    elif left >= width or top >= height or right <= 0 or bottom <= 0:
        reason = reason or "box-outside"
        note("box-outside", f"bbox {brief(annotation.bbox)} in an image of {width} x {height}")
    elif over > TOLERANCE:
        found = f"by {over:.1f} pixels: {brief(annotation.bbox)} in {width} x {height}"
        note("box-exceeds-image", found)
    if extent is None:
        return reason
    if extent[2] <= extent[0] or extent[3] <= extent[1]:
        reason = reason or "segmentation-empty"
        note("segmentation-empty", "its mask encloses nothing")
    elif w > 0 and h > 0:
        _compare_extents(extent, box, note)
    return reason


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


def mask_area(mask: Mask, bbox: Box, height: int, width: int) -> float:
    """Pixels of the mask, or of the box where there is no mask."""
    from pycocotools import mask as coco_mask

    if isinstance(mask, list):
        mask = [flat for flat in mask if len(flat) >= 6]
    if mask:
        return float(coco_mask.area(as_rle(mask, height, width)))
    _, _, w, h = bbox
    return max(w, 0.0) * max(h, 0.0)


def mask_extent(mask: Mask) -> Box:
    """x1, y1, x2, y2 of a mask, x2 <= x1 or y2 <= y1 if it is empty; lines and points are left out.

    A polygon's corners may lie outside the image.
    """
    if isinstance(mask, dict):
        from pycocotools import mask as coco_mask

        x, y, w, h = coco_mask.toBbox(mask).tolist()
        return x, y, x + w, y + h
    rings = [flat for flat in mask or [] if len(flat) >= 6]
    flat = rings[0] if len(rings) == 1 else [value for ring in rings for value in ring]
    xs, ys = sorted(flat[::2]) or [0.0], sorted(flat[1::2]) or [0.0]  # takes less than min and max
    return xs[0], ys[0], xs[-1], ys[-1]


def _compare_extents(mask: Box, box: Box, note: Note) -> None:
    """Compare a mask's extent with its box, both x1, y1, x2, y2.

    COCO's own boxes are the extents of their polygons to 1e-12. Tools that round or count whole
    pixels stay within 2 pixels; tools that pad their boxes, above an overlap (IoU) of 0.6.
    """
    if max(map(abs, map(sub, mask, box))) <= 2:
        return
    w = min(mask[2], box[2]) - max(mask[0], box[0])
    h = min(mask[3], box[3]) - max(mask[1], box[1])
    common = max(0.0, w) * max(0.0, h)
    union = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (mask, box)) - common
    if common < 0.6 * union:
        ours, theirs = (", ".join(f"{edge:.1f}" for edge in edges) for edges in (mask, box))
        note("segmentation-box-mismatch", f"mask spans {ours}; box spans {theirs} (x1 y1 x2 y2)")


def _check_area(
    annotation: Annotation, extent: Box | None, height: int, width: int, note: Note
) -> None:
    """Note an area that is not that of the mask, or cannot be that of the box."""
    area, mask = annotation.area, annotation.mask
    _, _, w, h = annotation.bbox
    if annotation.left_out == "segmentation-empty":
        return
    if extent is None:
        own = w * h  # an upper bound: masks may have been dropped, their areas kept
        if w > 0 and h > 0 and not 0.01 * own <= area <= 1.2 * own + w + h:
            note("area-mismatch", f"area is {area:g}, its box covers {own:g}")
        return
    # A polygon's area and its pixel count differ by up to half its outline.
    outline = extent[2] - extent[0] + extent[3] - extent[1]
    if isinstance(mask, list) and len(mask) == 1 and _agree(area, ring_area(mask[0]), outline):
        return  # most masks: counting pixels takes ten times as long
    own = mask_area(mask, annotation.bbox, height, width)
    if not _agree(area, own, outline):
        note("area-mismatch", f"area is {area:g}, its mask covers {own:g}")


def _agree(area: float, own: float, outline: float) -> bool:
    return abs(area - own) <= 0.2 * max(area, own) + outline


def ring_area(flat: Sequence[float]) -> float:
    """Area inside a polygon x0, y0, x1, y1, ... whose lines do not cross."""
    xs, ys = flat[::2], flat[1::2]
    ahead = sum(map(mul, xs, [*ys[1:], ys[0]]))
    return abs(ahead - sum(map(mul, ys, [*xs[1:], xs[0]]))) / 2


def clipped_box(bbox: Sequence[float], height: int, width: int) -> Box:
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
    summary = ""
    """What is used of a file and what is left out, for those who train on it."""

    def annotations(self, index: int) -> list[Annotation]:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Record:
        """The image and its trainable annotations as tensors."""
        dataset: Any = self
        kept = [annotation for annotation in self.annotations(index) if not annotation.left_out]
        size = dataset.image_size(index)
        boxes = [clipped_box(annotation.bbox, *size) for annotation in kept]
        labels = [self.category_ids.index(annotation.category_id) for annotation in kept]
        masks = [annotation.mask for annotation in kept]
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
