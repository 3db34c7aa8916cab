"""The learning rates as they are drawn."""

import pytest

from mimdet import presets
from mimdet.config import TrainingConfig
from mimdet.viz import group_rates, show_schedule


def test_rates_of_the_paper() -> None:
    recipe = presets.mimdet_base().training
    assert group_rates(recipe) == pytest.approx({"rest": 1.6e-4, "stem": 8e-5, "encoder": 4e-5})
    recipe.accumulate = 2  # 16 images a step
    assert group_rates(recipe)["stem"] == pytest.approx(4e-5)


def test_the_schedule_s_picture() -> None:
    figure = show_schedule(presets.mimdet_base().training, 120_000)
    left, right = figure.axes
    assert left.get_title("left") == "67,500 steps"
    rest, stem, encoder = (line.get_ydata() for line in left.lines)
    assert rest.max() == pytest.approx(4 * encoder.max()) and stem[0] == pytest.approx(8e-5 / 469)
    assert stem[-1] == pytest.approx(8e-7)
    assert [text.get_text() for text in right.get_legend().get_texts()][2] == (
        "the paper's configurations"
    )
    assert "67,500 steps" in figure.alt_text and "warm-up of 469 steps" in figure.alt_text
    assert "cosine" in show_schedule(TrainingConfig(schedule="cosine", steps=50), 640).alt_text
