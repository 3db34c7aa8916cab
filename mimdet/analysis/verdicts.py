"""What became of every detection and every object, to be counted and filtered by score.

The types are those of `mimdet.analysis.errors`. A detection keeps its type whatever the score
threshold, because matching goes from the best score down; which objects are missed depends on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mimdet.analysis.errors import precision_at_recalls
from mimdet.analysis.matching import (
    KINDS,
    Bools,
    Floats,
    Ints,
    Kind,
    Overlaps,
    find_outcome,
    find_overlaps,
    match_at,
)
from mimdet.analysis.metrics import IouType, category_names, check_results, image_numbers

if TYPE_CHECKING:
    from pandas import DataFrame


Verdict = Literal["correct", Kind]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""Correct, then the six types of errors."""
Size = Literal["small", "medium", "large"]
SIZES: tuple[Size, ...] = get_args(Size)
CORRECT, MISSED = VERDICTS.index("correct"), VERDICTS.index("missed")


@dataclass(slots=True)
class Verdicts:
    """N entries, column by column: detections, best score first, then missed objects."""

    verdict: Ints
    """(N,) place in VERDICTS."""
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
    result: Ints
    """(N,) place in the results; -1 for a missed object."""
    annotation: Ints
    """(N,) place in the annotations of the object it is about; -1 for a background error."""

    def __len__(self) -> int:
        return len(self.verdict)

    def __getitem__(self, index: Any) -> "Verdicts":
        return Verdicts(*(getattr(self, name)[index] for name in self.__slots__))

    def followed_by(self, others: "Verdicts") -> "Verdicts":
        pairs = ((getattr(self, name), getattr(others, name)) for name in self.__slots__)
        return Verdicts(*(np.concatenate(pair) for pair in pairs))

    def count(self) -> dict[Verdict, int]:
        """How many there are of each."""
        counts = np.bincount(self.verdict, minlength=len(VERDICTS)).tolist()
        return dict(zip(VERDICTS, counts, strict=True))


class JudgedResults:
    """COCO results and what is right and wrong with them, at any score threshold."""

    def __init__(
        self,
        ground_truth: dict[str, Any],
        results: list[dict[str, Any]],
        iou_type: IouType = "bbox",
        *,
        iou_threshold: float = 0.5,
        background_threshold: float = 0.1,
        area_scale: float = 1.0,
    ) -> None:
        """The arguments are those of `find_errors`, and so are the ValueErrors."""
        if not 0 < background_threshold < iou_threshold <= 1:
            raise ValueError(
                f"background_threshold={background_threshold}, iou_threshold={iou_threshold}: "
                "needed is 0 < background_threshold < iou_threshold <= 1"
            )
        numbers = image_numbers(ground_truth)
        check_results(ground_truth, results, (iou_type,), numbers)
        self.ground_truth, self.results = ground_truth, results
        self.image_ids = list(numbers)
        """In the order of `Verdicts.image`."""
        self.categories = category_names(ground_truth["categories"])
        """In the order of `Verdicts.said` and `true`."""
        self._limits = np.array([32**2, 96**2]) * area_scale
        self._overlaps = find_overlaps(ground_truth, results, iou_type, background_threshold)
        self._outcome = find_outcome(self._overlaps, iou_threshold, background_threshold)
        aims = np.array([KINDS.index("localisation"), KINDS.index("classification")])
        self._aims = np.isin(self._outcome.kind, aims)

    def at(self, score_threshold: float = 0.0) -> Verdicts:
        """The verdicts that a reader of the detections of this score and more would give."""
        found, truths, outcome = self._overlaps.detections, self._overlaps.truths, self._outcome
        kept = found.score >= score_threshold
        is_right = outcome.match >= 0
        about = np.where(is_right, outcome.match, outcome.concerns)
        counts = kept & (is_right | (outcome.kind >= 0))  # the others lie in crowd regions
        missed = np.ones(len(truths), dtype=bool)
        missed[about[counts & (is_right | self._aims)]] = False
        of_truth = np.append(truths.area, np.nan)[about]  # -1 reads the last one
        detections = Verdicts(
            np.where(is_right, CORRECT, outcome.kind + 1),
            found.image,
            found.category,
            np.append(truths.category, -1)[about],
            np.where(is_right | self._aims, of_truth, found.area),
            found.score,
            found.source,
            np.append(truths.source, -1)[about],
        )[counts]
        nothing = np.full(int(missed.sum()), -1)
        lost = truths[missed]
        objects = Verdicts(
            np.full(len(lost), MISSED),
            lost.image,
            nothing,
            lost.category,
            lost.area,
            lost.score,
            nothing,
            lost.source,
        )
        return detections.followed_by(objects)

    def chosen(
        self,
        verdicts: Verdicts,
        verdict: Verdict | None = None,
        category: str | None = None,
        size: Size | None = None,
    ) -> Bools:
        """(N,) those of this verdict, that say this class or are about an object of it, and of this
        size; None = any. Raises ValueError for an unknown name."""
        for name, value, known in (
            ("verdict", verdict, VERDICTS),
            ("category", category, self.categories),
            ("size", size, SIZES),
        ):
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(known)}")
        chosen = np.ones(len(verdicts), dtype=bool)
        if verdict is not None:
            chosen &= verdicts.verdict == VERDICTS.index(verdict)
        if category is not None:
            rank = self.categories.index(category)
            chosen &= (verdicts.said == rank) | (verdicts.true == rank)
        if size is not None:
            place = np.searchsorted(self._limits, verdicts.area, side="right")
            chosen &= place == SIZES.index(size)
        return chosen


THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU of COCO's AP."""
FLOOR = 0.5
SAME = 0.005
"""A change of an image's AP up to half a point is none."""


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Two runs on the same images."""

    names: tuple[str, str]
    """Of the first and the second run."""
    iou_type: IouType
    images: "DataFrame"
    """A row per image: image_id, objects, and of each run (`_1`, `_2`)

    ap: mean over IoU .50:.95 of the image's own AP, all its detections in one ranking, each
    correct only for an object of its class; NaN in an image without objects;
    found: objects found at IoU .5;
    matched_score, wrong_score: summed score of the detections that are correct, and that are wrong,
    at IoU .5 (in crowd regions they are neither);

    and change: ap_2 - ap_1. In the order of the image ids."""

    def gained(self, count: int = 10) -> "DataFrame":
        """The images whose AP rose, the largest rise first."""
        rose = self.images[self.images["change"] > SAME]
        return rose.sort_values("change", ascending=False, kind="stable").head(count)

    def lost(self, count: int = 10) -> "DataFrame":
        """The images whose AP fell, the largest fall first."""
        fell = self.images[self.images["change"] < -SAME]
        return fell.sort_values("change", kind="stable").head(count)

    def summary(self) -> dict[str, float]:
        """images (with objects), gained, lost, same, mean_ap_1, mean_ap_2, found_1, found_2."""
        change = self.images["change"].dropna()
        gained, lost = int((change > SAME).sum()), int((change < -SAME).sum())
        return {
            "images": len(change),
            "gained": gained,
            "lost": lost,
            "same": len(change) - gained - lost,
            "mean_ap_1": float(self.images["ap_1"].mean()),
            "mean_ap_2": float(self.images["ap_2"].mean()),
            "found_1": int(self.images["found_1"].sum()),
            "found_2": int(self.images["found_2"].sum()),
        }

    def table(self, count: int = 5) -> str:
        """Text: the summary, then the `count` images that gained and that lost most, AP x 100."""
        numbers, (first, second) = self.summary(), self.names
        lines = [
            f"{self.iou_type}, from {first} to {second}: of {numbers['images']} images "
            f"{numbers['gained']} gained, {numbers['lost']} lost, {numbers['same']} kept their AP",
            f"mean AP of an image {100 * numbers['mean_ap_1']:.1f} -> "
            f"{100 * numbers['mean_ap_2']:.1f}, objects found {numbers['found_1']} -> "
            f"{numbers['found_2']}",
        ]
        for name, rows in (("gained", self.gained(count)), ("lost", self.lost(count))):
            for row in rows.itertuples():
                lines.append(
                    f"{name:<7} image {row.image_id}: AP {100 * row.ap_1:.1f} -> "
                    f"{100 * row.ap_2:.1f}, found {row.found_1} -> {row.found_2} of {row.objects}"
                )
        return "\n".join(lines)


def compare_runs(
    ground_truth: dict[str, Any],
    runs: Mapping[str, list[dict[str, Any]]],
    iou_type: IouType = "segm",
) -> RunComparison:
    """Compare the COCO results of two runs image by image.

    runs: {name: results} of the first and the second run; entries as `coco_metrics` takes them.
    Raises ValueError when there are not two runs, or naming the entry that cannot be evaluated.
    """
    from pandas import DataFrame

    if len(runs) != 2:
        raise ValueError(f"runs has {len(runs)} entries ({', '.join(runs)}): give two, by name")
    numbers = image_numbers(ground_truth)
    columns: dict[str, Any] = {"image_id": list(numbers)}
    for place, results in enumerate(runs.values(), start=1):
        check_results(ground_truth, results, (iou_type,), numbers)
        overlaps = find_overlaps(ground_truth, results, iou_type, FLOOR)
        columns["objects"] = np.bincount(overlaps.truths.image, minlength=len(numbers))
        of_run = _columns(overlaps, len(numbers))
        columns |= {f"{name}_{place}": values for name, values in of_run.items()}
    first, second = runs
    images = DataFrame(columns)
    images["change"] = images["ap_2"] - images["ap_1"]
    return RunComparison((first, second), iou_type, images)


def _columns(overlaps: Overlaps, images: int) -> dict[str, Any]:
    """The columns of one run, an entry per image."""
    detections = overlaps.detections
    match, ignored = match_at(overlaps, FLOOR)

    def total(chosen: Any, weights: Any = None) -> Any:
        return np.bincount(detections.image[chosen], weights, minlength=images)

    correct, wrong = match >= 0, (match < 0) & ~ignored
    return {
        "ap": _image_aps(overlaps, images),
        "found": total(correct),
        "matched_score": total(correct, detections.score[correct]),
        "wrong_score": total(wrong, detections.score[wrong]),
    }


def _image_aps(overlaps: Overlaps, images: int) -> Floats:
    """(images,) mean AP over THRESHOLDS; NaN without objects."""
    objects = np.bincount(overlaps.truths.image, minlength=images).tolist()
    order = np.argsort(overlaps.detections.image, kind="stable")  # by score within an image
    ends = np.cumsum(np.bincount(overlaps.detections.image, minlength=images)).tolist()
    total = np.zeros(images)
    for threshold in THRESHOLDS:
        match, ignored = match_at(overlaps, threshold)
        correct, counts = match[order] >= 0, ~ignored[order]
        start = 0
        for image, end in enumerate(ends):
            if objects[image]:
                ranked = correct[start:end][counts[start:end]]
                total[image] += precision_at_recalls(ranked, objects[image]).mean()
            start = end
    return np.where(np.array(objects) > 0, total / len(THRESHOLDS), np.nan)
