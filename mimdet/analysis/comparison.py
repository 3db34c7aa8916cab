"""Two runs on the same images: which images gained, which lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mimdet.analysis.errors import precisions
from mimdet.analysis.matching import find_overlaps, match_at
from mimdet.analysis.metrics import IouType, check_results, image_numbers

if TYPE_CHECKING:
    from pandas import DataFrame

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""IoU of COCO's AP."""
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
    first, second = runs
    images = list(image_numbers(ground_truth))
    table = DataFrame({"image_id": images})
    for number, results in enumerate(runs.values(), start=1):
        check_results(ground_truth, results, (iou_type,))
        overlaps = find_overlaps(ground_truth, results, iou_type)
        table["objects"] = objects = np.bincount(overlaps.truths.image, minlength=len(images))
        image, ap = overlaps.detections.image, np.zeros(len(images))
        for threshold in THRESHOLDS:
            match, ignored = match_at(overlaps, threshold)
            ap += precisions(image[~ignored], match[~ignored] >= 0, objects).mean(1)
        table[f"ap_{number}"] = np.where(objects > 0, ap / len(THRESHOLDS), np.nan)
        match, _ = match_at(overlaps, 0.5)
        table[f"found_{number}"] = np.bincount(image[match >= 0], minlength=len(images))
    table["change"] = table["ap_2"] - table["ap_1"]
    return RunComparison((first, second), iou_type, table)
