"""Figures of numbers: the course of a training, AP against the sample ratio."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from mimdet.viz.style import (
    BLACK,
    BLUE,
    FAINT,
    GREEN,
    INK,
    LARGE,
    NORMAL,
    ORANGE,
    SKY,
    VERMILLION,
    WIDTH,
    NotebookFigure,
    new_figure,
)

KINDS = {"box": (BLUE, "o"), "mask": (VERMILLION, "s")}
LOSSES = {
    "loss": ("total", BLACK),
    "loss_rpn_cls": ("RPN objectness", SKY),
    "loss_rpn_loc": ("RPN box", BLUE),
    "loss_cls": ("class", VERMILLION),
    "loss_box_reg": ("box", ORANGE),
    "loss_mask": ("mask", GREEN),
}


class Score(NamedTuple):
    """One point of an AP curve."""

    x: float
    ap: float
    """x 100."""
    spread: float = 0.0
    """Standard deviation, x 100."""


def show_training(metrics_rows: Sequence[dict[str, Any]], title: str = "") -> NotebookFigure:
    """Losses (left) and AP x 100 (right) over the steps of a run.

    metrics_rows: lines of metrics.jsonl, {"step", "loss", "loss_...", ...} of a step and {"step",
    "evaluation": {"box": {"AP"}, "mask": {"AP"}}} of an evaluation; either may be missing. Thin
    lines are single steps, thick ones running means.
    """
    steps = [row for row in metrics_rows if "loss" in row]
    evaluations = [row for row in metrics_rows if "evaluation" in row]
    curves = {kind: _evaluated(evaluations, kind) for kind in KINDS}
    fig = new_figure(WIDTH, 3.4)
    left = axes_of(fig, 1, 2, "training loss", "step", "loss (log scale)")
    right = axes_of(fig, 2, 2, "evaluation", "step", "AP × 100")
    last = max((row["step"] for row in metrics_rows), default=1)
    for ax in (left, right):
        ax.set_xlim(0, last * 1.02)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _draw_losses(left, steps)
    if any(curves.values()):
        _draw_curves(right, curves, mark_all=False)
    else:
        _say(right, "no evaluation yet")
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=LARGE, weight="bold", color=INK)
    fig.set_layout_engine("constrained")
    fig.alt_text = _training_in_words(steps, curves)
    return fig


def show_ratios(rows: Sequence[dict[str, Any]]) -> NotebookFigure:
    """AP x 100 against the share of tokens kept, with one standard deviation over the draws.

    rows: of `mimdet.analysis.evaluate.evaluate_ratios`, {"sample_ratio", "draws", "box_ap",
    "box_ap_sd"} and the same of masks, where there are masks; APs are fractions. Raises ValueError
    when there are none.
    """
    if not rows:
        raise ValueError("no rows to show: give the rows of evaluate_ratios, one per sample ratio")
    rows = sorted(rows, key=lambda row: row["sample_ratio"])
    draws = max(row["draws"] for row in rows)
    title = f"mean ± sd of {draws} draws" if draws > 1 else ""
    curves = {
        kind: [
            Score(row["sample_ratio"], 100 * row[f"{kind}_ap"], 100 * row[f"{kind}_ap_sd"])
            for row in rows
            if f"{kind}_ap" in row
        ]
        for kind in KINDS
    }
    fig = new_figure(WIDTH / 2, 3.4)
    ax = axes_of(fig, 1, 1, title, "share of tokens kept", "AP × 100")
    _draw_curves(ax, curves, mark_all=True)
    ax.set_xlim(0, 1.08)
    ax.set_xticks(sorted({row["sample_ratio"] for row in rows}))
    ax.xaxis.set_major_formatter(_PLAIN)
    fig.set_layout_engine("constrained")
    points = [
        f"{kind} {score.ap:.1f} ± {score.spread:.1f} at {score.x:g}"
        for kind, curve in curves.items()
        for score in curve
    ]
    fig.alt_text = f"AP x 100 against the share of tokens kept: {', '.join(points)}."
    return fig


# ------------------------------------------------------------------------------- AP


def _evaluated(evaluations: Sequence[dict[str, Any]], kind: str) -> list[Score]:
    """The evaluations that have a number of this kind."""
    found = []
    for row in evaluations:
        ap = (row["evaluation"].get(kind) or {}).get("AP")
        if ap is not None and ap >= 0:  # neither NaN nor COCO's -1, both of which mean "no object"
            found.append(Score(row["step"], 100 * ap))
    return found


def _draw_curves(ax: Axes, curves: dict[str, list[Score]], mark_all: bool) -> None:
    """A line per kind, its name and value at the last point, the other values if mark_all.

    The values of the curve that ends higher stand above it, the other's below it.
    """
    curves = {kind: curve for kind, curve in curves.items() if curve}
    upper = max(curves, key=lambda kind: curves[kind][-1].ap, default="")
    for kind, curve in curves.items():
        colour, marker = KINDS[kind]
        x, ap, spread = zip(*curve, strict=True)
        ax.errorbar(
            x,
            ap,
            spread if any(spread) else None,
            color=colour,
            marker=marker,
            markersize=4.5,
            capsize=3,
            label=kind,
        )
        side = 1 if kind == upper else -1
        for score in curve if mark_all else curve[-1:]:
            name = f"{kind} " if score is curve[-1] else ""
            ax.annotate(
                f"{name}{score.ap:.1f}",
                (score.x, score.ap + side * score.spread),
                xytext=(0, side * 7),
                textcoords="offset points",
                ha="center",
                va="bottom" if side > 0 else "top",
                fontsize=NORMAL,
                color=colour,
            )
    highest = max((score.ap + score.spread for c in curves.values() for score in c), default=0.0)
    ax.set_ylim(0, max(1.0, 1.18 * highest))  # from 0, with room for the values
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


# ------------------------------------------------------------------------------- losses


def _draw_losses(ax: Axes, steps: Sequence[dict[str, Any]]) -> None:
    window = max(1, len(steps) // 25)
    numbers = [row["step"] for row in steps]
    ends: list[tuple[float, str, str]] = []
    low, high = np.inf, 0.0
    for name, (label, colour) in LOSSES.items():
        values = np.array([row.get(name, np.nan) for row in steps], dtype=float)
        means = _running_mean(values, window)
        positive = means[means > 0]  # what a log scale can show
        if len(positive) == 0:
            continue
        ax.plot(numbers, values, color=colour, linewidth=0.5, alpha=0.25, rasterized=True)
        ax.plot(numbers, means, color=colour, linewidth=1.6, label=label)
        ends.append((float(positive[-1]), label, colour))
        low, high = min(low, positive.min()), max(high, positive.max())
    if not ends:
        _say(ax, "no steps yet")
        return
    if window > 1:
        ax.set_title(
            f"training loss, mean of {window} steps", loc="left", fontsize=LARGE, color=INK
        )
    ax.set_yscale("log")
    ax.set_ylim(low / 2, high * 2)  # for the means: one step with a loss near 0 would set the scale
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(_PLAIN)
    ax.yaxis.set_minor_locator(NullLocator())
    _name_ends(ax, numbers[-1], ends)


def _name_ends(ax: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names right of the axes, a stroke from each to the end (x, value) of its line.

    ends: (value, name, colour). A name stands at the height of its line, or just above the name
    below it.
    """
    free = 0.0  # share of the axes' height up to which there is text
    for value, name, colour in sorted(ends):
        height = ax.transAxes.inverted().transform(ax.transData.transform((x, value)))[1]
        height = max(height, free)
        free = height + 0.065
        ax.annotate(
            name,
            (x, value),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=NORMAL,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": colour, "relpos": (0, 0.5), "shrinkA": 1},
            annotation_clip=False,
        )


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the `window` values around each one, fewer at the ends; gaps (NaN) are left out."""
    known = ~np.isnan(values)
    sums = np.cumsum(np.where(known, values, 0))
    counts = np.cumsum(known)
    sums, counts = np.append(0, sums), np.append(0, counts)
    start = np.arange(len(values)) - (window - 1) // 2
    stop = np.clip(start + window, 0, len(values))
    start = np.clip(start, 0, None)
    total, count = sums[stop] - sums[start], counts[stop] - counts[start]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _training_in_words(steps: Sequence[dict[str, Any]], curves: dict[str, list[Score]]) -> str:
    parts = []
    if steps:
        first, last = steps[0], steps[-1]
        parts.append(
            f"The training loss goes from {first['loss']:.2f} at step {first['step']} to "
            f"{last['loss']:.2f} at step {last['step']}"
        )
    for kind, curve in curves.items():
        parts += [f"{kind} AP is {score.ap:.1f} at step {score.x}" for score in curve[-1:]]
    return "; ".join(parts) + "." if parts else "A training run without a step so far."


# ------------------------------------------------------------------------------- axes

_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def axes_of(fig: Figure, position: int, count: int, title: str, x: str, y: str) -> Axes:
    """Axes number `position` of `count` in a row: two spines, faint horizontal lines, labels."""
    ax = fig.add_subplot(1, count, position)
    ax.set_title(title, loc="left", fontsize=LARGE, color=INK)
    ax.set_xlabel(x, fontsize=NORMAL, color=INK)
    ax.set_ylabel(y, fontsize=NORMAL, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=NORMAL, color=FAINT, labelcolor=INK)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", fontsize=NORMAL, color=FAINT)
    ax.set_yticks([])
