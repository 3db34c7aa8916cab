"""COCO box and mask metrics of a set of detections, without surprises.

faster-coco-eval (C++) does the matching; in the tests pycocotools is the reference and every number
is equal to 1e-9. What this module adds is what goes wrong around an evaluator:

- annotation ids are renumbered from 1: an annotation with id 0 counts as never found;
- a detection's area is that of the thing evaluated, its mask for "segm" and its box for "bbox".
  COCO's own loader takes the box area of results that carry both, which changes the size rows;
- images may have ids of any kind and no detections, categories no objects, results be empty;
- the caller's dictionaries stay as they are, and nothing is printed.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from mimdet.data.annotations import Id, Number, RunLengths, Whole, compressed
from mimdet.files import read_json

IouType = Literal["bbox", "segm"]

COLUMNS = "AP AP50 AP75 AP_small AP_medium AP_large".split()
COLUMNS += "AR1 AR10 AR100 AR_small AR_medium AR_large".split()
"""The twelve COCO numbers in COCO's order."""

NEEDED = {
    "bbox": "x, y, width, height in pixels",
    "segmentation": "polygons or RLE in an annotation, RLE in a result",
    "area": "the object's square pixels, for the size rows",
    "score": "a finite number, higher is surer",
}
"""What the fields of annotations and results hold, for messages."""


@dataclass
class Metrics:
    """The result of an evaluation. Numbers are fractions in 0..1, as in COCO; NaN where no object
    of the kind exists (COCO writes -1). Dictionaries of a type that was not evaluated are empty."""

    box: dict[str, float] = field(default_factory=dict)
    """The twelve numbers of `COLUMNS` for boxes. AP: mean over IoU .50:.95 and categories."""
    mask: dict[str, float] = field(default_factory=dict)
    """The same for masks."""
    box_per_class: dict[str, float] = field(default_factory=dict)
    """AP of each category, by name; a name used twice is followed by its id."""
    mask_per_class: dict[str, float] = field(default_factory=dict)
    area_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Object areas in square pixels, from and to, that count as small, medium and large."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries for json, NaN as None."""
        return plain(asdict(self))

    def table(self) -> str:
        """A text table, a row for boxes and one for masks, numbers x 100; '-' = no such object."""
        headings = (re.sub("_(.).*", r"\1", column) for column in COLUMNS)  # APs for AP_small
        lines = [" " * 5 + "".join(f"{heading:>7}" for heading in headings)]
        for name, numbers in (("box", self.box), ("mask", self.mask)):
            if numbers:
                cells = (numbers[column] for column in COLUMNS)
                lines.append(f"{name:<5}" + "".join(f"{percent(cell):>7}" for cell in cells))
        return "\n".join(lines)

    def summary(self, classes: int = 20) -> str:
        """`table()`, then box / mask AP of each class that has objects, the lowest first, at most
        so many."""
        aps = {name: ap for name, ap in self.box_per_class.items() if percent(ap) != "-"}
        lines = [self.table()]
        for name in sorted(aps, key=lambda name: aps[name])[:classes]:
            both = [aps[name], *([self.mask_per_class[name]] if self.mask_per_class else [])]
            lines.append(f"{name:<20} {' / '.join(map(percent, both))}")
        more = len(aps) - classes
        return "\n".join([*lines, f"and {more} classes with a higher AP"] if more > 0 else lines)


def coco_metrics(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    iou_types: Sequence[IouType] = ("bbox", "segm"),
    area_scale: float = 1.0,
) -> Metrics:
    """The COCO numbers of `results` against `ground_truth`.

    ground_truth: a COCO dictionary (images, annotations, categories; polygons or RLE, crowds).
    results: COCO results, each with image_id, category_id, score and what `iou_types` needs: `bbox`
    (x, y, width, height) and `segmentation` (compressed RLE).
    area_scale: multiplies the areas that separate small, medium and large (32 x 32 and 96 x 96
    pixels) and nothing else. COCO's meaning of small, on images of another size, is
    (long side / 640) ** 2. The ranges used are part of the result.

    Raises ValueError naming the annotation or result, and the field, that cannot be evaluated.
    """
    ranges, images = size_ranges(area_scale), image_numbers(ground_truth)
    check_results(ground_truth, results, iou_types)
    metrics = Metrics(area_ranges=ranges)
    names = category_names(ground_truth["categories"])
    for iou_type in iou_types:
        numbers, aps = _evaluate(ground_truth, results, iou_type, images, ranges)
        per_class = dict(zip(names, aps, strict=True))
        if iou_type == "bbox":
            metrics.box, metrics.box_per_class = numbers, per_class
        else:
            metrics.mask, metrics.mask_per_class = numbers, per_class
    return metrics


def _evaluate(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    iou_type: IouType,
    images: dict[int | str, int],
    ranges: dict[str, tuple[float, float]],
) -> tuple[dict[str, float], list[float]]:
    """The numbers of `COLUMNS`, and the AP of each category by id; NaN = undefined."""
    from faster_coco_eval import COCO, COCOeval_faster

    categories = ground_truth["categories"]
    if not images:  # the evaluator fails on none
        return dict.fromkeys(COLUMNS, math.nan), [math.nan] * len(categories)
    pictures = [
        {"id": images[image["id"]], "height": image.get("height"), "width": image.get("width")}
        for image in ground_truth["images"]
    ]
    tables = {"images": pictures, "categories": categories}
    truth = _annotations(ground_truth["annotations"], iou_type, images)
    found = _annotations(results, iou_type, images)
    for annotation, area in zip(found, areas_of(found, iou_type), strict=True):
        annotation["area"] = area
    evaluator = COCOeval_faster(
        COCO(tables | {"annotations": truth}),
        COCO(tables | {"annotations": found}),
        iouType=iou_type,
        ranges={name: list(limits) for name, limits in ranges.items()},
        print_function=lambda *_: None,
    )
    evaluator.run()
    # (T, R, K): IoU thresholds .50:.95, 101 recalls, categories by id; any size, the best 100
    precision = evaluator.eval["precision"][..., 0, -1]
    numbers = [_defined(number) for number in evaluator.stats]
    aps = [_defined(ap) for ap in precision.mean((0, 1))]
    return dict(zip(COLUMNS, numbers, strict=True)), aps


def _annotations(
    entries: list[dict[str, Any]], iou_type: IouType, images: dict[int | str, int]
) -> list[dict[str, Any]]:
    """Copies with ids from 1 and only the field that is evaluated (the evaluator writes into them,
    and derives areas from whatever fields it finds)."""
    needed = "bbox" if iou_type == "bbox" else "segmentation"
    return [
        {
            "id": number,
            "image_id": images[entry["image_id"]],
            "category_id": entry["category_id"],
            "iscrowd": int(entry.get("iscrowd", 0)),
            "area": entry.get("area"),
            "score": entry.get("score"),
            needed: entry[needed],
        }
        for number, entry in enumerate(entries, start=1)
    ]


def areas_of(found: list[dict[str, Any]], iou_type: IouType) -> list[float]:
    """Areas of detections in square pixels: of the box or of the mask."""
    # Not pycocotools: its mask.area overflows on lists of more than 255 masks.
    from faster_coco_eval.core import mask as fast_mask

    if iou_type == "bbox":
        return [entry["bbox"][2] * entry["bbox"][3] for entry in found]
    return [float(area) for area in fast_mask.area([entry["segmentation"] for entry in found])]


def _defined(number: float) -> float:
    """COCO's -1 means that there is no such object."""
    return math.nan if number < 0 else float(number)


def size_ranges(area_scale: float) -> dict[str, tuple[float, float]]:
    """Areas in square pixels, from and to, of small, medium and large objects."""
    if not 0 < area_scale < math.inf:
        raise ValueError(f"area_scale={area_scale}: must be positive; 1 is COCO's own")
    small, medium = 32**2 * area_scale, 96**2 * area_scale
    return {"small": (0.0, small), "medium": (small, medium), "large": (medium, 1e10)}


def image_numbers(ground_truth: dict[str, Any]) -> dict[int | str, int]:
    """1, 2, ... for the image ids in sorted order, which decides between equal scores."""
    ids = {image["id"] for image in ground_truth["images"]}
    ordered = sorted(ids, key=lambda image_id: (isinstance(image_id, str), image_id))
    return {image_id: number for number, image_id in enumerate(ordered, start=1)}


def category_names(categories: list[dict[str, Any]]) -> list[str]:
    """Names in the order of ids; where two categories share a name, with the id."""
    counts = Counter(category["name"] for category in categories)
    ordered = sorted(categories, key=lambda category: category["id"])
    return [f"{c['name']} (id {c['id']})" if counts[c["name"]] > 1 else c["name"] for c in ordered]


class Result(msgspec.Struct):
    """A detection as a results file has it: COCO's, or what `mimdet predict` writes."""

    image_id: Id
    category_id: Whole
    score: Number
    bbox: tuple[Number, Number, Number, Number] | None = None
    segmentation: RunLengths | None = None


def read_results(path: str | Path, ground_truth: dict[str, Any]) -> list[dict[str, Any]]:
    """A COCO results file of these images, in which every entry has what the first one has.

    ValueError naming file and entry for anything else, run lengths that do not fill their image
    included: pycocotools would read beyond them. A warning names what else makes an AP of these
    results wrong (`doubts_about`).
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is no results file: it holds no list of detections")
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    ids = known_ids(ground_truth)
    needed: list[str] = []
    wrong: list[str] = []
    for index, entry in enumerate(entries):
        try:
            result = msgspec.convert(entry, Result)
            needed = needed or [name for name in ("bbox", "segmentation") if entry.get(name)]
            if not needed:
                raise ValueError("it has neither bbox nor segmentation")
            _check_entry(entry, "it", ids, needed)
            if result.segmentation is not None:
                entry["segmentation"] = compressed(result.segmentation, *sizes[result.image_id])
        except ValueError as error:
            wrong.append(f"results[{index}]: {error}")
    if wrong:
        raise ValueError(f"{path}: {_first_of(wrong, len(entries))}")
    doubts = doubts_about(ground_truth, entries)
    if doubts:
        warnings.warn("\n  ".join([f"{path}: its AP is to be doubted", *doubts]), stacklevel=2)
    return entries


def doubts_about(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """What a COCO evaluation takes from another tool's results without a word, with counts."""
    total, images = len(results), ground_truth["images"]
    answered = {result["image_id"] for result in results}
    missing = [image["id"] for image in images if image["id"] not in answered]
    entries = Counter(json.dumps(result, sort_keys=True) for result in results)
    doubts = {
        "scores are not in 0..1": sum(not 0 <= result["score"] <= 1 for result in results),
        "results are there more than once": total - len(entries),
        **_doubts_about_boxes(images, [result for result in results if result.get("bbox")]),
    }
    lines = [f"{count} of {total} {what}" for what, count in doubts.items() if count]
    if total and len(missing) > len(images) / 10:
        lines.append(
            f"{len(missing)} of {len(images)} images have no result, first {missing[0]!r}; all of "
            "their objects count as missed"
        )
    return lines


def _doubts_about_boxes(
    images: list[dict[str, Any]], results: list[dict[str, Any]]
) -> dict[str, int]:
    """Boxes of another layout or scale than x, y, width, height in pixels, by what is wrong."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    boxes = np.array([result["bbox"] for result in results], dtype=float).reshape(-1, 4)
    limits = np.array([sizes[result["image_id"]] for result in results], float).reshape(-1, 2) + 1
    first, second = boxes[:, :2], boxes[:, 2:]
    beyond = int((first + second > limits).any(1).sum())
    corners = ((second >= first) & (second <= limits)).all(1).mean() if len(boxes) else 0.0
    shares = len(boxes) if len(boxes) and boxes.max() <= 2 else 0
    looks = "; as x1, y1, x2, y2 they would fit" if corners > 0.99 else ""
    return {
        "boxes are empty": int((second <= 0).any(1).sum()),
        "boxes lie in 0..2, like shares of the image; they are pixels": shares,
        f"boxes reach beyond their image as x, y, width, height{looks}": beyond,
    }


def _first_of(wrong: list[str], total: int) -> str:
    """The first of some faulty results, and how many there are."""
    return f"{wrong[0]} ({len(wrong)} of {total} results cannot be used)"


def check_results(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    iou_types: Sequence[IouType],
) -> None:
    """Raise ValueError for entries the evaluator could not read or would leave out."""
    unknown = set(iou_types) - {"bbox", "segm"}
    if unknown:
        raise ValueError(f"iou_types={tuple(iou_types)}: use 'bbox', 'segm' or both")
    for image in ground_truth["images"] if "segm" in iou_types else []:
        if not (image.get("height") and image.get("width")):
            raise ValueError(f"image {image['id']!r} has no height and width; masks need them")
    ids = known_ids(ground_truth)
    needed = ["bbox"] * ("bbox" in iou_types) + ["segmentation"] * ("segm" in iou_types)
    for entry in ground_truth["annotations"]:
        _check_entry(entry, f"annotation {entry.get('id')}", ids, [*needed, "area"])
    wrong = []
    for index, entry in enumerate(results):
        name = f"results[{index}]"
        try:
            _check_entry(entry, name, ids, [*needed, "score"])
            if not math.isfinite(entry["score"]):
                raise ValueError(f"{name}: score is {entry['score']}; give {NEEDED['score']}")
            if "segm" in iou_types and not isinstance(entry["segmentation"], dict):
                raise ValueError(f"{name}: segmentation must be RLE; see bitmap_to_rle")
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(_first_of(wrong, len(results)))


def known_ids(ground_truth: dict[str, Any]) -> dict[str, set[Any]]:
    """What an entry's fields of these names may hold."""
    images, categories = ground_truth["images"], ground_truth["categories"]
    return {"image_id": {i["id"] for i in images}, "category_id": {c["id"] for c in categories}}


def _check_entry(
    entry: dict[str, Any], name: str, ids: dict[str, set[Any]], needed: list[str]
) -> None:
    for key in needed:
        if entry.get(key) is None:
            raise ValueError(f"{name} has no {key!r}; add it ({NEEDED[key]})")
    if entry["image_id"] not in ids["image_id"]:
        raise ValueError(f"{name}: image_id {entry['image_id']!r} is not among the images")
    if entry["category_id"] not in ids["category_id"]:
        raise ValueError(
            f"{name}: category_id {entry['category_id']} is not in {sorted(ids['category_id'])}; "
            "results carry the ids of the annotation file, not labels"
        )


def plain(value: Any) -> Any:
    """A json value: NaN becomes None, also inside dictionaries."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def percent(value: float | None) -> str:
    """x 100; "-" where there was nothing to find."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
