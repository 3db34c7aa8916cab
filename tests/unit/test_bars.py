"""Bars of what a model is made of: the numbers behind them, worked out by hand."""

import pytest
from matplotlib.patches import Rectangle
from torch import nn

from mimdet.models.weights import LoadReport
from mimdet.viz import loaded_by_part, show_loaded, show_stacked
from mimdet.viz.charts import millions


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Linear(2, 3), "encoder": nn.Linear(3, 3)})
        self.neck = nn.BatchNorm1d(3)


REPORT = LoadReport("file", ["backbone.encoder.weight"], [], [])


def test_parameters_are_counted_by_part_and_origin():
    assert loaded_by_part(REPORT, Small()) == {"stem": (0, 9), "encoder": (9, 3), "neck": (0, 6)}


def test_a_bar_is_as_long_as_its_parts():
    fig = show_loaded(REPORT, Small())
    (ax,) = fig.axes
    widths = [patch.get_width() for patch in ax.patches if isinstance(patch, Rectangle)]
    assert widths == [0, 9, 0, 9, 3, 6]  # from the file, then new: stem, encoder, neck
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stem", "encoder", "neck"]
    assert [text.get_text() for text in ax.texts] == [" 9", " 12", " 6"]
    assert "encoder 12" in fig.alt_text


def test_units_keep_numbers_short():
    assert millions({"a": [5.0, 2e6]}) == (1e6, "M")
    assert millions({"a": [5.0]}) == (1.0, "")
    fig = show_stacked(["x"], {"a": [2.5e9], "b": [1e9]}, "cost", (1e9, "G"))
    assert fig.axes[0].texts[0].get_text() == " 3.5"
    fig = show_stacked(["x", "y"], {"a": [1234.4, 0.1234]}, "cost", digits=3)
    assert [text.get_text() for text in fig.axes[0].texts] == [" 1,234", " 0.123"]
    with pytest.raises(ValueError, match="'b' has 1 values for 2 labels"):
        show_stacked(["x", "y"], {"a": [1, 2], "b": [1]}, "cost")
