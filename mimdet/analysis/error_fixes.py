"""AP as it is, and as it would be if some of the errors were fixed.

A fix is the one of TIDE (Bolya et al., ECCV 2020): a detection of the right place gets its right
class, one of the right class its right place, unless the truth has a better detection already, in
which case it goes; every other false positive goes; a missed truth is no longer asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mimdet.analysis.error_matching import KINDS, Kind, Outcome
from mimdet.analysis.error_overlaps import Bools, Floats, Ints, Overlaps

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
