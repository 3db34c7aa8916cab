"""What the benchmark compares is equal, and its figures are those of what it ran."""

import time

import pytest

from mimdet.structures import probabilities_to_rle
from tools.bench import cases, growth


def test_sides_take_turns_and_the_middle_counts() -> None:
    order = []

    def side(name: str) -> str:
        order.append(name)
        end = time.process_time() + (0.02 if name == "slow" else 0.0)
        while time.process_time() < end:
            pass
        return name

    sides = {name: lambda name=name: side(name) for name in ("slow", "fast")}
    seconds, found = cases.interleaved(sides, 2)
    assert order == ["slow", "fast"] * 3
    assert seconds["slow"] >= 0.02 > seconds["fast"]
    assert found == {"slow": "slow", "fast": "fast"}
    assert cases.row("a", {}, 3.0, 2.0, "")["reached"]
    assert not cases.row("a", {}, 3.0, 2.0, "", most=True)["reached"]


def test_metrics_of_both_sides_are_equal_and_notice_a_lost_detection(monkeypatch) -> None:
    monkeypatch.setattr(cases, "IMAGES", 3)
    truth, found = cases.detections()
    entries = cases.results(found, probabilities_to_rle)
    ours, theirs = cases.kit_metrics(truth, entries), cases.pycocotools_metrics(truth, entries)
    assert len(ours) == len(theirs) == 24
    assert cases.largest_difference(ours, theirs) < 1e-9
    best = max(range(len(entries)), key=lambda i: entries[i]["score"])
    fewer = cases.kit_metrics(truth, entries[:best] + entries[best + 1 :])
    assert ours[0] > 0 and cases.largest_difference(ours, fewer) > 0


def test_exponents_by_hand() -> None:
    assert growth.exponent({"1": 9.0, "2": 1.0, "8": 8.0}) == pytest.approx(1.5)  # 4^1.5 = 8
