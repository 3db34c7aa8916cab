"""Bytes kept for the backward pass, by hand; the learning rates as they are drawn."""

import pytest
import torch
from torch import nn

from mimdet import presets
from mimdet.analysis.cost import kept_bytes
from mimdet.config import TrainingConfig
from mimdet.viz import group_rates, show_schedule


def test_kept_bytes_by_hand() -> None:
    # A linear layer keeps its input, 4 x 8 numbers; the ReLU its output, 4 x 16; the second layer
    # the same tensor, which counts once. Weights do not count.
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.rand(4, 8)
    assert kept_bytes(lambda: net(inputs), net) == 4 * (4 * 8 + 4 * 16)
    with torch.no_grad():
        assert kept_bytes(lambda: net(inputs), net) == 0


def test_recomputation_keeps_the_inputs_only() -> None:
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.rand(4, 8, requires_grad=True)
    kept = kept_bytes(lambda: checkpoint(net, inputs, use_reentrant=False), net)
    assert kept <= 4 * 4 * 8


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
