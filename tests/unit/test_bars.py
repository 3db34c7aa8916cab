"""Bars made of parts: the numbers behind them, worked out by hand."""

import pytest
from matplotlib.patches import Rectangle
from torch import nn

from mimdet.models.weights import LoadReport
from mimdet.viz import loaded_by_part, show_loaded, show_stacked


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Linear(2, 3), "encoder": nn.Linear(3, 3)})
        self.neck = nn.BatchNorm1d(3)


def test_parameters_are_counted_by_part_and_origin():
    report = LoadReport("file", ["backbone.encoder.weight"], [], [])
    counts = {part: (*own.values(),) for part, own in loaded_by_part(report, Small()).items()}
    assert counts == {"stem": (0, 9), "encoder": (9, 3), "neck": (0, 6)}
    fig = show_loaded(report, Small())
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "encoder", "neck"]
    numbers = [text.get_text() for text in ax.texts if text.get_text()]
    assert numbers == ["9.0", "3.0", "9.0", "12.0", "6.0"]
    assert ax.get_xlabel() == "parameters" and "encoder 12.0" in fig.alt_text


def test_a_bar_is_as_long_as_its_parts():
    costs = {"quarter": {"encoder": 1e9, "heads": 30e9}, "all": {"encoder": 6e9, "heads": 30e9}}
    fig = show_stacked(costs, "multiply-adds")
    (ax,) = fig.axes
    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle)]
    ends = {(bar.get_x() / 1e9, (bar.get_x() + bar.get_width()) / 1e9) for bar in bars}
    assert ends == {(0, 1), (1, 31), (0, 6), (6, 36)}
    numbers = [text.get_text() for text in ax.texts]
    assert numbers == ["", "6.0 G", "30.0 G", "30.0 G", "31.0 G", "36.0 G"]  # 1 has no room
    assert "quarter 31.0 G, all 36.0 G" in fig.alt_text


@pytest.mark.parametrize("bars", [{}, {"a": {}}, {"a": {"x": 1.0}, "b": {"y": 1.0}}])
def test_bars_need_the_same_parts(bars):
    with pytest.raises(ValueError, match="the same parts, at least one"):
        show_stacked(bars, "cost")
