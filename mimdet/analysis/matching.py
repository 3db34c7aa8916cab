"""Which detections overlap which objects, and COCO's matching of them.

Everything is flat, because half a million detections are a normal case: detections in order of
falling score, truths in the order of the file, and an overlap only where there is one.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from mimdet.analysis.metrics import IouType, areas_of, image_numbers
from mimdet.structures import as_rle

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

Kind = Literal["classification", "localisation", "both", "duplicate", "background", "missed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The types of errors, in the order in which the paper fixes them. All but the last are false
positives; a missed object is a truth that no other error could turn into a correct detection."""
Verdict = Literal["correct", Kind]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""Correct, then the six types of errors."""
AIMED: tuple[Verdict, ...] = ("correct", "localisation", "classification")
"""Of detections that find their object, or would if the error were corrected."""

MOST_DETECTIONS = 100
"""The best of an image and category are evaluated, as in COCO's AP."""


class Columns:
    """A dataclass of arrays of one length, which are indexed together."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Self:
        columns = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return type(self)(*(column[index] for column in columns))


@dataclass(frozen=True)
class Objects(Columns):
    """N detections or truths."""

    source: Ints
    """(N,) index in the list of results or annotations they come from."""
    image: Ints
    """(N,) 0, 1, ... in the order of sorted image ids."""
    category: Ints
    """(N,) rank of the category id."""
    area: Floats
    """(N,) square pixels: a truth's `area`; a detection's mask or box, whichever is evaluated."""
    shape: NDArray[np.object_]
    """(N,) x, y, width, height, or compressed run lengths."""


@dataclass(frozen=True)
class Pairs(Columns):
    """P detections and truths of one image that overlap."""

    detection: Ints
    truth: Ints
    iou: Floats

    def nearest(self, detections: int) -> tuple[Ints, Floats]:
        """For each detection the truth it overlaps most (the first of equals) and their IoU; -1 and
        0 where it overlaps none."""
        truth, iou = np.full(detections, -1), np.zeros(detections)
        by_iou = self[np.lexsort((-self.truth, self.iou))]
        truth[by_iou.detection] = by_iou.truth  # the last that is written stays
        iou[by_iou.detection] = by_iou.iou
        return truth, iou


@dataclass(frozen=True)
class Overlaps:
    """Everything about a set of results that does not depend on an IoU threshold."""

    detections: Objects
    """Best score first; of equal scores the lower image id, then the earlier result, as in COCO."""
    score: Floats
    """(N,) of the detections."""
    truths: Objects
    """Without crowds."""
    same: Pairs
    """Detections and truths of the same class: candidates for a match."""
    other: Pairs
    """Those of different classes."""
    crowd: Floats
    """(N,) the largest share of a detection that lies in one crowd region of its class."""
    categories: int
    """How many there are."""
    left_out: int
    """Results beyond the best 100 of their image and category."""

    @property
    def objects(self) -> Ints:
        """(K,) truths of each class."""
        return np.bincount(self.truths.category, minlength=self.categories)


def find_overlaps(
    ground_truth: dict[str, Any], results: list[dict[str, Any]], iou_type: IouType
) -> Overlaps:
    """Overlaps of COCO results with a COCO ground truth; both have been checked."""
    every = _objects(ground_truth, results, areas_of(results, iou_type), iou_type)
    score = np.array([result["score"] for result in results], dtype=np.float64)
    order = np.lexsort((every.source, every.image, -score))
    order = order[_within_limit(every[order])]
    detections = every[order]

    annotations = ground_truth["annotations"]
    truths = _objects(ground_truth, annotations, [a["area"] for a in annotations], iou_type)
    is_crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool)
    same, other = _pairs(detections, truths[~is_crowd])
    in_crowds, _ = _pairs(detections, truths[is_crowd], crowd=True)
    crowd = np.zeros(len(detections))
    np.maximum.at(crowd, in_crowds.detection, in_crowds.iou)
    return Overlaps(
        detections=detections,
        score=score[order],
        truths=truths[~is_crowd],
        same=same,
        other=other,
        crowd=crowd,
        categories=len(ground_truth["categories"]),
        left_out=len(every) - len(detections),
    )


def match_at(overlaps: Overlaps, threshold: float) -> tuple[Ints, Bools]:
    """COCO's matching: (N,) truth of each detection or -1, and (N,) bool, detections that count
    neither way because they lie in a crowd region.

    In order of score, each detection takes the free truth of its class that it overlaps most (of
    equal ones the later), at an IoU of `threshold` or more.
    """
    least = min(threshold, 1 - 1e-10)  # so that at threshold 1 rounding loses no perfect match
    near = overlaps.same[overlaps.same.iou >= least]
    near = near[np.lexsort((-near.truth, -near.iou, near.detection))]
    match = [-1] * len(overlaps.detections)  # a list: single items are much faster than an array's
    free = [True] * len(overlaps.truths)
    for detection, truth in zip(near.detection.tolist(), near.truth.tolist(), strict=True):
        if match[detection] < 0 and free[truth]:
            match[detection] = truth
            free[truth] = False
    matched = np.array(match, dtype=np.int64)
    return matched, (matched < 0) & (overlaps.crowd >= least)


@dataclass(frozen=True)
class Verdicts(Columns):
    """N entries: detections, best score first, then missed objects."""

    verdict: Ints
    """(N,) index in VERDICTS."""
    image: Ints
    """(N,) 0, 1, ... in the order of sorted image ids."""
    said: Ints
    """(N,) rank of the category id that the detector gave; -1 for a missed object."""
    true: Ints
    """(N,) that of the object it is about; -1 for a background error."""
    area: Floats
    """(N,) square pixels, of what decides its size: the object, if it is correct, a classification
    or localisation error or missed; else the detection. As in `ErrorReport.by_size`."""
    score: Floats
    """(N,) NaN for a missed object."""
    iou: Floats
    """(N,) of an error, with the object it is about (background: with the nearest one); NaN where
    correct or missed."""
    result: Ints
    """(N,) index in the results; -1 for a missed object."""
    annotation: Ints
    """(N,) index in the annotations of the object it is about; -1 for a background error."""
    truth: Ints
    """(N,) the same in `Overlaps.truths`."""
    repairs: Bools
    """(N,) errors that find their object once class or place is corrected. The other false
    positives have to go: something else finds that object, or they are of another type."""

    def count(self) -> dict[Verdict, int]:
        """How many there are of each."""
        counts = np.bincount(self.verdict, minlength=len(VERDICTS)).tolist()
        return dict(zip(VERDICTS, counts, strict=True))


def are(verdict: Ints, *names: Verdict) -> Bools:
    """(N,) those of one of these verdicts."""
    return np.isin(verdict, [VERDICTS.index(name) for name in names])


def judge(overlaps: Overlaps, threshold: float, background: float) -> Verdicts:
    """The verdict on every detection that does not lie in a crowd region, then all truths as if
    each were missed: `without_met` takes those out that are not.

    A verdict stays the same when detections of lower scores are left out, because matching goes
    from the best score down.
    """
    detections, truths = overlaps.detections, overlaps.truths
    match, ignored = match_at(overlaps, threshold)
    own, own_iou = overlaps.same.nearest(len(match))
    other, other_iou = overlaps.other.nearest(len(match))
    nearest = np.maximum(own_iou, other_iou)
    rules: dict[Verdict, Bools] = {  # the first that holds
        "correct": match >= 0,
        "localisation": (background <= own_iou) & (own_iou <= threshold),
        "classification": other_iou >= threshold,
        "duplicate": own_iou > threshold,  # that truth is taken, or it would have matched
        "background": nearest <= background,
        "both": np.full(len(match), True),
    }
    verdict = np.select(list(rules.values()), [VERDICTS.index(name) for name in rules])

    about = [
        are(verdict, "correct"),
        are(verdict, "localisation", "duplicate"),
        are(verdict, "classification", "both"),
    ]
    truth = np.select(about, [match, own, other], -1)
    found = np.isin(np.arange(len(truths)), match)
    could = are(verdict, "localisation", "classification") & ~ignored
    candidates = np.flatnonzero(could & ~np.append(found, True)[truth])  # -1 reads the last one
    best = np.unique(truth[candidates], return_index=True)[1]  # one a truth, of the best score
    repairs = np.isin(np.arange(len(match)), candidates[best])

    aimed_area = np.append(truths.area, np.nan)[truth]
    nothing = np.full(len(truths), -1)
    unknown = np.full(len(truths), np.nan)
    return Verdicts(
        verdict=np.append(verdict, np.full(len(truths), VERDICTS.index("missed"))),
        image=np.append(detections.image, truths.image),
        said=np.append(detections.category, nothing),
        true=np.append(np.append(truths.category, -1)[truth], truths.category),
        area=np.append(np.where(are(verdict, *AIMED), aimed_area, detections.area), truths.area),
        score=np.append(overlaps.score, unknown),
        iou=np.append(np.select(about, [np.nan, own_iou, other_iou], nearest), unknown),
        result=np.append(detections.source, nothing),
        annotation=np.append(np.append(truths.source, -1)[truth], truths.source),
        truth=np.append(truth, np.arange(len(truths))),
        repairs=np.append(repairs, np.full(len(truths), False)),
    )[np.append(~ignored, np.full(len(truths), True))]


def without_met(verdicts: Verdicts, *by: Verdict) -> Verdicts:
    """Of the truths at the end only those that no detection meets; by: those with one of these
    verdicts; none given = those that aim at it, right or wrong."""
    is_missed = are(verdicts.verdict, "missed")
    met = verdicts.truth[are(verdicts.verdict, *(by or AIMED))]
    return verdicts[~(is_missed & np.isin(verdicts.truth, met))]


def _objects(
    ground_truth: dict[str, Any], entries: list[dict[str, Any]], areas: list[float], iou_type: str
) -> Objects:
    """Entries in their own order."""
    images = image_numbers(ground_truth)
    sizes = {i["id"]: (i.get("height"), i.get("width")) for i in ground_truth["images"]}
    ids = sorted(category["id"] for category in ground_truth["categories"])
    rank = {category_id: number for number, category_id in enumerate(ids)}
    shapes = np.empty(len(entries), dtype=object)
    for i, entry in enumerate(entries):
        if iou_type == "bbox":
            shapes[i] = list(entry["bbox"])
        else:
            shapes[i] = as_rle(entry["segmentation"], *sizes[entry["image_id"]])
    return Objects(
        np.arange(len(entries)),
        np.array([images[entry["image_id"]] - 1 for entry in entries], dtype=np.int64),
        np.array([rank[entry["category_id"]] for entry in entries], dtype=np.int64),
        np.array(areas, dtype=np.float64),
        shapes,
    )


def _within_limit(detections: Objects) -> Ints:
    """The indices of the best 100 of every image and category, in order."""
    group = detections.image * (detections.category.max(initial=0) + 1) + detections.category
    order = np.argsort(group, kind="stable")  # by score within a group
    rank = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return np.sort(order[rank < MOST_DETECTIONS])


def _pairs(detections: Objects, truths: Objects, crowd: bool = False) -> tuple[Pairs, Pairs]:
    """Those of the same class, and of different ones. crowd: the IoU is the share of the detection
    that lies in the truth."""
    from pycocotools import mask as coco_mask

    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    there = _by_image(truths)
    for image, mine in _by_image(detections).items():
        if image in there:
            theirs = there[image]
            shapes = (detections.shape[mine].tolist(), truths.shape[theirs].tolist())
            iou = coco_mask.iou(*shapes, [crowd] * len(theirs))
            row, column = np.nonzero(iou)
            found.append((mine[row], theirs[column], iou[row, column]))
    pairs = Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))
    is_same = detections.category[pairs.detection] == truths.category[pairs.truth]
    return pairs[is_same], pairs[~is_same]


def _by_image(objects: Objects) -> dict[int, Ints]:
    """Image number -> indices of its objects, in order."""
    order = np.argsort(objects.image, kind="stable")
    images, starts = np.unique(objects.image[order], return_index=True)
    return dict(zip(images.tolist(), np.split(order, starts[1:]), strict=False))
