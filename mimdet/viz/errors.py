"""Figures of errors: what each type costs, precision over recall, the errors themselves, two runs.

Each function returns a new `NotebookFigure`; `mimdet.viz.style.save_figure` writes it.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from mimdet.analysis.comparison import SAME, RunComparison
from mimdet.analysis.errors import MEANINGS, Curve, ErrorReport
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
    SMALL,
    VERMILLION,
    WIDTH,
    NotebookFigure,
    new_figure,
)

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
"""Of reports that stand side by side."""


def show_errors(reports: ErrorReport | Mapping[str, ErrorReport]) -> NotebookFigure:
    """dAP x 100 of the six types and of the two oracles, as bars; several reports side by side.

    reports: one, or {name: report}, at most six. Raises ValueError for none or more.
    """
    named = {"": reports} if isinstance(reports, ErrorReport) else dict(reports)
    if not 1 <= len(named) <= len(COLOURS):
        raise ValueError(f"{len(named)} reports: give 1 to {len(COLOURS)}")
    first = next(iter(named.values()))
    types, oracles = list(first.dap), list(first.special)
    highest = [100 * max([*r.dap.values(), *r.special.values()]) for r in named.values()]
    reach = 1.25 * max([h for h in highest if math.isfinite(h)], default=1.0) or 1.0

    bar = 0.26 if len(named) == 1 else 0.17  # inches
    row = bar * len(named) + 0.13
    height = row * (len(types) + len(oracles)) + 1.1
    fig = new_figure(WIDTH, height)
    grid = fig.add_gridspec(2, 1, height_ratios=(len(types), len(oracles)))
    for place, names in enumerate((types, oracles)):
        ax = fig.add_subplot(grid[place])
        _style(ax)
        ax.grid(axis="x", color="#E6E6E6", linewidth=0.6)
        ax.set_xlim(0, reach)
        for number, (name, report) in enumerate(named.items()):
            label = f"{name}: AP {100 * report.ap:.1f}"
            _draw_bars(ax, report, names, number, len(named), label)
        ax.set_yticks(range(len(names)), [f"{name}\n{MEANINGS[name]}" for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        if place == 0:
            _title(ax, _bars_title(named))
            ax.set_xticklabels([])
        else:
            ax.set_xlabel("AP × 100 gained if fixed", fontsize=NORMAL, color=INK)
    if len(named) > 1:
        fig.axes[0].legend(
            fontsize=NORMAL,
            labelcolor=INK,
            frameon=False,
            loc="lower right",
        )
    fig.set_layout_engine("constrained")
    fig.alt_text = " ".join(_bars_in_words(name, report) for name, report in named.items())
    return fig


def show_curves(
    curves: Sequence[Curve], most_classes: int = 15, columns: int = 4
) -> NotebookFigure:
    """Precision over recall: a panel for the mean and one for each class, a line per IoU threshold.

    curves: of `ErrorReport.curves`. Classes stand in the order of their AP, the worst first, and
    at most `most_classes` of them. Raises ValueError when there are no curves.
    """
    if not curves:
        raise ValueError("no curves to show: give report.curves()")
    thresholds = sorted({curve.iou_threshold for curve in curves})
    panels: dict[str, list[Curve]] = {}
    for curve in sorted(curves, key=lambda curve: curve.iou_threshold):
        if not math.isnan(curve.ap):
            panels.setdefault(curve.category, []).append(curve)
    mean = panels.pop("", [])
    classes = sorted(panels, key=lambda name: sum(curve.ap for curve in panels[name]))
    shown = ["", *classes[:most_classes]]
    rows = -(-len(shown) // columns)
    fig = new_figure(WIDTH, 0.6 + 1.85 * rows)
    first = None
    for place, name in enumerate(shown):
        ax = fig.add_subplot(rows, columns, place + 1, sharex=first, sharey=first)
        first = first or ax
        mine = panels[name] if name else mean
        _draw_curves(ax, mine, thresholds)
        _title(ax, name or "mean", bold=not name)
        ax.label_outer()
        if place % columns == 0:
            ax.set_ylabel("precision", fontsize=NORMAL, color=INK)
        if place + columns >= len(shown):
            ax.set_xlabel("recall", fontsize=NORMAL, color=INK)
            ax.tick_params(labelbottom=True)
    fig.set_layout_engine("constrained")
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(
        handles,
        labels,
        loc="outside upper right",
        ncols=len(labels),
        fontsize=NORMAL,
        labelcolor=INK,
        frameon=False,
    )
    left_out = len(classes) - len(shown) + 1
    note = f", the {len(shown) - 1} classes of the lowest AP of {len(classes)}" if left_out else ""
    heading = f"Precision over recall, AP × 100{note}"
    fig.suptitle(heading, x=0.01, ha="left", fontsize=LARGE, color=INK)
    numbers = ", ".join(f"{100 * c.ap:.1f} at IoU {c.iou_threshold:g}" for c in mean)
    worst = f" The worst class is {classes[0]}." if classes else ""
    fig.alt_text = f"Precision over recall, mean AP {numbers}.{worst}"
    return fig


def show_comparison(comparison: RunComparison, count: int = 8) -> NotebookFigure:
    """Two runs image by image: AP of each image in both (left), the largest changes (right).

    count: images that gained most, and as many that lost most, on the right.
    """
    first, second = comparison.names
    images = comparison.images.dropna(subset="change")
    fig = new_figure(WIDTH, 4.4)
    left, right = fig.add_subplot(1, 2, 1), fig.add_subplot(1, 2, 2)
    numbers = comparison.summary()
    kinds = {
        "gained": (images[images["change"] > SAME], BLUE, "^"),
        "lost": (images[images["change"] < -SAME], VERMILLION, "v"),
        "same": (images[images["change"].abs() <= SAME], FAINT, "o"),
    }
    _style(left)
    left.grid(color="#E6E6E6", linewidth=0.6)
    left.plot([0, 100], [0, 100], color=FAINT, linewidth=0.8)
    for name, (rows, colour, marker) in kinds.items():
        left.scatter(
            100 * rows["ap_1"],
            100 * rows["ap_2"],
            s=18,
            marker=marker,
            color=colour,
            alpha=0.75,
            linewidth=0,
            label=f"{name}: {numbers[name]}",
        )
    left.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal")
    left.set_xlabel(f"AP × 100 with {first}", fontsize=NORMAL, color=INK)
    left.set_ylabel(f"AP × 100 with {second}", fontsize=NORMAL, color=INK)
    left.legend(fontsize=NORMAL, labelcolor=INK, frameon=False, loc="upper left", markerscale=1.4)
    _title(left, f"{numbers['images']} images")
    _draw_changes(right, comparison, count)
    fig.set_layout_engine("constrained")
    fig.alt_text = (
        f"From {first} to {second}, {numbers['gained']} of {numbers['images']} images gain AP, "
        f"{numbers['lost']} lose and {numbers['same']} keep theirs; the mean AP of an image goes "
        f"from {100 * numbers['mean_ap_1']:.1f} to {100 * numbers['mean_ap_2']:.1f}."
    )
    return fig


# ------------------------------------------------------------------------------- parts


def _draw_bars(
    ax: Axes, report: ErrorReport, names: Sequence[str], number: int, of: int, label: str
) -> None:
    """Bars of report `number` of `of`, each with its value and the number of errors behind it."""
    thickness = 0.76 / of
    dap = report.dap | report.special
    values = [0.0 if math.isnan(dap[name]) else 100 * dap[name] for name in names]
    places = np.arange(len(names)) + (number - (of - 1) / 2) * thickness
    colour = COLOURS[number]
    bars = ax.barh(places, values, height=0.9 * thickness, color=colour, label=label)
    labels = []
    for name, value in zip(names, values, strict=True):
        count = report.counts.get(name)
        labels.append(f"{value:.1f}" + ("" if count is None else f"  ({_plural(count, 'error')})"))
    beneath = {"facecolor": "white", "linewidth": 0, "pad": 1}  # no grid line through the text
    ax.bar_label(bars, labels, padding=4, fontsize=NORMAL, color=INK, bbox=beneath)


def _bars_title(named: Mapping[str, ErrorReport]) -> str:
    report = next(iter(named.values()))
    title = f"What each type of error costs at IoU {report.iou_threshold:g}"
    return f"{title} (AP {100 * report.ap:.1f})" if len(named) == 1 else title


def _bars_in_words(name: str, report: ErrorReport) -> str:
    costs = [f"{kind} {100 * dap:.1f}" for kind, dap in (report.dap | report.special).items()]
    subject = f"{name}: AP" if name else "AP"
    return (
        f"{subject} {100 * report.ap:.1f} at IoU {report.iou_threshold:g}; fixing all errors "
        + (f"of a type adds: {', '.join(costs)}.")
    )


def _draw_curves(ax: Axes, curves: Sequence[Curve], thresholds: Sequence[float]) -> None:
    """A line per IoU threshold, the strictest darkest; their APs in the upper right corner."""
    _style(ax)
    ax.grid(color="#E6E6E6", linewidth=0.6)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    shades = mpl.colormaps["Blues"](np.linspace(0.45, 1.0, len(thresholds)))
    for curve in curves:
        ax.plot(
            curve.recall,
            curve.precision,
            color=shades[thresholds.index(curve.iou_threshold)],
            linewidth=1.6,
            clip_on=False,
            label=f"IoU {curve.iou_threshold:.2f}",
        )
    aps = " · ".join(f"{100 * curve.ap:.0f}" for curve in curves)
    ax.set_title(f"AP {aps}", loc="right", fontsize=NORMAL, color=INK)


def _draw_changes(ax: Axes, comparison: RunComparison, count: int) -> None:
    """A bar per image, from its AP in the first run to that in the second."""
    gained, lost = comparison.gained(count), comparison.lost(count)
    rows = [*gained.itertuples(), *reversed([*lost.itertuples()])]
    _style(ax)
    _title(ax, f"the {_plural(len(gained), 'largest gain')} and {_plural(len(lost), 'loss', 'es')}")
    ax.axvline(0, color=FAINT, linewidth=0.8)
    for place, row in enumerate(rows):
        change = 100 * row.change
        ax.barh(place, change, height=0.7, color=BLUE if change > 0 else VERMILLION)
        found = f"{row.found_1} → {row.found_2} of {row.objects} found"
        ax.annotate(
            found,
            (0, place),
            xytext=(-4 if change > 0 else 4, 0),
            textcoords="offset points",
            ha="right" if change > 0 else "left",
            va="center",
            fontsize=SMALL,
            color=INK,
        )
    largest = max((abs(100 * row.change) for row in rows), default=1.0)
    ax.set_xlim(-1.1 * largest, 1.1 * largest)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), [f"image {row.image_id}" for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("change of the image's AP × 100", fontsize=NORMAL, color=INK)


def _style(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=NORMAL, color=FAINT, labelcolor=INK)
    ax.set_axisbelow(True)


def _title(ax: Axes, text: str, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    ax.set_title(text, loc="left", fontsize=LARGE, color=INK, weight=weight)


def _plural(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}" + ("" if number == 1 else ending)
