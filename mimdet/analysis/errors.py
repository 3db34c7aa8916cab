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

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mimdet.analysis.matching import (
    KINDS,
    VERDICTS,
    Bools,
    Floats,
    Ints,
    Kind,
    Overlaps,
    Verdict,
    Verdicts,
    are,
    find_overlaps,
    judge,
    match_at,
    without_met,
)
from mimdet.analysis.metrics import (
    IouType,
    category_names,
    check_results,
    image_numbers,
    percent,
    plain,
    size_ranges,
)

if TYPE_CHECKING:
    from pandas import DataFrame


Size = Literal["small", "medium", "large"]
SIZES: tuple[Size, ...] = get_args(Size)

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

RECALLS = np.linspace(0.0, 1.0, 101)
"""COCO's recall levels; some are a rounding error above k / 100, and they are kept so, because a
recall of exactly k / 100 is frequent."""


def find_errors(
    ground_truth: dict[str, Any],
    results: list[dict[str, Any]],
    iou_type: IouType = "segm",
    *,
    iou_threshold: float = 0.5,
    background_threshold: float = 0.1,
    area_scale: float = 1.0,
) -> "ErrorReport":
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
    area_ranges, images = size_ranges(area_scale), image_numbers(ground_truth)
    check_results(ground_truth, results, (iou_type,))
    overlaps = find_overlaps(ground_truth, results, iou_type)
    judged = judge(overlaps, iou_threshold, background_threshold)
    verdicts = without_met(judged)

    def ap_of(entries: Verdicts, *fixed: Kind) -> float:
        return mean_ap(fixed_aps(overlaps, entries, are(entries.verdict, *fixed)))

    ap, counts = ap_of(verdicts), verdicts.count()
    only_correct = verdicts[are(verdicts.verdict, "correct")]
    all_not_found = without_met(judged, "correct")
    special = {
        "false positives": ap_of(only_correct) - ap,
        "false negatives": ap_of(all_not_found, "missed") - ap,
    }
    return ErrorReport(
        iou_type=iou_type,
        iou_threshold=iou_threshold,
        background_threshold=background_threshold,
        ap=ap,
        dap={kind: ap_of(verdicts, kind) - ap for kind in KINDS},
        special=special,
        progressive={kind: ap_of(verdicts, *KINDS[: i + 1]) for i, kind in enumerate(KINDS)},
        counts={kind: counts[kind] for kind in KINDS},
        correct=counts["correct"],
        ignored=len(overlaps.detections) + len(overlaps.truths) - len(judged),
        left_out=overlaps.left_out,
        objects=len(overlaps.truths),
        categories=category_names(ground_truth["categories"]),
        area_ranges=area_ranges,
        image_ids=list(images),
        ground_truth=ground_truth,
        results=results,
        _overlaps=overlaps,
        _judged=judged,
    )


# --- average precision --------------------------------------------------------------------------


def fixed_aps(overlaps: Overlaps, verdicts: Verdicts, fixed: Bools) -> Floats:
    """(K,) AP of each class once the errors `fixed` (N,) are fixed; NaN for one without truths. A
    detection keeps its place in the order of scores."""
    is_missed = are(verdicts.verdict, "missed")
    repaired = fixed & verdicts.repairs
    correct = are(verdicts.verdict, "correct") | repaired
    stays = ~is_missed & (correct | ~fixed)
    category = np.where(repaired, verdicts.true, verdicts.said)
    forgiven = np.bincount(verdicts.true[fixed & is_missed], minlength=overlaps.categories)
    objects = overlaps.objects
    rows = precisions(category[stays], correct[stays], objects - forgiven)
    return np.where(objects > 0, rows.mean(1), np.nan)


def mean_ap(aps: Floats) -> float:
    """The mean over classes that have truths; NaN where none has."""
    known = aps[~np.isnan(aps)]
    return float(known.mean()) if len(known) else float("nan")


def precisions(group: Ints, correct: Bools, asked: Ints) -> Floats:
    """(K, 101) interpolated precision of each group at RECALLS; AP is the mean of a row.

    group, correct: (N,) of detections, best score first; asked: (K,) objects of each group. One of
    which nothing is asked (any more) has precision 1 when nothing is claimed either, else 0. Groups
    that never had a truth are for the caller to leave out, as COCO does.
    """
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group, minlength=len(asked)))
    parts = np.split(correct[order], ends[:-1])
    rows = np.zeros((len(asked), len(RECALLS)))
    for k, objects in enumerate(asked.tolist()):
        of_group = parts[k]
        if objects == 0:
            rows[k] = len(of_group) == 0
            continue
        right = np.cumsum(of_group)
        precision = right / np.arange(1, len(right) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
        reached = np.searchsorted(right / objects, RECALLS, side="left")
        rows[k] = np.append(best, 0.0)[reached]
    return rows


# --- the report ---------------------------------------------------------------------------------


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
    categories: list[str] = field(repr=False)
    """Names in the order of the category ids."""
    area_ranges: dict[str, tuple[float, float]] = field(repr=False)
    """Square pixels, from and to (left out), of small, medium and large."""
    image_ids: list[int | str] = field(repr=False)
    """In the order of `Verdicts.image`."""
    ground_truth: dict[str, Any] = field(repr=False)
    results: list[dict[str, Any]] = field(repr=False)
    _overlaps: Overlaps = field(repr=False)
    _judged: Verdicts = field(repr=False)

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
        return {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.repr}

    def errors(
        self, kind: Kind, said: str | None = None, true: str | None = None
    ) -> list[DetectionError]:
        """The errors of a type, the highest score first; missed objects, the largest first.

        said, true: only those with this class given by the detector, or of this true class.
        Raises ValueError for an unknown type or class.
        """
        _index("kind", kind, KINDS)
        verdicts = self.verdicts()
        chosen = verdicts[are(verdicts.verdict, kind)]
        if said is not None:
            chosen = chosen[chosen.said == _index("said", said, self.categories)]
        if true is not None:
            chosen = chosen[chosen.true == _index("true", true, self.categories)]
        if kind == "missed":
            chosen = chosen[np.argsort(-chosen.area, kind="stable")]
        annotations, errors = self.ground_truth["annotations"], []
        for i, (result, truth) in enumerate(zip(chosen.result, chosen.annotation, strict=True)):
            error = DetectionError(
                kind=kind,
                image_id=self.image_ids[chosen.image[i]],
                score=float(chosen.score[i]),
                said=self.categories[chosen.said[i]] if result >= 0 else "",
                true=self.categories[chosen.true[i]] if truth >= 0 else "",
                iou=float(chosen.iou[i]),
                result=self.results[result] if result >= 0 else None,
                truth=annotations[truth] if truth >= 0 else None,
            )
            errors.append(error)
        return errors

    def verdicts(self, score_threshold: float = -np.inf) -> Verdicts:
        """What became of every detection of this score and more, and the objects then missed.

        Detections in crowd regions are left out.
        """
        return without_met(self._judged[~(self._judged.score < score_threshold)])

    def chosen(
        self,
        verdicts: Verdicts,
        verdict: Verdict | None = None,
        category: str | None = None,
        size: Size | None = None,
    ) -> Bools:
        """(N,) those of this verdict, that say this class or are about an object of it, and of this
        size; None = any. Raises ValueError for an unknown name."""
        chosen = np.full(len(verdicts), True)
        if verdict is not None:
            chosen &= verdicts.verdict == _index("verdict", verdict, VERDICTS)
        if category is not None:
            rank = _index("category", category, self.categories)
            chosen &= (verdicts.said == rank) | (verdicts.true == rank)
        if size is not None:
            chosen &= self._size_of(verdicts.area) == _index("size", size, SIZES)
        return chosen

    def by_class(self) -> "DataFrame":
        """A row per class: objects, correct, ap, then errors_... and dap_... of each type.

        An error belongs to the class the detector gave, a missed object to its own. dap_... is
        what fixing the errors of that type in all classes adds to the AP of this one, so the mean
        of the column is the dAP of the whole. NaN for a class without objects.
        """
        from pandas import DataFrame

        overlaps, verdicts = self._overlaps, self.verdicts()
        category = np.where(verdicts.said >= 0, verdicts.said, verdicts.true)
        ap = fixed_aps(overlaps, verdicts, are(verdicts.verdict))
        counts = _counts(verdicts, category, overlaps.categories)
        columns = {"objects": overlaps.objects, "correct": counts.pop("correct"), "ap": ap} | counts
        for kind in KINDS:
            fixed = fixed_aps(overlaps, verdicts, are(verdicts.verdict, kind))
            columns[f"dap_{kind}"] = fixed - ap
        return DataFrame(columns, index=self.categories)

    def by_size(self) -> "DataFrame":
        """A row for small, medium and large: objects, correct, errors_... and dap_... of each type.

        dap_... is what the whole AP gains when the errors of this size alone are fixed (the AP of
        the size would not say how much it matters). An error has the size of the object it concerns
        (classification, localisation, missed), else of the detection; as tidecv's area qualifiers,
        but with COCO's areas, not those of boxes.
        """
        from pandas import DataFrame

        overlaps, verdicts = self._overlaps, self.verdicts()
        size = self._size_of(verdicts.area)
        objects = np.bincount(self._size_of(overlaps.truths.area), minlength=len(SIZES))
        columns: dict[str, Any] = {"objects": objects, **_counts(verdicts, size, len(SIZES))}
        for kind in KINDS:
            of_kind = are(verdicts.verdict, kind)
            fixed = [fixed_aps(overlaps, verdicts, of_kind & (size == i)) for i in range(3)]
            columns[f"dap_{kind}"] = [mean_ap(aps) - self.ap for aps in fixed]
        return DataFrame(columns, index=list(SIZES))

    def confusions(self) -> "DataFrame":
        """The classification errors: class said, true class, errors; the most frequent first."""
        from pandas import DataFrame

        confused = self._judged[are(self._judged.verdict, "classification")]
        pairs = np.stack([confused.said, confused.true])
        pairs, counts = np.unique(pairs, axis=1, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        said, true = np.array(self.categories, dtype=object)[pairs[:, order]]
        return DataFrame({"said": said, "true": true, "errors": counts[order]})

    def thresholds(self) -> "DataFrame":
        """The best score to cut at: of each class that is found, the score from which on its F1 is
        highest, and precision, recall and F1 there."""
        from pandas import DataFrame

        verdicts, rows = self.verdicts(), {}
        for rank, name in enumerate(self.categories):
            own = verdicts[verdicts.said == rank]  # the best score first
            found, objects = np.cumsum(are(own.verdict, "correct")), self._overlaps.objects[rank]
            if found.any():
                f1 = 2 * found / (np.arange(1, len(own) + 1) + objects)
                f1[:-1][own.score[1:] == own.score[:-1]] = 0  # equal scores pass together
                best = int(f1.argmax())
                precision, recall = found[best] / (best + 1), found[best] / objects
                rows[name] = own.score[best], precision, recall, f1[best]
        columns = ["score", "precision", "recall", "f1"]
        return DataFrame.from_dict(rows, orient="index", columns=columns)

    def worst_images(self, count: int = 10) -> "DataFrame":
        """The images with most mistakes when detections are cut at `thresholds`: a row for each
        with image_id, objects, missed (objects not found) and wrong (detections)."""
        from pandas import DataFrame

        least, images = self._least(), len(self.image_ids)
        claims = self.verdicts()
        claims = claims[np.nan_to_num(claims.score, nan=-1) >= least[claims.said]]
        right = are(claims.verdict, "correct")
        objects = np.bincount(self._overlaps.truths.image, minlength=images)
        missed = objects - np.bincount(claims.image[right], minlength=images)
        wrong = np.bincount(claims.image[~right], minlength=images)
        table = DataFrame(
            {"image_id": self.image_ids, "objects": objects, "missed": missed, "wrong": wrong}
        )
        order = np.argsort(-(missed + wrong), kind="stable")[:count]
        return table.iloc[order[(missed + wrong)[order] > 0]]

    def label_faults(self, count: int = 10) -> dict[str, list[DetectionError]]:
        """What may be wrong with the truth, up to `count` of each kind: sure detections without any
        object or of another class than theirs, and objects that nothing points to."""
        least = dict(zip(self.categories, self._least(), strict=True))
        sure = {
            kind: [error for error in self.errors(kind) if error.score >= least[error.said]]
            for kind in ("background", "classification")
        }
        return {
            "not annotated?": sure["background"][:count],
            "another class?": sure["classification"][:count],
            "no object?": self.errors("missed")[:count],
        }

    def _least(self) -> Floats:
        """(K,) score of `thresholds` of each class; of one that is never found infinity."""
        return self.thresholds()["score"].reindex(self.categories, fill_value=np.inf).to_numpy()

    def curves(self, iou_thresholds: Sequence[float] = (0.5, 0.75, 0.9)) -> list[Curve]:
        """Precision over recall at each threshold: the mean over the classes, then each class.

        Raises ValueError for a threshold that is not above the background threshold.
        """
        overlaps, curves = self._overlaps, []
        objects = overlaps.objects
        for threshold in iou_thresholds:
            if not self.background_threshold < threshold <= 1:
                low = self.background_threshold
                raise ValueError(f"iou_thresholds: {threshold} is not in ({low}, 1]")
            match, ignored = match_at(overlaps, threshold)
            category, correct = overlaps.detections.category[~ignored], match[~ignored] >= 0
            rows = precisions(category, correct, objects)
            rows[objects == 0] = np.nan
            known = rows[objects > 0]
            mean = known.mean(0) if len(known) else np.full(len(RECALLS), np.nan)
            for name, row in zip(["", *self.categories], [mean, *rows], strict=True):
                curves.append(Curve(name, threshold, RECALLS, row, float(row.mean())))
        return curves

    def _size_of(self, area: Floats) -> Ints:
        """(N,) index in SIZES."""
        limits = [self.area_ranges[size][1] for size in SIZES[:-1]]
        return np.searchsorted(limits, area, side="right")


def _counts(verdicts: Verdicts, group: Ints, groups: int) -> dict[str, Ints]:
    """How many there are in each group, correct and of each type; group: (N,)."""
    counts = np.zeros((len(VERDICTS), groups), dtype=np.int64)
    np.add.at(counts, (verdicts.verdict, group), 1)
    return dict(zip(["correct", *(f"errors_{kind}" for kind in KINDS)], counts, strict=True))


def _index(name: str, value: str, known: Sequence[str]) -> int:
    if value not in known:
        raise ValueError(f"{name}={value!r}: use one of {', '.join(known)}")
    return known.index(value)
