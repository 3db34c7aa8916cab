"""Detections and true objects as arrays, and how much they overlap.

Everything is flat, because half a million detections are a normal case: detections in order of
falling score, truths in the order of the file, and an overlap only where there is one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mimdet.analysis.metrics import IouType, areas_of, image_numbers

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MOST_DETECTIONS = 100
"""The best of an image and category are evaluated, as in COCO's AP."""


@dataclass(slots=True)
class Objects:
    """N detections or truths, column by column."""

    source: Ints
    """(N,) place in the list of results or annotations they come from."""
    image: Ints
    """(N,) 0, 1, ... in the order of sorted image ids."""
    category: Ints
    """(N,) rank of the category id."""
    area: Floats
    """(N,) square pixels: a truth's `area`; a detection's mask or box, whichever is evaluated."""
    score: Floats
    """(N,) NaN for truths."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> "Objects":
        return Objects(
            self.source[index],
            self.image[index],
            self.category[index],
            self.area[index],
            self.score[index],
        )


@dataclass(slots=True)
class Nearest:
    """For each of N detections the truth of its image that it overlaps most (the first of equals)
    among the truths of its own class, or of the other classes."""

    truth: Ints
    """(N,) -1 where nothing overlaps."""
    iou: Floats
    """(N,) 0 where nothing overlaps."""


@dataclass(slots=True)
class Pairs:
    """Detections and truths of one class and image that overlap: candidates for a match."""

    detection: Ints
    truth: Ints
    iou: Floats


@dataclass(slots=True)
class Overlaps:
    """Everything about a set of results that does not depend on an IoU threshold."""

    detections: Objects
    """Best score first; of equal scores the lower image id, then the earlier result, as in COCO."""
    truths: Objects
    """Without crowds."""
    same: Nearest
    other: Nearest
    crowd: Floats
    """(N,) the largest share of a detection that lies in one crowd region of its class."""
    pairs: Pairs
    categories: int
    """How many there are."""
    left_out: int
    """Results beyond the best 100 of their image and category."""


def find_overlaps(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    iou_type: IouType,
    floor: float,
) -> Overlaps:
    """Overlaps of COCO results with a COCO ground truth; both have been checked.

    floor: pairs of a smaller IoU are not kept; it limits the thresholds of `match_at`.
    """
    truths, crowds = _truths(ground_truth)
    every = _detections(ground_truth, results, iou_type)
    detections = every[_within_limit(every)]
    shapes = _shapes(ground_truth, iou_type)
    annotations = ground_truth["annotations"]
    field = "bbox" if iou_type == "bbox" else "segmentation"
    found = _Found.empty(len(detections))

    by_image = [_by_image(objects) for objects in (detections, truths, crowds)]
    for image, mine in by_image[0].items():
        regions = [results[i][field] for i in detections.source[mine]]
        own_class = detections.category[mine][:, None]
        theirs = by_image[1].get(image)
        if theirs is not None:
            real = [shapes(annotations[i]) for i in truths.source[theirs]]
            iou = _iou(regions, real, crowd=False)
            found.add(mine, theirs, iou, own_class == truths.category[theirs], floor)
        theirs = by_image[2].get(image)
        if theirs is not None:
            real = [shapes(annotations[i]) for i in crowds.source[theirs]]
            share = _iou(regions, real, crowd=True) * (own_class == crowds.category[theirs])
            found.crowd[mine] = share.max(1)
    pairs = Pairs(*(np.concatenate(column) for column in zip(*found.pairs, strict=True)))
    categories = len(ground_truth["categories"])
    left_out = len(every) - len(detections)
    return Overlaps(
        detections, truths, found.same, found.other, found.crowd, pairs, categories, left_out
    )


@dataclass(slots=True)
class _Found:
    """What `find_overlaps` collects image by image."""

    same: Nearest
    other: Nearest
    crowd: Floats
    pairs: list[tuple[Ints, Ints, Floats]]

    @classmethod
    def empty(cls, count: int) -> "_Found":
        none = np.zeros(0, dtype=np.int64)
        same, other = (Nearest(np.full(count, -1), np.zeros(count)) for _ in range(2))
        return cls(same, other, np.zeros(count), [(none, none, np.zeros(0))])

    def add(self, mine: Ints, theirs: Ints, iou: Floats, same_class: Bools, floor: float) -> None:
        """Of one image: n detections `mine`, m truths `theirs`, their iou (n, m)."""
        for nearest, overlap in ((self.same, iou * same_class), (self.other, iou * ~same_class)):
            best = overlap.argmax(1)
            most = overlap[np.arange(len(mine)), best]
            nearest.iou[mine] = most
            nearest.truth[mine] = np.where(most > 0, theirs[best], -1)
        row, column = np.nonzero((iou >= floor) & same_class)
        self.pairs.append((mine[row], theirs[column], iou[row, column]))


def _detections(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], iou_type: IouType
) -> Objects:
    """All results, best score first."""
    detections = _objects(ground_truth, results)
    detections.score[:] = [result["score"] for result in results]
    detections.area[:] = areas_of(results, iou_type) if results else []
    order = np.lexsort((detections.source, detections.image, -detections.score))
    return detections[order]


def _truths(ground_truth: dict[str, Any]) -> tuple[Objects, Objects]:
    """The objects to find, and the crowd regions."""
    annotations = ground_truth["annotations"]
    truths = _objects(ground_truth, annotations)
    truths.area[:] = [annotation["area"] for annotation in annotations]
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    return truths[~crowd], truths[crowd]


def _objects(ground_truth: dict[str, Any], entries: list[dict[str, Any]]) -> Objects:
    """Entries in their own order, without areas and scores."""
    images = image_numbers(ground_truth)
    ids = sorted(category["id"] for category in ground_truth["categories"])
    rank = {category_id: number for number, category_id in enumerate(ids)}
    return Objects(
        np.arange(len(entries)),
        np.array([images[entry["image_id"]] - 1 for entry in entries], dtype=np.int64),
        np.array([rank[entry["category_id"]] for entry in entries], dtype=np.int64),
        np.full(len(entries), np.nan),
        np.full(len(entries), np.nan),
    )


def _within_limit(detections: Objects) -> Ints:
    """The places of the best 100 of every image and category, in order."""
    order = np.lexsort((detections.category, detections.image))  # stable: by score within a group
    image, category = detections.image[order], detections.category[order]
    new_group = (np.diff(image, prepend=-1) != 0) | (np.diff(category, prepend=-1) != 0)
    starts = np.flatnonzero(new_group)
    sizes = np.diff(starts, append=len(order))
    rank = np.arange(len(order)) - np.repeat(starts, sizes)
    return np.sort(order[rank < MOST_DETECTIONS])


def _by_image(objects: Objects) -> dict[int, Ints]:
    """Image number -> places of its objects, in order."""
    order = np.argsort(objects.image, kind="stable")
    images, counts = np.unique(objects.image[order], return_counts=True)
    ends = np.cumsum(counts)
    spans = zip(images.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
    return {image: order[start:end] for image, start, end in spans}


def _shapes(ground_truth: dict[str, Any], iou_type: IouType) -> Callable[[dict[str, Any]], Any]:
    """A function: annotation -> what its IoU is computed of, a box or run lengths."""
    if iou_type == "bbox":
        return lambda annotation: annotation["bbox"]
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    return lambda annotation: as_rle(annotation["segmentation"], *sizes[annotation["image_id"]])


def as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO segmentation (polygons, or run lengths of any form) as compressed run lengths."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def _iou(regions: list[Any], truths: list[Any], crowd: bool) -> Floats:
    """(n, m) IoU of boxes or run lengths; with `crowd` the share of each region in each truth."""
    from pycocotools import mask as coco_mask

    if isinstance(regions[0], dict):
        return coco_mask.iou(regions, truths, [crowd] * len(truths))
    boxes = [np.asarray(side, dtype=np.float64).reshape(-1, 4) for side in (regions, truths)]
    return coco_mask.iou(*boxes, [crowd] * len(truths))


Kind = Literal["classification", "localisation", "both", "duplicate", "background", "missed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The types of errors, in the order in which the paper fixes them. All but the last are false
positives; a missed object is a truth that no other error could turn into a correct detection."""
NO_KIND = -1


@dataclass(slots=True)
class Outcome:
    """What became of N detections and M truths at one IoU threshold."""

    match: Ints
    """(N,) truth that a detection is correct for, or -1."""
    kind: Ints
    """(N,) place in KINDS of what is wrong with a false positive; NO_KIND = it is none."""
    concerns: Ints
    """(N,) truth that a false positive should have met: of its class, or for "classification" and
    "both" of another; -1 for "background"."""
    repair: Ints
    """(N,) truth that a false positive finds once its class or place is corrected; -1 = it has to
    go, because something else finds that truth or it is an error of another type."""
    found: Bools
    """(M,) truths with a correct detection."""
    missed: Bools
    """(M,) truths without one, that no false positive would find after its correction."""


def match_at(overlaps: Overlaps, threshold: float) -> tuple[Ints, Bools]:
    """COCO's matching: (N,) truth of each detection or -1, and (N,) bool, detections that count
    neither way because they lie in a crowd region.

    In order of score, each detection takes the free truth of its class that it overlaps most (of
    equal ones the later), at an IoU of `threshold` or more.
    """
    least = min(threshold, 1 - 1e-10)  # so that at threshold 1 rounding loses no perfect match
    pairs = overlaps.pairs
    near = np.flatnonzero(pairs.iou >= least)
    order = near[np.lexsort((-pairs.truth[near], -pairs.iou[near], pairs.detection[near]))]
    match = [-1] * len(overlaps.detections)  # a list: single items are much faster than an array's
    free = [True] * len(overlaps.truths)
    couples = zip(pairs.detection[order].tolist(), pairs.truth[order].tolist(), strict=True)
    for detection, truth in couples:
        if match[detection] < 0 and free[truth]:
            match[detection] = truth
            free[truth] = False
    matched = np.array(match, dtype=np.int64)
    return matched, (matched < 0) & (overlaps.crowd >= least)


def find_outcome(overlaps: Overlaps, threshold: float, background: float) -> Outcome:
    """The type of every false positive and the missed truths.

    The first of these that holds (same: the IoU with the nearest truth of its class; other: of
    another class): background <= same <= threshold, localisation; other >= threshold,
    classification; same > threshold, duplicate (that truth is taken, or it would have matched);
    neither above `background`, background; anything else, both.
    """
    match, ignored = match_at(overlaps, threshold)
    false = (match < 0) & ~ignored
    same, other = overlaps.same, overlaps.other
    tests = {
        "localisation": (background <= same.iou) & (same.iou <= threshold),
        "classification": other.iou >= threshold,
        "duplicate": same.iou > threshold,
        "background": np.maximum(same.iou, other.iou) <= background,
    }
    numbers = [KINDS.index(name) for name in tests]  # type: ignore[arg-type]
    kind = np.select(list(tests.values()), numbers, KINDS.index("both"))
    kind = np.where(false, kind, NO_KIND)

    is_own = np.isin(kind, [KINDS.index("localisation"), KINDS.index("duplicate")])
    is_other = np.isin(kind, [KINDS.index("classification"), KINDS.index("both")])
    concerns = np.where(is_own, same.truth, np.where(is_other, other.truth, -1))

    found = np.zeros(len(overlaps.truths), dtype=bool)
    found[match[match >= 0]] = True
    could = np.isin(kind, [KINDS.index("localisation"), KINDS.index("classification")])
    could &= ~np.append(found, True)[concerns]  # -1 reads the last one
    candidates = np.flatnonzero(could)
    repairable, first = np.unique(concerns[candidates], return_index=True)
    repair = np.full(len(kind), -1)
    repair[candidates[first]] = repairable  # the first is the one of the best score
    missed = ~found
    missed[repairable] = False
    return Outcome(match, kind, concerns, repair, found, missed)
