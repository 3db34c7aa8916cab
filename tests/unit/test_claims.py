"""The page of claims: its arms exist, and its verdicts are those of the intervals."""

import math
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mimdet import presets
from mimdet.data.shapes import ShapesCOCO
from mimdet.experiments.experiment import read_grid
from mimdet.experiments.results import Experiment, Interval
from mimdet.experiments.runs import Arm, arms_of
from mimdet.models.detector import build_detector
from mimdet.training.slots import load_slots, write_slots
from tools import claims

CLAIMS = tomllib.loads((claims.GRIDS / "claims.toml").read_text(encoding="utf-8"))["claim"]


@cache
def grid(name: str) -> dict[str, Any]:
    return read_grid(claims.GRIDS / f"{name}.py")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["text"][:40])
def test_arms_and_ratios_of_a_claim_are_in_its_grid(claim: dict[str, Any]) -> None:
    given = grid(claim["grid"])
    labels = {arm.label for arm in arms_of(given["base"], given["grid"])}
    ratios = given.get("evaluate_ratios", (1.0,))
    assert given["seeds"] >= 3
    for arm, ratio in (claim["one"], claim["other"]):
        assert arm in labels and ratio in ratios
    assert ("above" in claim) != ("below" in claim)


@pytest.mark.parametrize("name", sorted(path.stem for path in claims.GRIDS.glob("*.py")))
def test_parts_that_a_grid_brings_make_a_detector(name: str, tmp_path: Path) -> None:
    given = grid(name)
    for arm in arms_of(given["base"], given["grid"]):
        write_slots(tmp_path / arm.label, arm.code)
        parts = load_slots(tmp_path / arm.label, arm.cfg, trust_code=True)
        model = build_detector(arm.cfg, **parts).train()
        scene = ShapesCOCO(size=64)[0]
        labels = scene.target.labels % arm.cfg.detector.num_classes
        losses = model([scene.image], [replace(scene.target, labels=labels)])
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("low", "high", "side", "limit", "verdict"),
    [
        (0.1, 0.9, "above", 0, "shown"),
        (-0.9, -0.1, "above", 0, "contradicted here"),
        (-0.1, 0.9, "above", 0, "not resolved"),
        (-0.9, 0.9, "above", -1, "shown"),
        (-40, -20, "below", 0, "shown"),
        (41, 60, "below", 40, "contradicted here"),
        (math.nan, math.nan, "above", 0, "not resolved"),
    ],
)
def test_a_verdict(low: float, high: float, side: str, limit: float, verdict: str) -> None:
    assert claims.judge(Interval((low + high) / 2, low, high, 1.0, 3), side, limit) == verdict


def test_a_row_by_hand() -> None:
    """Three seeds: 4, 5, 6 AP more; three fifths of the time; the other's AP after two fifths."""
    base, seeds = presets.tiny(), [0, 1, 2]
    arms = [Arm("a", {}, base), Arm("b", {}, base)]
    table, curves = [], []
    for seed in seeds:
        own = {"seed": seed, "evaluate_ratio": 1.0}
        table.append(own | {"arm": "a", "box_ap": 24.0 + seed, "cpu_seconds": 60.0})
        table.append(own | {"arm": "b", "box_ap": 20.0, "cpu_seconds": 100.0})
        for step, ap in zip(range(2, 12, 2), (10.0, 20.0, 22.0, 21.0, 24.0), strict=True):
            curves.append({"arm": "a", "seed": seed, "step": step, "box_ap": ap})
    made = Experiment(
        claims.ROOT, base, arms, seeds, pd.DataFrame(table), pd.DataFrame(curves), {}, "", {}
    )
    claim = {"id": "C", "text": "t", "grid": "g", "one": ["a", 1.0], "other": ["b", 1.0]}
    assert claims.paired(claim, made) == [4, 5, 6]
    assert claims.paired(
        claim | {"relative": True, "metric": "cpu_seconds"}, made
    ) == pytest.approx([-40, -40, -40])
    assert claims.paired(claim | {"reach": True}, made) == [40, 40, 40]
    # 4.303 standard errors of 1 / sqrt(3) on either side of 5
    assert "| above 2 | +5.0 [+2.5, +7.5] | 3 | **shown** |" in claims.row(
        claim | {"above": 2}, made
    )
    assert "not run yet" in claims.row(claim | {"above": 2}, None)
