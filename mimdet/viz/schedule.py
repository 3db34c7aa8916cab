"""The learning rates of a training as a picture: three groups over the epochs; the batch rule."""

import numpy as np
from matplotlib.axes import Axes

from mimdet.config import TrainingConfig
from mimdet.training.optim import rate_factor, scaled_rate
from mimdet.viz.charts import axes_of
from mimdet.viz.style import (
    BLACK,
    BLUE,
    FAINT,
    GREEN,
    NORMAL,
    ORANGE,
    VERMILLION,
    WIDTH,
    NotebookFigure,
    new_figure,
)

COLOURS = {"rest": VERMILLION, "stem": BLUE, "encoder": GREEN}
PAPER = {16: 4e-5, 64: 8e-5}
"""Images a step -> learning rate of the stem, in the paper's two configurations."""


def group_rates(cfg: TrainingConfig) -> dict[str, float]:
    """Highest learning rate of each group, as `mimdet.training.optim.parameter_groups` sets it."""
    rate, m = scaled_rate(cfg), cfg.rate_multiplier
    return {"rest": rate * m, "stem": rate, "encoder": rate / m}


def show_schedule(cfg: TrainingConfig, images: int) -> NotebookFigure:
    """Left: the rate of each group over the epochs. Right: the rate against the images a step.

    images: of an epoch. Both axes of rates are logarithmic; the first steps of the warm-up, which
    begins near 0, leave the left one.
    """
    per_epoch = images / (cfg.batch_size * cfg.accumulate)
    total = cfg.steps or max(1, round(cfg.epochs * per_epoch))
    warmup = cfg.warmup_steps or round(cfg.warmup_epochs * per_epoch)
    steps = np.unique(np.r_[0:warmup, np.linspace(0, total - 1, 800).astype(int)])
    factors = np.array([rate_factor(int(step), total, warmup, cfg) for step in steps])
    fig = new_figure(WIDTH, 3.4)
    left = axes_of(fig, 1, 2, f"{total:,} steps", "epoch", "learning rate (log scale)")
    rates = group_rates(cfg)
    for name, rate in rates.items():
        left.plot(steps / per_epoch, rate * factors, color=COLOURS[name], linewidth=1.8)
        left.annotate(
            f"{name} {rate:.3g}",
            (0.5 * total / per_epoch * cfg.milestones[0], rate * factors.max()),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=NORMAL,
            color=COLOURS[name],
        )
    left.set_yscale("log")
    left.set_ylim(min(rates.values()) / 400, max(rates.values()) * 3)
    right = axes_of(fig, 2, 2, "the stem's rate", "images a step", "learning rate (log scale)")
    _draw_rule(right, cfg)
    fig.set_layout_engine("constrained")
    fig.alt_text = (
        f"Learning rates of {total:,} steps: "
        + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
        + f" at their highest, after a linear warm-up of {warmup:,} steps; then the schedule "
        f"{cfg.schedule}. Beside it the stem's rate against the images a step."
    )
    return fig


def _draw_rule(ax: Axes, cfg: TrainingConfig) -> None:
    """Square root and linear rule through the reference, the paper's two points, this recipe."""
    batches = np.geomspace(4, 256, 50)
    for exponent, name, style, colour in (
        (0.5, "square root", "-", BLUE),
        (1, "linear", "--", FAINT),
    ):
        values = cfg.learning_rate * (batches / cfg.reference_batch) ** exponent
        ax.plot(batches, values, style, color=colour, linewidth=1.6, label=f"{name} rule")
    ax.plot(list(PAPER), list(PAPER.values()), "o", color=BLACK, label="the paper's configurations")
    batch = cfg.batch_size * cfg.accumulate
    ax.plot(
        [batch], [scaled_rate(cfg)], "o", ms=11, mfc="none", mew=1.8, color=ORANGE, label="this one"
    )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks([4, 16, 64, 256], ["4", "16", "64", "256"])
    ax.legend(frameon=False, fontsize=NORMAL, loc="upper left")
