"""What the folder of a run says: scores at every sample ratio, time, the course of the training."""

import copy
import math
from typing import Any

from mimdet.analysis.cost import cost_of
from mimdet.config import Config
from mimdet.experiments.grid import SLOTS, field_of
from mimdet.experiments.plan import PlannedRun, read_clock, read_lines

SCORES = {
    f"{kind}_{suffix}": (kind, name)
    for kind in ("box", "mask")
    for suffix, name in {
        "ap": "AP",
        "ap50": "AP50",
        "ap75": "AP75",
        "ap_small": "AP_small",
        "ap_medium": "AP_medium",
        "ap_large": "AP_large",
    }.items()
}
"""Column of a table -> where its number stands in a metrics dictionary."""


def result_rows(run: PlannedRun, per_image: float) -> list[dict[str, Any]]:
    """One row per sample ratio of a complete run: arm, seed, ratio, APs x 100, cost.

    per_image: FLOPs of training on one image.

    Below ratio 1 an AP is the mean over the draws and `box_draw_sd`, `mask_draw_sd` their standard
    deviation. NaN where there are no objects of a size, or no masks. Times are of the training,
    with its own evaluations; CPU seconds leave loader processes out.
    """
    clock = [row for step, row in read_clock(run.path).items() if step <= run.steps]
    t = run.cfg.training
    images = run.steps * t.batch_size * t.accumulate
    cost = {
        "steps": run.steps,
        "images": images,
        "wall_seconds": math.fsum(row["wall_seconds"] for row in clock),
        "cpu_seconds": math.fsum(row["cpu_seconds"] for row in clock),
        "flops": per_image * images,
    }
    key = {"arm": run.arm.label, **run.arm.values, "seed": run.seed}
    rows = []
    for row in run.rows():
        scores = {name: _mean(row["metrics"], *place) for name, place in SCORES.items()}
        spread = {f"{k}_draw_sd": 100 * row.get(f"{k}_ap_sd", math.nan) for k in ("box", "mask")}
        at = {"evaluate_ratio": row["sample_ratio"]}
        rows.append({**key, **at, **scores, **spread, "draws": row["draws"], **cost})
    return rows


def curve_rows(run: PlannedRun, per_image: float) -> list[dict[str, Any]]:
    """One row per step: epoch, seconds and FLOPs until then, loss, and AP x 100 where evaluated.

    per_image: FLOPs of training on one image. Seconds are the wall time of the steps alone.
    """
    key = {"arm": run.arm.label, **run.arm.values, "seed": run.seed}
    rows: dict[int, dict[str, Any]] = {}
    images, seconds = 0, 0.0
    for line in read_lines(run.path / "metrics.jsonl"):
        if "loss" in line:
            images += line["images"]
            seconds += line["time"]["seconds"]
            rows[line["step"]] = {
                **key,
                "step": line["step"],
                "epoch": images / run.images,
                "seconds": seconds,
                "flops": per_image * images,
                "loss": line["loss"],
                "box_ap": math.nan,
                "mask_ap": math.nan,
            }
        elif line["step"] in rows:
            for kind in ("box", "mask"):
                rows[line["step"]][f"{kind}_ap"] = _mean([line["evaluation"]], kind, "AP")
    return list(rows.values())


def training_flops(cfg: Config, size: tuple[int, int]) -> float:
    """FLOPs of training on one image of `size` = (height, width); NaN for a part of your own.

    Forward and backward pass take three times the forward pass; a multiply-add is two operations.
    The forward pass is counted at the ratio of the training, with the heads as in evaluation
    (`mimdet.analysis.cost`). A sampler is not counted, so one of your own is no obstacle.
    """
    cfg = copy.deepcopy(cfg)
    cfg.backbone.sampler = "random"
    if any(":" in field_of(cfg, name) for name in SLOTS):  # it need not run without numbers
        return math.nan
    return 6.0 * cost_of(cfg, size, cfg.backbone.sample_ratio).detector


def _mean(metrics: list[dict[str, Any]], kind: str, name: str) -> float:
    """Mean over the draws, x 100. None (no such object) and a missing kind are NaN."""
    values = [draw.get(kind, {}).get(name) for draw in metrics]
    known = [value for value in values if value is not None]
    return 100 * math.fsum(known) / len(known) if known else math.nan
