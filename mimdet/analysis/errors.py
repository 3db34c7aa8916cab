"""Why AP is lost: every mistake has one type, and fixing all mistakes of a type has a price.

This is TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV
2020, https://arxiv.org/abs/2008.08115) under COCO's rules: `report.ap` is the AP50 of
`mimdet.analysis.metrics`. Where this departs from the authors' tidecv 1.0.1, and why:

- up to 100 detections of an image and class count, as in COCO's AP; in tidecv 100 of an image;
- a detection in a crowd region is no error, as COCO ignores it; tidecv gives it a type, and a fix
  may turn it into a correct one. COCO asks for a share >= the threshold, tidecv for more than it;
- classes without objects are left out of the mean. In tidecv they count as AP 0 for as long as they
  have detections, so that removing those raises the mean;
- a class is perfect once nothing is asked of it and nothing is claimed (all of its objects were
  missed, and the misses are fixed); tidecv takes it out of the mean, which reweighs the others;
- equal scores are in COCO's order, by image id, also after a fix, so that no fix lowers AP; tidecv
  takes the file's order of images, moves wrong detections ahead of right ones and sets losses to 0;
- of two objects that a detection overlaps equally it takes the later, as COCO; tidecv the first;
- recall levels are COCO's linspace(0, 1, 101), in tidecv k / 100: where a recall is exactly such a
  level, rounding decides whether it is reached.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mimdet.analysis.matching import (
    KINDS,
    Bools,
    Floats,
    Ints,
    Kind,
    Outcome,
    Overlaps,
    find_outcome,
    find_overlaps,
    match_at,
)
from mimdet.analysis.metrics import IouType, category_names, check_results, image_numbers, percent

if TYPE_CHECKING:
    from pandas import DataFrame


RECALLS = np.linspace(0.0, 1.0, 101)
"""COCO's recall levels; some are a rounding error above k / 100, and they are kept so, because a
recall of exactly k / 100 is frequent."""


@dataclass(slots=True)
class Ranking:
    """Detections that count, best score first, and how many truths each class has."""

    category: Ints
    """(N,)"""
    correct: Bools
    """(N,)"""
    truths: Ints
    """(K,)"""


def matched_ranking(overlaps: Overlaps, match: Ints, ignored: Bools) -> Ranking:
    """Detections as they were matched."""
    counts = ~ignored
    category = overlaps.detections.category[counts]
    return Ranking(category, match[counts] >= 0, truth_counts(overlaps))


def truth_counts(overlaps: Overlaps) -> Ints:
    """(K,) truths of each class, crowds left out."""
    return np.bincount(overlaps.truths.category, minlength=overlaps.categories)


def fixed_ranking(
    overlaps: Overlaps,
    outcome: Outcome,
    kinds: Iterable[Kind],
    only: tuple[Bools, Bools] | None = None,
) -> Ranking:
    """What is left once all errors of `kinds` are fixed.

    only: (N,) detections and (M,) missed truths to which the fix is restricted. A detection keeps
    its place in the order of scores.
    """
    numbers = [KINDS.index(kind) for kind in kinds]
    chosen = np.isin(outcome.kind, numbers)
    forgiven = outcome.missed & (KINDS.index("missed") in numbers)
    if only is not None:
        chosen, forgiven = chosen & only[0], forgiven & only[1]
    repaired = chosen & (outcome.repair >= 0)
    counts = (outcome.match >= 0) | repaired | ((outcome.kind >= 0) & ~chosen)
    correct = (outcome.match >= 0) | repaired
    category = overlaps.detections.category.copy()
    category[repaired] = overlaps.truths.category[outcome.repair[repaired]]
    asked = np.bincount(overlaps.truths.category[~forgiven], minlength=overlaps.categories)
    return Ranking(category[counts], correct[counts], asked)


def without_false_positives(overlaps: Overlaps, outcome: Outcome) -> Ranking:
    """Only what is correct: perfect precision at the same recall."""
    correct = outcome.match >= 0
    category = overlaps.detections.category[correct]
    return Ranking(category, np.ones(len(category), dtype=bool), truth_counts(overlaps))


def without_false_negatives(overlaps: Overlaps, outcome: Outcome) -> Ranking:
    """Only truths that were found are asked for: perfect recall at the same precision."""
    counts = (outcome.match >= 0) | (outcome.kind >= 0)
    found = overlaps.truths.category[outcome.found]
    asked = np.bincount(found, minlength=overlaps.categories)
    category = overlaps.detections.category[counts]
    return Ranking(category, outcome.match[counts] >= 0, asked)


def class_precisions(ranking: Ranking) -> Floats:
    """(K, 101) interpolated precision of each class at RECALLS; AP is the mean of a row.

    A class of which nothing is asked (any more) has precision 1 when nothing is claimed either,
    else 0. Classes that never had a truth are for the caller to leave out, as COCO does.
    """
    order = np.argsort(ranking.category, kind="stable")
    ends = np.cumsum(np.bincount(ranking.category, minlength=len(ranking.truths)))
    groups = np.split(ranking.correct[order], ends[:-1])
    rows = [precision_at_recalls(groups[k], int(n)) for k, n in enumerate(ranking.truths)]
    return np.array(rows).reshape(-1, len(RECALLS))


def class_aps(overlaps: Overlaps, ranking: Ranking) -> Floats:
    """(K,) AP of each class; NaN for a class that has no truth in `overlaps`."""
    return np.where(truth_counts(overlaps) > 0, class_precisions(ranking).mean(1), np.nan)


def mean_ap(overlaps: Overlaps, ranking: Ranking) -> float:
    """The mean over classes that have truths; NaN where none has."""
    aps = class_aps(overlaps, ranking)
    known = aps[~np.isnan(aps)]
    return float(known.mean()) if len(known) else float("nan")


def precision_at_recalls(correct: Bools, truths: int) -> Floats:
    """(101,): the best precision at each recall or a higher one; 0 where none is as high.

    correct: (n,) detections of one class, best score first.
    """
    if truths == 0:
        return np.full(len(RECALLS), float(len(correct) == 0))
    right = np.cumsum(correct)
    precision = right / np.arange(1, len(correct) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(right / truths, RECALLS, side="left")
    return np.append(best, 0.0)[reached]


@dataclass(slots=True)
class Judged:
    """Results, their truth, and what became of them."""

    ground_truth: dict[str, Any]
    results: list[dict[str, Any]]
    categories: list[str]
    """Names in the order of their ids."""
    area_ranges: dict[str, tuple[float, float]]
    """Square pixels, from and to (left out)."""
    overlaps: Overlaps
    outcome: Outcome

    def of_kind(self, kind: Kind) -> Bools:
        """(N,) the false positives of a type; for "missed", (M,) the missed truths."""
        return self.outcome.missed if kind == "missed" else self.outcome.kind == KINDS.index(kind)


def class_table(judged: Judged) -> "DataFrame":
    """See `ErrorReport.by_class`."""
    from pandas import DataFrame

    overlaps, outcome = judged.overlaps, judged.outcome
    says, real = overlaps.detections.category, overlaps.truths.category
    ap = class_aps(overlaps, fixed_ranking(overlaps, outcome, ()))

    def count(categories: Ints) -> Ints:
        return np.bincount(categories, minlength=overlaps.categories)

    columns = {
        "objects": truth_counts(overlaps),
        "correct": count(real[outcome.found]),
        "ap": ap,
    }
    for kind in KINDS:
        classes = real if kind == "missed" else says
        columns[f"errors_{kind}"] = count(classes[judged.of_kind(kind)])
    for kind in KINDS:
        columns[f"dap_{kind}"] = class_aps(overlaps, fixed_ranking(overlaps, outcome, (kind,))) - ap
    return DataFrame(columns, index=judged.categories)


def size_table(judged: Judged) -> "DataFrame":
    """See `ErrorReport.by_size`."""
    from pandas import DataFrame

    overlaps, outcome = judged.overlaps, judged.outcome
    ap = mean_ap(overlaps, fixed_ranking(overlaps, outcome, ()))
    object_area = overlaps.truths.area
    aimed = judged.of_kind("localisation") | judged.of_kind("classification")
    concerned = np.append(object_area, np.nan)[outcome.concerns]
    error_area = np.where(aimed, concerned, overlaps.detections.area)
    rows: dict[str, dict[str, Any]] = {}
    for size, (low, high) in judged.area_ranges.items():
        errors = (low <= error_area) & (error_area < high)
        objects = (low <= object_area) & (object_area < high)
        rows[size] = {"objects": objects.sum(), "correct": (objects & outcome.found).sum()}
        for kind in KINDS:
            chosen = judged.of_kind(kind) & (objects if kind == "missed" else errors)
            rows[size][f"errors_{kind}"] = chosen.sum()
        for kind in KINDS:
            fixed = fixed_ranking(overlaps, outcome, (kind,), only=(errors, objects))
            rows[size][f"dap_{kind}"] = mean_ap(overlaps, fixed) - ap
    return DataFrame.from_dict(rows, orient="index")


def confusion_table(judged: Judged) -> "DataFrame":
    """See `ErrorReport.confusions`."""
    from pandas import DataFrame

    chosen = judged.of_kind("classification")
    names = np.array(judged.categories, dtype=object)
    said = judged.overlaps.detections.category[chosen]
    true = judged.overlaps.truths.category[judged.outcome.concerns[chosen]]
    pairs, counts = np.unique(np.stack([said, true]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    said, true = pairs[:, order]
    return DataFrame({"said": names[said], "true": names[true], "errors": counts[order]})


MEANINGS = {
    "classification": "right place, wrong class",
    "localisation": "right class, wrong place",
    "both": "wrong class and wrong place",
    "duplicate": "object already found by a higher score",
    "background": "no object there",
    "missed": "object that nothing points to",
    "false positives": "all wrong detections removed",
    "false negatives": "only the objects found are asked for",
}
"""The six types and the two special oracles, in words."""


@dataclass(frozen=True, slots=True)
class DetectionError:
    """One mistake. `result` and `truth` are the caller's own COCO entries."""

    kind: Kind
    image_id: int | str
    score: float
    """Of the detection; NaN for a missed object."""
    said: str
    """The class the detector gave; "" for a missed object."""
    true: str
    """The class of the object it concerns; "" for a background error."""
    iou: float
    """With that object (background: with the nearest one); NaN for a missed object."""
    result: dict[str, Any] | None
    truth: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Curve:
    """Precision over recall of a class, or of the mean of all classes, at one IoU threshold."""

    category: str
    """"" for the mean."""
    iou_threshold: float
    recall: Floats
    """(101,) 0, .01, ..., 1."""
    precision: Floats
    """(101,) interpolated as in COCO: the best at this recall or a higher one."""
    ap: float
    """The mean of `precision`; NaN for a class without objects."""


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """The errors of one set of results. APs are fractions in 0..1, as in `Metrics`; where the data
    has no object at all they are NaN."""

    iou_type: IouType
    iou_threshold: float
    background_threshold: float
    ap: float
    """At `iou_threshold`; the mean over the classes that have objects."""
    dap: dict[str, float]
    """What fixing all errors of one type, and nothing else, adds to `ap`: a number per KINDS."""
    special: dict[str, float]
    """The same of the oracles "false positives" and "false negatives"."""
    progressive: dict[str, float]
    """`ap` after the errors of a type and of those named before it are fixed; the last is 1."""
    counts: dict[str, int]
    """Errors of each of KINDS."""
    correct: int
    """Correct detections, and as many objects found."""
    ignored: int
    """Detections in crowd regions, neither right nor wrong."""
    left_out: int
    """Results beyond the best 100 of their image and class, which COCO does not look at."""
    objects: int
    """Objects to find: crowds are none."""
    _judged: Judged = field(repr=False)

    @property
    def categories(self) -> list[str]:
        """Names in the order of the category ids."""
        return self._judged.categories

    @property
    def area_ranges(self) -> dict[str, tuple[float, float]]:
        """Square pixels, from and to (left out), of small, medium and large."""
        return self._judged.area_ranges

    def table(self) -> str:
        """Text, a row per type: dAP x 100, how many errors, what they are."""
        head = (
            f"{self.iou_type}, IoU {self.iou_threshold:g}, background {self.background_threshold:g}"
            f": AP {percent(self.ap)}, {self.correct} of {self.objects} objects found"
        )
        lines = [head, f"{'':<16}{'dAP':>6}{'errors':>9}"]
        for name, dap in (self.dap | self.special).items():
            count = str(self.counts.get(name, ""))
            lines.append(f"{name:<16}{percent(dap):>6}{count:>9}  {MEANINGS[name]}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The numbers for json (NaN as None), without the single errors."""
        tables = {"dap": self.dap, "special": self.special, "progressive": self.progressive}
        return {
            "iou_type": self.iou_type,
            "iou_threshold": self.iou_threshold,
            "background_threshold": self.background_threshold,
            "ap": _json(self.ap),
            **{name: {k: _json(v) for k, v in table.items()} for name, table in tables.items()},
            "counts": dict(self.counts),
            "correct": self.correct,
            "ignored": self.ignored,
            "left_out": self.left_out,
            "objects": self.objects,
        }

    def errors(
        self, kind: Kind, said: str | None = None, true: str | None = None
    ) -> list[DetectionError]:
        """The errors of a type, the highest score first; missed objects, the largest first.

        said, true: only those with this class given by the detector, or of this true class.
        Raises ValueError for an unknown type or class.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: use one of {', '.join(KINDS)}")
        for name in (said, true):
            if name is not None and name not in self.categories:
                raise ValueError(f"{name!r} is no class; there are {', '.join(self.categories)}")
        places = np.flatnonzero(self._judged.of_kind(kind))
        if kind == "missed":
            area = self._judged.overlaps.truths.area[places]
            places = places[np.argsort(-area, kind="stable")]
        found = [self._error(kind, place) for place in places.tolist()]
        return [e for e in found if said in (None, e.said) and true in (None, e.true)]

    def by_class(self) -> "DataFrame":
        """A row per class: objects, correct, ap, then errors_... and dap_... of each type.

        An error belongs to the class the detector gave, a missed object to its own. dap_... is
        what fixing the errors of that type in all classes adds to the AP of this one, so the mean
        of the column is the dAP of the whole. NaN for a class without objects.
        """
        return class_table(self._judged)

    def by_size(self) -> "DataFrame":
        """A row for small, medium and large: objects, correct, errors_... and dap_... of each type.

        dap_... is what the whole AP gains when the errors of this size alone are fixed (the AP of
        the size would not say how much it matters). An error has the size of the object it concerns
        (classification, localisation, missed), else of the detection; as tidecv's area qualifiers,
        but with COCO's areas, not those of boxes.
        """
        return size_table(self._judged)

    def confusions(self) -> "DataFrame":
        """The classification errors: class said, true class, errors; the most frequent first."""
        return confusion_table(self._judged)

    def curves(self, iou_thresholds: Sequence[float] = (0.5, 0.75, 0.9)) -> list[Curve]:
        """Precision over recall at each threshold: the mean over the classes, then each class.

        Raises ValueError for a threshold that is not above the background threshold.
        """
        overlaps, curves = self._judged.overlaps, []
        for threshold in iou_thresholds:
            if not self.background_threshold < threshold <= 1:
                low = self.background_threshold
                raise ValueError(f"iou_thresholds: {threshold} is not in ({low}, 1]")
            ranking = matched_ranking(overlaps, *match_at(overlaps, threshold))
            rows = class_precisions(ranking)
            rows[ranking.truths == 0] = np.nan
            known = rows[ranking.truths > 0]
            mean = known.mean(0) if len(known) else np.full(len(RECALLS), np.nan)
            for name, row in zip(["", *self.categories], [mean, *rows], strict=True):
                curves.append(Curve(name, threshold, RECALLS, row, float(row.mean())))
        return curves

    def _error(self, kind: Kind, place: int) -> DetectionError:
        """place: of a detection, or of a truth if missed."""
        judged, overlaps = self._judged, self._judged.overlaps
        missed = kind == "missed"
        truth = place if missed else int(judged.outcome.concerns[place])
        result = None if missed else judged.results[overlaps.detections.source[place]]
        annotation, score, said, true, iou = None, np.nan, "", "", np.nan
        if truth >= 0:
            annotation = judged.ground_truth["annotations"][overlaps.truths.source[truth]]
            true = self.categories[overlaps.truths.category[truth]]
        if result is not None:
            score, said = result["score"], self.categories[overlaps.detections.category[place]]
            same, other = float(overlaps.same.iou[place]), float(overlaps.other.iou[place])
            is_same = kind in ("localisation", "duplicate")
            iou = max(same, other) if kind == "background" else same if is_same else other
        entry = result or annotation or {}
        return DetectionError(kind, entry["image_id"], score, said, true, iou, result, annotation)


def find_errors(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    iou_type: IouType = "segm",
    *,
    iou_threshold: float = 0.5,
    background_threshold: float = 0.1,
    area_scale: float = 1.0,
) -> ErrorReport:
    """The errors of COCO `results` against a COCO `ground_truth`: their types, number and price.

    The entries are those of `mimdet.analysis.metrics.coco_metrics`, and so are iou_type, area_scale
    and the ValueErrors. iou_threshold: of a correct detection; background_threshold: an IoU up to
    which a detection has nothing to do with an object; both as in the paper.
    """
    if not 0 < background_threshold < iou_threshold <= 1:
        raise ValueError(
            f"background_threshold={background_threshold}, iou_threshold={iou_threshold}: needed "
            "is 0 < background_threshold < iou_threshold <= 1"
        )
    if not 0 < area_scale < np.inf:
        raise ValueError(f"area_scale={area_scale}: must be positive; 1 is COCO's own")
    check_results(ground_truth, results, (iou_type,), image_numbers(ground_truth))
    overlaps = find_overlaps(ground_truth, results, iou_type, background_threshold)
    outcome = find_outcome(overlaps, iou_threshold, background_threshold)
    small, medium = 32**2 * area_scale, 96**2 * area_scale
    ranges = {"small": (0.0, small), "medium": (small, medium), "large": (medium, 1e10)}
    names = category_names(ground_truth["categories"])
    judged = Judged(ground_truth, results, names, ranges, overlaps, outcome)

    def ap_with(*kinds: Kind) -> float:
        return mean_ap(overlaps, fixed_ranking(overlaps, outcome, kinds))

    ap = ap_with()
    special = {
        "false positives": mean_ap(overlaps, without_false_positives(overlaps, outcome)) - ap,
        "false negatives": mean_ap(overlaps, without_false_negatives(overlaps, outcome)) - ap,
    }
    correct = int(outcome.found.sum())
    wrong = int((outcome.kind >= 0).sum())
    return ErrorReport(
        iou_type=iou_type,
        iou_threshold=iou_threshold,
        background_threshold=background_threshold,
        ap=ap,
        dap={kind: ap_with(kind) - ap for kind in KINDS},
        special=special,
        progressive={kind: ap_with(*KINDS[: i + 1]) for i, kind in enumerate(KINDS)},
        counts={kind: int(judged.of_kind(kind).sum()) for kind in KINDS},
        correct=correct,
        ignored=len(overlaps.detections) - correct - wrong,
        left_out=overlaps.left_out,
        objects=len(overlaps.truths),
        _judged=judged,
    )


def _json(value: float) -> float | None:
    return None if np.isnan(value) else value
