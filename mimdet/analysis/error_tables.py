"""Errors counted and priced per class, per size and per pair of confused classes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mimdet.analysis.error_fixes import class_aps, fixed_ranking, mean_ap, truth_counts
from mimdet.analysis.error_matching import KINDS, Kind, Outcome
from mimdet.analysis.error_overlaps import Bools, Ints, Overlaps

if TYPE_CHECKING:
    from pandas import DataFrame


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
