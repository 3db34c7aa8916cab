"""Figures of numbers: the course of a training, AP against the ratio, what things are made of."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor, nn

from mimdet.config import TrainingConfig
from mimdet.models.sampling import Grid
from mimdet.models.vit import resize_table, sincos_table
from mimdet.models.weights import LoadReport
from mimdet.training.optim import Schedule, scaled_rate
from mimdet.training.plan import Forecast
from mimdet.training.profile import Profile
from mimdet.viz import style
from mimdet.viz.draw import heat
from mimdet.viz.style import NotebookFigure

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")

# ------------------------------------------------------------------------------- AP

KINDS = {"box": (style.BLUE, "o"), "mask": (style.VERMILLION, "s")}


Points = list[tuple[float, float, float]]
"""Of an AP curve: x, AP x 100, standard deviation x 100."""


def show_training(metrics_rows: Sequence[dict[str, Any]]) -> NotebookFigure:
    """Losses (left) and AP x 100 (right) over the steps of a run.

    metrics_rows: lines of metrics.jsonl, {"step", "loss", "loss_...", ...} of a step and {"step",
    "evaluation": {"box": {"AP"}, "mask": {"AP"}}} of an evaluation; either may be missing. Thin
    lines are single steps, thick ones running means.
    """
    steps = [row for row in metrics_rows if "loss" in row]
    evaluations = [row for row in metrics_rows if "evaluation" in row]
    curves = {kind: _evaluated(evaluations, kind) for kind in KINDS}
    fig = style.new_figure(style.WIDTH, 3.4)
    left = style.axes_of(fig, 1, 2, "training loss", "step", "loss (log scale)")
    right = style.axes_of(fig, 2, 2, "evaluation", "step", "AP × 100")
    last = max((row["step"] for row in metrics_rows), default=1)
    for ax in (left, right):
        ax.set_xlim(0, last * 1.02)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if steps:
        _draw_losses(left, steps)
    _draw_scores(right, curves, mark_all=False)
    for ax, missing in ((left, "no steps yet"), (right, "no evaluation yet")):
        if not ax.lines:
            style.write_title(ax, missing, style.LARGE)
            ax.set_yticks([])
    said = [
        f"loss {row['loss']:.2f} at step {row['step']}" for row in steps[:: len(steps) - 1 or 1]
    ]
    said += [f"{kind} AP {c[-1][1]:.1f} at step {c[-1][0]}" for kind, c in curves.items() if c]
    return fig.finish(f"A training run: {', '.join(said) or 'no step so far'}.")


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
    curves = {
        kind: [
            (row["sample_ratio"], 100 * row[f"{kind}_ap"], 100 * row[f"{kind}_ap_sd"])
            for row in rows
            if f"{kind}_ap" in row
        ]
        for kind in KINDS
    }
    fig = style.new_figure(style.WIDTH / 2, 3.4)
    title = f"mean ± sd of {draws} draws" if draws > 1 else ""
    ax = style.axes_of(fig, 1, 1, title, "share of tokens kept", "AP × 100")
    _draw_scores(ax, curves, mark_all=True)
    ax.set_xlim(-0.06, 1.08)  # room beside the axis for the number at a single token
    ratios = [row["sample_ratio"] for row in rows]
    ax.set_xticks(ratios, [f"{ratio:.2g}" for ratio in ratios])
    points = [
        f"{kind} {ap:.1f} ± {spread:.1f} at {x:.2g}"
        for kind, curve in curves.items()
        for x, ap, spread in curve
    ]
    return fig.finish(f"AP x 100 against the share of tokens kept: {', '.join(points)}.")


def show_sizes(sides: np.ndarray, anchors: Sequence[float], token: int = 16) -> NotebookFigure:
    """How large objects are for the detector, beside its anchors.

    sides: (objects,) square root of each box's area, pixels of the resized image, as
    `mimdet.training.proposal.Proposal` has them; anchors: sides in pixels.
    """
    fig = style.new_figure(style.WIDTH / 2, 3.0)
    ax = style.axes_of(fig, 1, 1, "", "side of the object, pixels when resized", "objects")
    edges = np.geomspace(min(4.0, sides.min()), max(512.0, sides.max()), 40)
    ax.hist(sides, bins=edges.tolist(), color=style.SKY)
    for anchor in anchors:
        ax.axvline(anchor, color=style.ORANGE, linewidth=1, linestyle="--")
    ax.axvline(token, color=style.BLUE, linewidth=1.5)
    ax.set_xscale("log", base=2)
    ax.set_xticks([4, 8, 16, 32, 64, 128, 256, 512], list("48") + "16 32 64 128 256 512".split())
    ax.set_title("blue: a token; dashed: anchors", fontsize=style.SMALL, loc="left")
    few = float((sides < token).mean())
    return fig.finish(
        f"Histogram of {len(sides):,} objects by side in pixels: median {np.median(sides):.0f}, "
        f"{few:.0%} below a token's {token}. Anchors at {', '.join(f'{a:g}' for a in anchors)}."
    )


def _evaluated(evaluations: Sequence[dict[str, Any]], kind: str) -> Points:
    """The evaluations that have a number of this kind."""
    found = []
    for row in evaluations:
        ap = (row["evaluation"].get(kind) or {}).get("AP")
        if ap is not None and ap >= 0:  # neither NaN nor COCO's -1, both of which mean "no object"
            found.append((row["step"], 100 * ap, 0.0))
    return found


def _draw_scores(ax: Axes, curves: dict[str, Points], mark_all: bool) -> None:
    """A line per kind, its name and value at the last point, the other values if mark_all.

    The values of the curve that ends higher stand above it, the other's below it.
    """
    curves = {kind: curve for kind, curve in curves.items() if curve}
    upper = max(curves, key=lambda kind: curves[kind][-1][1], default="")
    for kind, curve in curves.items():
        colour, marker = KINDS[kind]
        x, ap, spread = zip(*curve, strict=True)
        bars = spread if any(spread) else None
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5}
        ax.errorbar(x, ap, bars, capsize=3, label=kind, **look)
        side = 1 if kind == upper else -1
        for point in curve if mark_all else curve[-1:]:
            name = f"{kind} " if point is curve[-1] else ""
            end = (point[0], point[1] + side * point[2])
            style.write_beside(ax, f"{name}{point[1]:.1f}", end, (0, 7 * side), color=colour)
    highest = max((ap + spread for c in curves.values() for _, ap, spread in c), default=0.0)
    ax.set_ylim(0, max(1.0, 1.18 * highest))  # from 0, with room for the values
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


# ------------------------------------------------------------------------------- losses

LOSSES = {
    "loss": ("total", style.BLACK),
    "loss_rpn_cls": ("RPN objectness", style.SKY),
    "loss_rpn_loc": ("RPN box", style.BLUE),
    "loss_cls": ("class", style.VERMILLION),
    "loss_box_reg": ("box", style.ORANGE),
    "loss_mask": ("mask", style.GREEN),
    "loss_c4": ("class, from c4", style.PURPLE),
}


def _draw_losses(ax: Axes, steps: Sequence[dict[str, Any]]) -> None:
    """Of each loss a thin line of single steps and a thick one of means."""
    import pandas as pd

    window = max(1, len(steps) // 25)
    losses = pd.DataFrame(steps, columns=["step", *LOSSES]).set_index("step").astype(float)
    means = losses.rolling(window, center=True, min_periods=1).mean()
    means = means.where(means > 0).dropna(axis=1, how="all")  # what a log scale can show
    if means.empty:
        return
    for name in means.iloc[-1].sort_values(ascending=False).index:  # the legend in their order
        label, colour = LOSSES[name]
        ax.plot(losses[name], color=colour, linewidth=0.5, alpha=0.25, rasterized=True)
        ax.plot(means[name], color=colour, linewidth=1.6, label=label)
    if window > 1:
        style.write_title(ax, f"training loss, mean of {window} steps", style.LARGE)
    ax.set_yscale("log")
    # For the means: one step with a loss near 0 would set the scale.
    ax.set_ylim(means.min().min() / 2, means.max().max() * 2)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_minor_locator(NullLocator())
    style.add_legend(ax, loc="upper left", bbox_to_anchor=(1, 1))


# ------------------------------------------------------------------------------- bars

PARTS = (style.BLUE, style.SKY, style.ORANGE, style.GREEN, style.VERMILLION)
"""Colours of the parts of a bar."""
SHORT = EngFormatter(places=1)
"""1.2 k, 85.8 M."""


def loaded_by_part(report: LoadReport, model: nn.Module) -> dict[str, dict[str, int]]:
    """Part of the model -> numbers of its values, those "from the file" and those that are "new".

    A part is what comes before the second dot of a backbone's name, `encoder`, or of the
    first, `neck`. Buffers such as running means are not counted.
    """
    loaded = set(report.loaded)
    counts: dict[str, dict[str, int]] = {}
    for name, value in model.named_parameters():
        part = name.removeprefix("backbone.").split(".")[0]
        own = counts.setdefault(part, {"from the file": 0, "new": 0})
        own["from the file" if name in loaded else "new"] += value.numel()
    return counts


def show_loaded(report: LoadReport, model: nn.Module) -> NotebookFigure:
    """Parameters of every part of a model: those a file gave, and those that are still random."""
    return show_stacked(loaded_by_part(report, model), "parameters")


def show_stacked(bars: Mapping[str, Mapping[str, float]], quantity: str) -> NotebookFigure:
    """A horizontal bar a model or setting, made of parts, with their numbers and their sum.

    bars: name -> part -> number, the same parts in every one. Raises ValueError without parts, and
    for bars of unlike ones.
    """
    parts = list(next(iter(bars.values()), ()))
    if not parts or any(list(own) != parts for own in bars.values()):
        raise ValueError(
            "every bar is made of the same parts, at least one: name -> part -> number"
        )
    lengths = np.array([list(own.values()) for own in bars.values()], float)  # (bars, parts)
    ends = lengths.cumsum(axis=1)
    sums = ends[:, -1]
    fig = style.new_figure(style.WIDTH, 0.9 + 0.42 * len(bars))
    ax = style.axes_of(fig, 1, 1, "", quantity, "", lines="")
    for number, (part, length) in enumerate(zip(parts, lengths.T, strict=True)):
        colour = PARTS[number % len(PARTS)]
        starts = ends[:, number] - length
        drawn = ax.barh(list(bars), length, left=starts, color=colour, height=0.7, label=part)
        roomy = (length > 0.07 * sums.max()) & (length < sums)
        words = [SHORT(value) if room else "" for value, room in zip(length, roomy, strict=True)]
        ink = "white" if colour == style.BLUE else style.INK
        ax.bar_label(drawn, words, label_type="center", fontsize=style.NORMAL, color=ink)
    for row, total in enumerate(sums):
        style.write_beside(ax, SHORT(total), (total, row), (3, 0))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1 * sums.max())
    ax.xaxis.set_major_formatter(EngFormatter())
    style.add_legend(ax, ncols=len(parts), loc="lower left", bbox_to_anchor=(0, 1))
    said = ", ".join(f"{name} {SHORT(total)}" for name, total in zip(bars, sums, strict=True))
    return fig.finish(f"Bars of {quantity}, made of {', '.join(parts)}: {said}.")


SIZES = {"AP": "all objects", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"}


def show_reliance(table: Any) -> NotebookFigure:
    """AP by size of object, a bar a condition; the dashed line is the model with all its tokens.

    table: the DataFrame of `mimdet.reliance`. What the model uses makes a bar shorter than the
    line. Raises ValueError for a table of something else.
    """
    if table.empty or not set(SIZES) <= set(table.columns):
        raise ValueError(f"a table with the columns {', '.join(SIZES)} is needed: see reliance")
    names, values = list(table.index), table[list(SIZES)].fillna(0.0)
    places = [name.partition(":")[0] if ":" in name else "" for name in names]
    kinds = list(dict.fromkeys(places))
    colours = [style.SERIES[kinds.index(place) % len(style.SERIES)] for place in places]
    fig = style.new_figure(style.WIDTH, 0.9 + 0.24 * len(names))
    for number, (column, title) in enumerate(SIZES.items(), start=1):
        ax = style.axes_of(fig, number, len(SIZES), title, "AP × 100", "", lines="")
        bars = ax.barh(range(len(names)), values[column], color=colours, height=0.75)
        words = ["-" if math.isnan(ap) else f"{ap:.1f}" for ap in table[column]]
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line
        look: dict[str, Any] = {"fontsize": style.NORMAL, "color": style.INK, "bbox": paper}
        ax.bar_label(bars, words, padding=2, **look)
        ax.set_yticks(range(len(names)), names if number == 1 else [""] * len(names))
        ax.invert_yaxis()
        ax.set_xlim(0, 1.25 * max(1.0, values.to_numpy().max()))
        if "all tokens" in names:
            ax.axvline(values[column]["all tokens"], color=style.FAINT, linestyle="--", zorder=0)
    said = ", ".join(f"{name} {ap:.1f}" for name, ap in table["AP"].items())
    return fig.finish(f"Box AP x 100 by size of object, of all objects: {said}.")


# ------------------------------------------------------------------------------- positions


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
    if not side or len(table) != 1 or side * side + 1 != table.shape[1]:
        raise ValueError(
            f"a position table of shape {tuple(table.shape)}: give (1, 1 + side * side, D)"
        )
    if not (0 <= at[0] < 1 and 0 <= at[1] < 1):
        raise ValueError(f"at={at}: give shares of the height and width, from 0 to below 1")
    table = table.detach().cpu()
    first_row = sincos_table(table.shape[2], grid[1])[:, 1 : 1 + grid[1]]
    tables = {
        "stored": (table[:, 1:], (side, side), style.FAINT, "o-"),
        "resized": (resize_table(table, grid), grid, style.VERMILLION, "-"),
        "made anew": (first_row, (1, grid[1]), style.BLUE, "--"),
    }
    fig = style.new_figure(style.WIDTH, 3.2)
    along = style.axes_of(fig, 3, 3, "along the row", "distance, share of the width", "cosine")
    for number, (name, (places, (h, w), colour, line)) in enumerate(tables.items(), start=1):
        row, column = int(at[0] * h), int(at[1] * w)
        values = similarity(places, (h, w), row * w + column)
        distance, label = (np.arange(w) - column) / w, f"{name}, {w} wide"
        along.plot(distance, values[row].numpy(), line, color=colour, markersize=4, label=label)
        if name == "made anew":
            continue  # one row
        ax = fig.add_subplot(1, 3, number)
        ax.imshow(heat(values, high=1.0), interpolation="nearest")
        ax.plot(column, row, "s", markersize=8, color=style.VERMILLION, fillstyle="none")
        ax.set_axis_off()
        style.write_title(ax, f"{name}: {h} × {w}")
    style.add_legend(along, loc="lower center")
    low = along.dataLim.y0
    along.set_ylim(low - 0.45 * (1 - low), 1.03)  # room for the legend
    return fig.finish(
        f"Cosine of one place's position with all others: stored, {side} x {side}, resized, "
        f"{grid[0]} x {grid[1]}, and both along a row."
    )


# ------------------------------------------------------------------------------- schedule

RATES = {"rest": style.VERMILLION, "stem": style.BLUE, "encoder": style.GREEN}
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
    fig = style.new_figure(style.WIDTH, 3.4)
    rate_axis = "learning rate (log scale)"
    left = style.axes_of(fig, 1, 2, f"{total:,} steps", "epoch", rate_axis)
    right = style.axes_of(fig, 2, 2, "the stem's rate", "images a step", rate_axis)
    _draw_rule(right, cfg)
    rates = group_rates(cfg)
    named = {name: f"{name} {rate:.3g}" for name, rate in rates.items()}
    for name, rate in rates.items():
        left.plot(steps / per_epoch, rate * factors, color=RATES[name], linewidth=1.8)
        top = (0.5 * total / per_epoch * cfg.milestones[0], rate * factors.max())
        style.write_beside(left, named[name], top, (0, 3), color=RATES[name])
    left.set_yscale("log")
    left.set_ylim(min(rates.values()) / 400, max(rates.values()) * 3)
    return fig.finish(
        f"Rates of {total:,} steps, {cfg.schedule} after a warm-up of {warmup:,} steps; at their "
        f"highest {', '.join(named.values())}. Beside it the stem's rate against the images a step."
    )


def _draw_rule(ax: Axes, cfg: TrainingConfig) -> None:
    """Square root and linear rule through the reference, the paper's two points, this recipe."""
    batches = np.geomspace(4, 256, 50)
    square_root, linear = (
        cfg.learning_rate * (batches / cfg.reference_batch) ** exponent for exponent in (0.5, 1)
    )
    ax.plot(batches, square_root, "-", color=style.BLUE, linewidth=1.6, label="square root rule")
    ax.plot(batches, linear, "--", color=style.FAINT, linewidth=1.6, label="linear rule")
    paper = "the paper's configurations"
    ax.plot(list(PAPER), list(PAPER.values()), "o", color=style.BLACK, label=paper)
    ring: dict[str, Any] = {"ms": 11, "mfc": "none", "mew": 1.8, "color": style.ORANGE}
    ax.plot([cfg.step_images], [scaled_rate(cfg)], "o", label="this one", **ring)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks([4, 16, 64, 256], ["4", "16", "64", "256"])
    style.add_legend(ax, loc="upper left")


# ------------------------------------------------------------------------------- what it costs


def show_forecast(found: Forecast) -> NotebookFigure:
    """Left: hours of the schedule at each share of the tokens. Right: what fits on which GPU.

    found: of `mimdet.training.plan.forecast`.
    """
    fig = style.new_figure(style.WIDTH, 3.2)
    title = f"{found.steps:,} steps of {found.step_images} images"
    left = style.axes_of(fig, 1, 2, title, "share of tokens kept", f"hours, {found.gpus} device(s)")
    hours = [found.hours(pace) for pace in found.paces]
    bars = left.bar([f"{pace.ratio:g}" for pace in found.paces], hours, color=style.BLUE, width=0.6)
    left.bar_label(bars, [f"{h:.3g}" for h in hours], fontsize=style.NORMAL, color=style.INK)
    right = style.axes_of(fig, 2, 2, "fits on a GPU", "memory, GB", "images of a micro-batch")
    places = np.arange(len(found.cards))
    for shift, name, colour in ((-0.2, "kept", style.BLUE), (0.2, "recomputed", style.SKY)):
        counts = [getattr(card, name) for card in found.cards]
        bars = right.bar(places + shift, counts, 0.4, color=colour, label=f"activations {name}")
        right.bar_label(bars, fontsize=style.NORMAL, color=style.INK)
    right.set_xticks(places, [str(card.gigabytes) for card in found.cards])
    right.axhline(found.batch_size, color=style.VERMILLION, linewidth=1.2, label="batch_size")
    style.add_legend(right, loc="upper left")
    said = ", ".join(
        f"{h:.3g} h at ratio {p.ratio:g}" for h, p in zip(hours, found.paces, strict=True)
    )
    fits = ", ".join(f"{card.kept} on {card.gigabytes} GB" for card in found.cards)
    return fig.finish(f"{found.preset}: {said}; images that fit, activations kept: {fits}.")


def show_profile(found: Profile) -> NotebookFigure:
    """Milliseconds of the parts of a step, with the share of the peak that each reaches.

    found: of `mimdet.training.profile.profile`.
    """
    fig = style.new_figure(style.WIDTH, 0.8 + 0.28 * len(found.parts))
    title = f"{found.preset}: a step of {found.images} images, {found.seconds:.3g} s"
    ax = style.axes_of(fig, 1, 1, title, "ms", "", "x")
    names = [part.name for part in found.parts]
    bars = ax.barh(names, [1000 * part.seconds for part in found.parts], color=style.BLUE)
    notes = [
        f"{100 * part.seconds / found.seconds:.0f} %"
        + (f", {100 * found.share_of_peak(part):.0f} % of the peak" if part.multiply_adds else "")
        for part in found.parts
    ]
    ax.bar_label(bars, notes, padding=3, fontsize=style.NORMAL, color=style.INK)
    ax.margins(x=0.2)
    ax.invert_yaxis()
    most = max(found.parts, key=lambda part: part.seconds)
    share = 100 * most.seconds / found.seconds
    return fig.finish(f"{title}; {most.name} takes most of it, {share:.0f} %.")
