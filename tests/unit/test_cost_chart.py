"""Bars of costs: lengths, numbers and what they are called."""

import pytest
from matplotlib.patches import Rectangle

from mimdet.viz import show_costs

COSTS = {"quarter": {"encoder": 1e9, "heads": 30e9}, "all": {"encoder": 6e9, "heads": 30e9}}


def test_bars_are_as_long_as_the_costs() -> None:
    fig = show_costs(COSTS, "G multiply-adds", 1e9)
    (ax,) = fig.axes
    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
    ends = {(round(bar.get_x(), 6), round(bar.get_x() + bar.get_width(), 6)) for bar in bars}
    assert ends == {(0, 1), (1, 31), (0, 6), (6, 36)}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["quarter", "all"]
    assert sorted(text.get_text() for text in ax.texts) == ["30", "30", "6"]  # 1 has no room
    assert "quarter: encoder 1, heads 30" in fig.alt_text


@pytest.mark.parametrize("costs", [{}, {"a": {}}, {"a": {"x": 1.0}, "b": {"y": 1.0}}])
def test_bars_need_the_same_parts(costs: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="same one to 3 parts"):
        show_costs(costs, "G")
