"""Figures of experiments: scores per arm, a matrix of training and evaluation ratios, curves.

All of them take the `Experiment` that `mimdet.experiment` returns; APs are x 100. Where a type says
Any, it is a pandas DataFrame, a library that only that package loads.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from mimdet.experiments.results import Experiment, title_of
from mimdet.experiments.runs import short_names, value_text
from mimdet.viz import style
from mimdet.viz.style import NotebookFigure, plural

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
    rows, columns = result.arms, sorted(summary["evaluate_ratio"].unique())
    summary["half"] = summary["high"] - summary["mean"]
    cells = summary.pivot(index="arm", columns="evaluate_ratio")
    cells = cells.reindex(index=[arm.label for arm in rows])
    means, halves = cells["mean"].to_numpy(float), cells["half"].to_numpy(float)
    fig = style.new_figure(min(style.WIDTH, 2.6 + 1.25 * len(columns)), 1.5 + 0.62 * len(rows))
    seeds = plural(len(result.seeds), "seed")
    title = f"{title_of(metric)} × 100, mean ± 95 % interval of {seeds}"
    fields = _fields_text(result)
    ax = style.axes_of(fig, 1, 1, title, "share of tokens kept at evaluation", fields, lines="")
    ax.pcolormesh(means, cmap=LIGHT, edgecolors="white", linewidth=2)
    ax.invert_yaxis()
    ax.set_xticks(np.arange(len(columns)) + 0.5, [f"{ratio:g}" for ratio in columns])
    ax.set_yticks(np.arange(len(rows)) + 0.5, arm_names(result))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for (i, j), mean in np.ndenumerate(means):
        if math.isnan(mean):
            continue
        middle = (j + 0.5, i + 0.5)
        weight = "bold" if mean == np.nanmax(means[i]) else "normal"
        style.write_beside(ax, f"{mean:.1f}", middle, (0, 1), fontsize=style.LARGE, weight=weight)
        if not math.isnan(halves[i, j]):
            style.write_beside(ax, f"± {halves[i, j]:.1f}", middle, (0, -2))
    words = _summary_words(summary)
    return fig.finish(f"{title_of(metric)} x 100 by arm and evaluation ratio: {words}")


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
    fig = style.new_figure(style.WIDTH, 1.5 + 0.42 * len(result.arms))
    names, name = arm_names(result), title_of(metric)
    title = f"{name} with {100 * ratio:g} % of the tokens at evaluation"
    left = style.axes_of(fig, 1, 2, title, f"{name} × 100, 95 % interval", "", "x")
    versus = f"difference to {_fields_text(result)} {names[0]}, paired by seed"
    right = style.axes_of(fig, 2, 2, versus, f"difference in {name} × 100, 95 % interval", "", "x")
    baseline = result.scores(result.arms[0].label, ratio, metric)
    for place, arm in enumerate(result.arms):
        if arm.label not in summary.index:
            continue  # a baseline that sees every token
        row, colour = summary.loc[arm.label], style.SERIES[place % len(style.SERIES)]
        scores = result.scores(arm.label, ratio, metric)
        _interval(left, place, row[["mean", "low", "high"]], scores.values(), colour)
        if place:
            pairs = [scores[seed] - baseline[seed] for seed in scores if seed in baseline]
            bounds = row[["difference", "difference_low", "difference_high"]]
            _interval(right, place, bounds, pairs, colour)
    right.axvline(0, color=style.FAINT, linewidth=1)
    low, high = right.get_xlim()
    side = 4 if high > -low else -4  # where there is room
    style.write_beside(right, "0 by definition", (0, 0), (side, 0), color=style.FAINT)
    for ax in (left, right):
        ax.set_yticks(range(len(result.arms)), names if ax is left else [])
        ax.set_ylim(len(result.arms) - 0.5, -0.5)
        ax.xaxis.set_major_locator(MaxNLocator(6))
    return fig.finish(f"{title}: {_summary_words(summary.reset_index())}")


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
    fig = style.new_figure(style.WIDTH * panels / 2, 3.4)
    score = title_of(metric)
    right = style.axes_of(fig, panels, panels, score, AXES[x], f"{score} × 100")
    axes = [right]
    if training_loss:
        axes.append(style.axes_of(fig, 1, 2, "training loss, running mean", AXES[x], "loss"))
    words = []
    for place, (arm, name) in enumerate(zip(result.arms, arm_names(result), strict=True)):
        colour, marker = style.SERIES[place % len(style.SERIES)], MARKERS[place % len(MARKERS)]
        own = curves[curves["arm"] == arm.label]
        mean = _draw_seeds(right, own[own[metric].notna()], x, metric, colour)
        look: dict[str, Any] = {"marker": marker, "markersize": 4.5, "linewidth": 1.8}
        right.plot(mean[x], mean[metric], color=colour, label=name, **look)
        if len(mean):
            words.append(f"{name} ends at {mean[metric].iloc[-1]:.1f}")
        if training_loss:
            loss = own.groupby("step", as_index=False)[[x, "loss"]].mean()
            window = loss["loss"].rolling(max(1, len(loss) // 25), center=True, min_periods=1)
            axes[1].plot(loss[x], window.mean(), color=colour, linewidth=1.6)
    for ax in axes:
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
    right.xaxis.set_major_locator(MaxNLocator(6))
    style.add_legend(right, title=_fields_text(result))
    return fig.finish(f"{score} x 100 against {AXES[x]}: {'; '.join(words)}.")


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
    return [
        style.save_figure(fig, Path(folder) / f"{name}.png")[0] for name, fig in figures.items()
    ]


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


def _interval(ax: Axes, y: int, bounds: Any, seeds: Collection[float], colour: str) -> None:
    """A mean with its value above it, a bar from low to high, a pale dot per seed.

    bounds: mean, low, high.
    """
    mean, low, high = bounds
    if math.isnan(mean):
        return
    ax.plot(list(seeds), [y] * len(seeds), "o", color=colour, alpha=0.35, markersize=4)
    if not math.isnan(low):
        ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], color=colour, capsize=4)
    ax.plot([mean], [y], "D", color=colour, markersize=6)
    style.write_beside(ax, f"{mean:z.1f}", (mean, y), (0, 5), color=colour)


def _draw_seeds(ax: Axes, rows: Any, x: str, y: str, colour: str) -> Any:
    """Thin lines of the seeds; returns their mean at the steps that all of them have."""
    seeds = [seed for _, seed in rows.groupby("seed")]
    for seed in seeds if len(seeds) > 1 else []:
        ax.plot(seed[x], seed[y], color=colour, linewidth=0.7, alpha=0.4)
    counts = rows.groupby("step")[y].transform("count")
    return rows[counts == len(seeds)].groupby("step", as_index=False)[[x, y]].mean()


def _summary_words(summary: Any) -> str:
    cells = [
        f"{row['arm']} at {row['evaluate_ratio']:g}: {row['mean']:.1f}"
        + ("" if math.isnan(row["low"]) else f" ({row['low']:.1f} to {row['high']:.1f})")
        for _, row in summary.iterrows()
    ]
    return "; ".join(cells) + "."
