"""Figures of numbers: the course of a training, AP against the sample ratio."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor, nn

from mimdet.config import TrainingConfig
from mimdet.models.sampling import Grid
from mimdet.models.vit import resize_table, sincos_table
from mimdet.models.weights import LoadReport
from mimdet.training.optim import Schedule, scaled_rate
from mimdet.viz.draw import heat
from mimdet.viz.style import (
    BLACK,
    BLUE,
    FAINT,
    GREEN,
    INK,
    LARGE,
    NORMAL,
    ORANGE,
    PALETTE,
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


COLOURS = (BLUE, SKY, ORANGE, GREEN, VERMILLION)


def loaded_by_part(report: LoadReport, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part of the model -> (values that came from the file, values that are new).

    A part is what stands in front of the second dot of a backbone's name, `encoder`, or of the
    first, `neck`. Buffers such as running means are not counted.
    """
    loaded = set(report.loaded)
    counts: dict[str, tuple[int, int]] = {}
    for name, value in model.named_parameters():
        part = name.removeprefix("backbone.").split(".")[0]
        old, new = counts.get(part, (0, 0))
        from_file = name in loaded
        counts[part] = (old + value.numel() * from_file, new + value.numel() * (not from_file))
    return counts


def show_loaded(report: LoadReport, model: nn.Module) -> NotebookFigure:
    """Parameters of every part of a model: those a file gave, and those that are still random."""
    counts = loaded_by_part(report, model)
    parts = {
        "from the file": [old for old, _ in counts.values()],
        "new": [new for _, new in counts.values()],
    }
    return show_stacked(list(counts), parts, "parameters", millions(parts), digits=3)


def millions(parts: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """The unit that keeps a bar's number short: (divisor, name)."""
    largest = max(max(values) for values in parts.values())
    steps = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "thousand"))
    return next(((size, name) for size, name in steps if largest >= size), (1.0, ""))


def show_stacked(
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    quantity: str,
    unit: tuple[float, str] = (1.0, ""),
    digits: int = 2,
) -> NotebookFigure:
    """A horizontal bar a label, made of parts, its sum written behind it.

    parts: name -> a number for every label. unit: (divisor, name), for example (1e9, "G"). digits:
    of the sums; those before the point are always written.
    Raises ValueError when a part has another number of values than there are labels.
    """
    for name, values in parts.items():
        if len(values) != len(labels):
            raise ValueError(f"part {name!r} has {len(values)} values for {len(labels)} labels")
    size, word = unit
    fig = new_figure(WIDTH, 1.1 + 0.32 * len(labels))
    ax = axes_of(fig, 1, 1, "", f"{quantity}, {word}".rstrip(", "), "")
    rows = list(range(len(labels)))
    left = [0.0] * len(labels)
    colours = COLOURS if len(parts) <= len(COLOURS) else PALETTE
    for (name, values), colour in zip(parts.items(), colours, strict=False):
        lengths = [value / size for value in values]
        ax.barh(rows, lengths, left=left, color=colour, label=name, height=0.7)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    for row, total in zip(rows, left, strict=True):
        ax.text(total, row, f" {_short(total, digits)}", va="center", fontsize=NORMAL, color=INK)
    ax.set_yticks(rows, list(labels))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1 * max(left))
    ax.grid(False, axis="y")
    ax.legend(
        fontsize=NORMAL,
        frameon=False,
        labelcolor=INK,
        ncols=len(parts),
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    fig.set_layout_engine("constrained")
    sums = ", ".join(
        f"{label} {_short(total, digits)}" for label, total in zip(labels, left, strict=True)
    )
    fig.alt_text = f"Bars of {quantity} ({word}), made of {', '.join(parts)}: {sums}."
    return fig


def _short(number: float, digits: int) -> str:
    """At least so many digits, no exponent: 0.123, 97.5, 1,193."""
    return f"{number:,.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"


PART_COLOURS = (BLUE, SKY, ORANGE)


def show_costs(
    costs: Mapping[str, Mapping[str, float]], unit: str, scale: float = 1.0
) -> NotebookFigure:
    """One bar a model or setting, its parts end to end, each with its number in it.

    costs: name -> part -> cost, the same parts (at most three) in every one; numbers are divided by
    `scale`, and `unit` says what they then are. Raises ValueError for other parts.
    """
    parts = list(next(iter(costs.values()), {}))
    if not 0 < len(parts) <= len(PART_COLOURS) or any(list(own) != parts for own in costs.values()):
        raise ValueError(
            f"every bar needs the same one to {len(PART_COLOURS)} parts, not {dict(costs)}"
        )
    fig = new_figure(7.5, 0.42 * len(costs) + 1.05)
    ax = fig.add_axes(
        (0.13, 0.52 / fig.get_figheight(), 0.84, 0.42 * len(costs) / fig.get_figheight())
    )
    said = []
    longest = max(sum(own.values()) for own in costs.values()) / scale
    for row, (name, own) in enumerate(costs.items()):
        left = 0.0
        for part, colour in zip(parts, PART_COLOURS, strict=False):
            value = own[part] / scale
            ax.barh(
                row, value, left=left, color=colour, height=0.7, label=part if row == 0 else None
            )
            if value > 0.04 * longest:  # a number needs room
                dark = colour == BLUE
                ax.text(
                    left + value / 2,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=NORMAL,
                    color="white" if dark else INK,
                )
            left += value
        said.append(f"{name}: " + ", ".join(f"{part} {own[part] / scale:.0f}" for part in parts))
    ax.set_yticks(range(len(costs)), list(costs), fontsize=NORMAL)
    ax.invert_yaxis()
    ax.set_xlabel(unit, fontsize=NORMAL, color=INK)
    ax.tick_params(labelsize=NORMAL, colors=INK)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="upper center", ncols=len(parts), fontsize=NORMAL, frameon=False)
    fig.alt_text = f"Bars of {unit}. " + "; ".join(said) + "."
    return fig


def similarity(places: Tensor, grid: Grid, place: int) -> Tensor:
    """Cosine of the position at `place` and every other: (1, h * w, D) -> (h, w), -1..1."""
    flat = F.normalize(places[0].detach().float().cpu(), dim=1)
    return (flat @ flat[place]).unflatten(0, grid)


def show_positions(
    table: Tensor, grid: Grid, at: tuple[float, float] = (0.5, 0.5)
) -> NotebookFigure:
    """A stored table beside the same table resized to `grid`, and both along one row.

    table: (1, 1 + side * side, D), as encoders and decoders store it (row 0 is the class token's).
    at: the place that is compared with all others, as shares of the height and width. The curves
    have distance as a share of the image's width: resizing keeps what is where in the picture, so
    both agree; a table made anew for the grid counts tokens instead. Raises ValueError for a table
    of another shape and a place outside.
    """
    side = round((table.shape[1] - 1) ** 0.5) if table.dim() == 3 else 0
    if table.dim() != 3 or len(table) != 1 or side * side + 1 != table.shape[1] or not side:
        raise ValueError(
            f"a position table of shape {tuple(table.shape)}: give (1, 1 + side * side, D)"
        )
    if not (0 <= at[0] < 1 and 0 <= at[1] < 1):
        raise ValueError(f"at={at}: give shares of the height and width, from 0 to below 1")
    table = table.detach().cpu()
    fig = new_figure(WIDTH, 3.2)
    stored = _panel(fig.add_subplot(1, 3, 1), table[:, 1:], (side, side), at, "stored")
    resized = _panel(fig.add_subplot(1, 3, 2), resize_table(table, grid), grid, at, "resized")
    ax = axes_of(fig, 3, 3, "along the row", "distance, share of the width", "cosine")
    column = int(at[1] * grid[1])
    fresh = sincos_table(table.shape[2], grid[1])[:, 1 : 1 + grid[1]]  # its first row
    again = similarity(fresh, (1, grid[1]), column)[0]
    lines = (
        (stored[int(at[0] * side)], FAINT, "-", "o", f"stored, {side} wide"),
        (resized[int(at[0] * grid[0])], VERMILLION, "-", None, f"resized, {grid[1]} wide"),
        (again, BLUE, "--", None, f"made anew, {grid[1]} wide"),
    )
    for values, colour, style, marker, name in lines:
        middle = int(at[1] * len(values))
        distance = (torch.arange(len(values)) - middle) / len(values)
        ax.plot(
            distance.numpy(),
            values.numpy(),
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=4,
            label=name,
        )
    ax.legend(fontsize=NORMAL, frameon=False, labelcolor=INK, loc="lower center")
    low = min(float(values.min()) for values, *_ in lines)
    ax.set_ylim(low - 0.45 * (1 - low), 1.03)  # room for the legend
    fig.set_layout_engine("constrained")
    fig.alt_text = (
        f"Cosine similarity of one place's position to all others: the stored table of {side} x "
        f"{side} places, the same resized to {grid[0]} x {grid[1]}, and both along a row, where "
        "the resized curve follows the stored one over the same share of the image."
    )
    return fig


def _panel(ax: Axes, places: Tensor, grid: Grid, at: tuple[float, float], name: str) -> Tensor:
    row, column = int(at[0] * grid[0]), int(at[1] * grid[1])
    values = similarity(places, grid, row * grid[1] + column)
    ax.imshow(heat(values, high=1.0), interpolation="nearest")
    ax.set_title(f"{name}: {grid[0]} × {grid[1]}", loc="left", fontsize=NORMAL, color=INK, pad=3)
    ax.set_axis_off()
    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=VERMILLION)
    frame.set_linewidth(1.8)
    ax.add_patch(frame)
    return values


RATE_COLOURS = {"rest": VERMILLION, "stem": BLUE, "encoder": GREEN}
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
    schedule = Schedule(cfg, images)
    total, warmup, per_epoch = schedule.total, schedule.warmup, schedule.epoch
    steps = np.unique(np.r_[0:warmup, np.linspace(0, total - 1, 800).astype(int)])
    factors = np.array([schedule.factor(int(step) + 1) for step in steps])
    fig = new_figure(WIDTH, 3.4)
    left = axes_of(fig, 1, 2, f"{total:,} steps", "epoch", "learning rate (log scale)")
    rates = group_rates(cfg)
    for name, rate in rates.items():
        left.plot(steps / per_epoch, rate * factors, color=RATE_COLOURS[name], linewidth=1.8)
        left.annotate(
            f"{name} {rate:.3g}",
            (0.5 * total / per_epoch * cfg.milestones[0], rate * factors.max()),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=NORMAL,
            color=RATE_COLOURS[name],
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
