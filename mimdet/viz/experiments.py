"""Figures of experiments: scores per arm, a matrix of training and evaluation ratios, curves.

All of them take the `Experiment` that `mimdet.experiment` returns; APs are x 100. Where a type says
Any, it is a pandas DataFrame, a library that only that package loads.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from mimdet.experiments.grid import short_names, value_text
from mimdet.experiments.results import Experiment, title_of
from mimdet.viz.charts import axes_of
from mimdet.viz.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    LARGE,
    NORMAL,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    NotebookFigure,
    new_figure,
    save_figure,
)

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
"""Of the arms, in their order; the seventh has the first colour again."""
MARKERS = "osD^vP"
LIGHT = LinearSegmentedColormap.from_list("light blue", ["#F4F8FB", "#8FBFE0"])
"""Pale enough for dark text on every cell."""
AXES = {
    "epoch": "epochs",
    "seconds": "seconds of training",
    "flops": "floating point operations of training",
    "step": "steps",
}


def show_matrix(result: Experiment, metric: str = "box_ap") -> NotebookFigure:
    """Arms down, evaluation ratios across: mean and half-width of its 95 % interval in each cell.

    For an experiment over training ratios this is the matrix of training x evaluation ratio. The
    darker, the higher; the best cell of a row is bold.
    """
    summary = result.summary(metric)
    columns = sorted(summary["evaluate_ratio"].unique())
    rows = [arm.label for arm in result.arms]
    means, halves = (np.full((len(rows), len(columns)), np.nan) for _ in range(2))
    for _, cell in summary.iterrows():
        place = rows.index(cell["arm"]), columns.index(cell["evaluate_ratio"])
        means[place], halves[place] = cell["mean"], cell["high"] - cell["mean"]
    fig = new_figure(min(WIDTH, 2.6 + 1.25 * len(columns)), 1.5 + 0.62 * len(rows))
    ax = fig.add_subplot()
    ax.pcolormesh(means, cmap=LIGHT, edgecolors="white", linewidth=2)
    ax.invert_yaxis()
    ax.set_xticks(np.arange(len(columns)) + 0.5, [f"{ratio:g}" for ratio in columns])
    ax.set_yticks(np.arange(len(rows)) + 0.5, arm_names(result))
    ax.tick_params(length=0, labelsize=NORMAL, labelcolor=INK)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("share of tokens kept at evaluation", fontsize=NORMAL, color=INK)
    ax.set_ylabel(_fields_text(result), fontsize=NORMAL, color=INK)
    ax.set_title(
        f"{title_of(metric)} × 100, mean ± 95 % interval of {_seeds_text(result)}",
        loc="left",
        fontsize=LARGE,
        color=INK,
    )
    for (i, j), mean in np.ndenumerate(means):
        if not math.isnan(mean):
            best = mean == np.nanmax(means[i])
            _cell(ax, j + 0.5, i + 0.5, mean, float(halves[i, j]), best)
    fig.set_layout_engine("constrained")
    fig.alt_text = f"{title_of(metric)} x 100 by arm and evaluation ratio: " + _summary_words(
        summary
    )
    return fig


def show_arms(
    result: Experiment, metric: str = "box_ap", ratio: float | None = None
) -> NotebookFigure:
    """Each arm's mean with its 95 % interval (left), its paired difference to the first (right).

    Pale dots are single seeds. ratio: of the evaluation; default: the highest one.
    """
    ratio = max(result.ratios) if ratio is None else ratio
    summary = result.summary(metric)
    summary = summary[summary["evaluate_ratio"] == ratio].set_index("arm")
    if summary.empty:
        raise ValueError(f"ratio={ratio}: the experiment was evaluated at {result.ratios}")
    fig = new_figure(WIDTH, 1.5 + 0.42 * len(result.arms))
    title = f"{title_of(metric)} with {100 * ratio:g} % of the tokens at evaluation"
    left = axes_of(fig, 1, 2, title, f"{title_of(metric)} × 100, 95 % interval", "")
    right = axes_of(
        fig,
        2,
        2,
        f"difference to {_fields_text(result)} {arm_names(result)[0]}, paired by seed",
        f"difference in {title_of(metric)} × 100, 95 % interval",
        "",
    )
    baseline = result.scores(result.arms[0].label, ratio, metric)
    for place, arm in enumerate(result.arms):
        if arm.label not in summary.index:
            continue  # a baseline that sees every token
        row, colour = summary.loc[arm.label], COLOURS[place % len(COLOURS)]
        scores = result.scores(arm.label, ratio, metric)
        _interval(left, place, row["mean"], row["low"], row["high"], scores, colour)
        if place:
            pairs = {s: scores[s] - baseline[s] for s in scores if s in baseline}
            bounds = row["difference_low"], row["difference_high"]
            _interval(right, place, row["difference"], *bounds, pairs, colour)
    right.axvline(0, color=FAINT, linewidth=1)
    low, high = right.get_xlim()
    side = "left" if high > -low else "right"  # where there is room
    right.text(0, 0, " 0 by definition ", fontsize=NORMAL, color=FAINT, va="center", ha=side)
    for ax in (left, right):
        ax.set_yticks(range(len(result.arms)), arm_names(result) if ax is left else [])
        ax.set_ylim(len(result.arms) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color="#E6E6E6", linewidth=0.6)
        ax.xaxis.set_major_locator(MaxNLocator(6))
    fig.set_layout_engine("constrained")
    fig.alt_text = f"{title}: " + _summary_words(summary.reset_index())
    return fig


def show_learning_curves(
    result: Experiment, x: str = "epoch", metric: str = "box_ap", training_loss: bool = True
) -> NotebookFigure:
    """AP (right) and training loss (left) against epochs, seconds, flops or steps.

    One colour per arm: thin lines are seeds, the thick one their mean where all were measured at
    the same step. Raises ValueError for an x that the runs do not have.
    """
    curves = result.curves
    if x not in AXES or metric not in ("box_ap", "mask_ap"):
        raise ValueError(f"x={x!r}, metric={metric!r}: use one of {[*AXES]}; box_ap or mask_ap")
    if curves[x].isna().all():
        raise ValueError(f"x={x!r}: these runs have no such numbers")
    panels = 1 + training_loss
    fig = new_figure(WIDTH if training_loss else WIDTH / 2, 3.4)
    right = axes_of(fig, panels, panels, title_of(metric), AXES[x], f"{title_of(metric)} × 100")
    names = arm_names(result)
    words = []
    for place, arm in enumerate(result.arms):
        colour = COLOURS[place % len(COLOURS)]
        own = curves[curves["arm"] == arm.label]
        measured = own[own[metric].notna()]
        mean = _seed_lines(right, measured, x, metric, colour)
        style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "label": names[place]}
        right.plot(mean[x], mean[metric], marker=MARKERS[place % 6], markersize=4.5, **style)
        if len(mean):
            words.append(f"{names[place]} ends at {mean[metric].iloc[-1]:.1f}")
    if training_loss:
        left = axes_of(fig, 1, 2, "training loss, running mean", AXES[x], "loss")
        for place, arm in enumerate(result.arms):
            _loss_lines(left, curves[curves["arm"] == arm.label], x, COLOURS[place % len(COLOURS)])
        left.set_ylim(bottom=0)
        left.set_xlim(left=0)
    right.set_ylim(bottom=0)
    right.set_xlim(left=0)
    right.xaxis.set_major_locator(MaxNLocator(6))
    right.legend(frameon=False, fontsize=NORMAL, labelcolor=INK, title=_fields_text(result))
    right.get_legend().get_title().set(fontsize=NORMAL, color=INK)  # type: ignore[union-attr]
    fig.set_layout_engine("constrained")
    fig.alt_text = f"{title_of(metric)} x 100 against {AXES[x]}: {'; '.join(words)}."
    return fig


def save_figures(result: Experiment, folder: str | Path) -> list[Path]:
    """Matrix, arms and curves as PNG and SVG; returns the PNG files."""
    figures = {
        "arms": show_arms(result),
        "curves_epoch": show_learning_curves(result),
        "curves_seconds": show_learning_curves(result, "seconds"),
    }
    if result.curves["flops"].notna().any():
        figures["curves_flops"] = show_learning_curves(result, "flops")
    if len(result.ratios) > 1:
        figures["matrix"] = show_matrix(result)
    return [save_figure(fig, Path(folder) / f"{name}.png")[0] for name, fig in figures.items()]


def arm_names(result: Experiment) -> list[str]:
    """The arms by their values only; the fields stand on the axis."""
    return [
        ", ".join(value_text(value) for value in arm.values.values()) or arm.label
        for arm in result.arms
    ]


# ------------------------------------------------------------------------------- parts


def _fields_text(result: Experiment) -> str:
    short = short_names(result.fields)
    return ", ".join(name.replace("_", " ") for name in short.values())


def _seeds_text(result: Experiment) -> str:
    return f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"


def _cell(ax: Axes, x: float, y: float, mean: float, half: float, best: bool) -> None:
    weight = "bold" if best else "normal"
    ax.text(x, y - 0.08, f"{mean:.1f}", ha="center", fontsize=LARGE, weight=weight, color=INK)
    if not math.isnan(half):
        ax.text(x, y + 0.28, f"± {half:.1f}", ha="center", fontsize=NORMAL, color=INK)


def _interval(
    ax: Axes,
    y: float,
    mean: float,
    low: float,
    high: float,
    seeds: dict[int, float],
    colour: str,
) -> None:
    """A mean with its value above it, a bar from low to high, a pale dot per seed."""
    if math.isnan(mean):
        return
    ax.plot(list(seeds.values()), [y] * len(seeds), "o", color=colour, alpha=0.35, markersize=4)
    if not math.isnan(low):
        ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], color=colour, capsize=4)
    ax.plot([mean], [y], "D", color=colour, markersize=6)
    ax.annotate(
        f"{mean:z.1f}",
        (mean, y),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=NORMAL,
        color=colour,
    )


def _seed_lines(ax: Axes, rows: Any, x: str, y: str, colour: str) -> Any:
    """Thin lines of the seeds; returns their mean at the steps that all of them have."""
    seeds = [seed for _, seed in rows.groupby("seed")]
    for seed in seeds if len(seeds) > 1 else []:
        ax.plot(seed[x], seed[y], color=colour, linewidth=0.7, alpha=0.4)
    counts = rows.groupby("step")[y].transform("count")
    return rows[counts == len(seeds)].groupby("step", as_index=False)[[x, y]].mean()


def _loss_lines(ax: Axes, rows: Any, x: str, colour: str) -> None:
    """The running mean of the loss, first of the seeds' mean at each step."""
    mean = rows.groupby("step", as_index=False)[[x, "loss"]].mean()
    window = max(1, len(mean) // 25)
    smooth = mean["loss"].rolling(window, center=True, min_periods=1).mean()
    ax.plot(mean[x], smooth, color=colour, linewidth=1.6)


def _summary_words(summary: Any) -> str:
    cells = [
        f"{row['arm']} at {row['evaluate_ratio']:g}: {row['mean']:.1f}"
        + ("" if math.isnan(row["low"]) else f" ({row['low']:.1f} to {row['high']:.1f})")
        for _, row in summary.iterrows()
    ]
    return "; ".join(cells) + "."
