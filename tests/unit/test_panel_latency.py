"""Medians of measured latencies, by hand; measuring itself is tests/browser."""

from tools.panel_latency import summary


def test_medians() -> None:
    said = summary({"b": {"x": 10.0, "y": 30.0, "z": 20.0}, "a": {"x": 100.0}})
    assert said["median_ms"] == 25
    assert list(said["panels"]) == ["a", "b"]
    assert said["panels"]["b"]["median_ms"] == 20
    assert said["panels"]["a"]["controls_ms"] == {"x": 100.0}
