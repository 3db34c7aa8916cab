"""COCO's matching of detections with true objects, and what each mistake is.

The types are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mimdet.analysis.error_overlaps import Bools, Ints, Overlaps

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
