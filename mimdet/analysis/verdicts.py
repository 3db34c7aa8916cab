"""What became of every detection and every object, to be counted and filtered by score.

The types are those of `mimdet.analysis.errors`. A detection keeps its type whatever the score
threshold, because matching goes from the best score down; which objects are missed depends on it.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from mimdet.analysis.error_matching import KINDS, Kind, find_outcome
from mimdet.analysis.error_overlaps import Bools, Floats, Ints, find_overlaps
from mimdet.analysis.metrics import IouType, category_names, check_results, image_numbers

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
