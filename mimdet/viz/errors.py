"""Figures of errors: what each type costs, precision over recall, the errors themselves, two runs.

Each function returns a new `NotebookFigure`; `mimdet.viz.style.save_figure` writes it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from mimdet.analysis.comparison import SAME, RunComparison
from mimdet.analysis.errors import MEANINGS, Curve, DetectionError, ErrorReport
from mimdet.data.loader import Dataset
from mimdet.structures import Crops, Record, Target
from mimdet.viz.draw import (
    box_of,
    class_colour,
    draw_image,
    draw_objects,
    image_panels,
    mask_of,
    score_text,
)
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


def show_precision_recall(
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


Window = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels, right and bottom exclusive."""

CONTEXT = 1.8
"""Side of a cut-out, in long sides of what it is about."""
SMALLEST = 32
"""Pixels of the smallest cut-out: fewer show nothing of the surroundings."""


def show_error_gallery(
    errors: Sequence[DetectionError], dataset: Dataset, columns: int = 6
) -> NotebookFigure:
    """For each error what the detector said (left) and all true objects around it (right).

    errors: of `ErrorReport.errors`, as `report.errors("background")[:12]`; dataset: the images they
    were made on; columns: panels in a row, two for each error. Among the true objects the dashed
    box is the detection's, the thick one that of the object it concerns; a missed object's place is
    dashed on the left. Raises ValueError when there are no errors, or an image is not in the data
    set.
    """
    if not errors:
        raise ValueError("no errors to show: this type has none, or the list was cut to nothing")
    places = {dataset.image_id(index): index for index in range(len(dataset))}
    unknown = [error.image_id for error in errors if error.image_id not in places]
    if unknown:
        raise ValueError(
            f"image {unknown[0]!r} is not in the data set {dataset.version}: give the one that the "
            "results were made on"
        )
    records = [dataset[places[error.image_id]] for error in errors]
    windows = [_window(e, r.image.shape[1:]) for e, r in zip(errors, records, strict=True)]
    sizes = [(y1 - y0, x1 - x0) for x0, y0, x1, y1 in windows for _ in range(2)]
    fig, axes = image_panels(sizes, columns, group=2)
    pairs = zip(axes[::2], axes[1::2], strict=True)
    for error, record, window, (said, truth) in zip(errors, records, windows, pairs, strict=True):
        x0, y0, x1, y1 = window
        pixels = record.image[:, y0:y1, x0:x1]
        draw_image(said, pixels, _said(error))
        draw_image(truth, pixels, _truth(error))
        _draw_detection(said, error, window, dataset, record)
        _draw_truth(truth, error, window, dataset, record)
    kinds = sorted({error.kind for error in errors})
    said_of_first = f"{_said(errors[0])} in image {errors[0].image_id}, {_truth(errors[0])}"
    fig.alt_text = (
        f"{len(errors)} cut-outs of images with errors of type {', '.join(kinds)}: the detection "
        f"on the left, the true objects on the right. The first: {said_of_first}."
    )
    return fig


def _said(error: DetectionError) -> str:
    return (
        "nothing points to it"
        if error.result is None
        else f"{error.said} {score_text(error.score)}"
    )


def _truth(error: DetectionError) -> str:
    if error.kind == "missed":
        return f"truth: {error.true}"
    overlap = f"IoU {score_text(error.iou)}"
    if error.kind == "background":
        return f"no object, {overlap}" if error.iou > 0 else "no object"
    return f"found before, {overlap}" if error.kind == "duplicate" else f"{error.true}, {overlap}"


def _draw_detection(
    ax: Axes, error: DetectionError, window: Window, dataset: Dataset, record: Record
) -> None:
    """Its mask and box in the colour of its class, or the place of a missed object, and the image's
    id in a corner."""
    height, width = record.image.shape[1:]
    if error.result is not None:
        box = torch.tensor([box_of(error.result, (height, width))], dtype=torch.float32)
        label = dataset.category_ids.index(error.result["category_id"])
        masks = mask_of(error.result, (height, width))
        found = Target(box, torch.tensor([label]), masks)
        draw_objects(ax, _shifted(found, window), _size(window), [""])  # the title names it
    elif error.truth is not None:
        _draw_dashed(ax, error.truth, (height, width), window)
    ax.text(
        0.02,
        0.02,
        f"image {error.image_id}",
        transform=ax.transAxes,
        fontsize=SMALL,
        color=INK,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.5},
        zorder=6,
    )


def _draw_truth(
    ax: Axes, error: DetectionError, window: Window, dataset: Dataset, record: Record
) -> None:
    """The true objects in the window: thick the one it is about, dashed the detection."""
    x0, y0, x1, y1 = window
    target, boxes = record.target, record.target.boxes
    seen = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    masks = None if target.masks is None else target.masks[seen]
    around = Target(boxes[seen], target.labels[seen], masks)
    draw_objects(ax, _shifted(around, window), _size(window), dataset.categories)
    size = record.image.shape[1:]
    if error.truth is not None:
        label = dataset.category_ids.index(error.truth["category_id"])
        outline = _outline(error.truth, size, window)
        outline.set(edgecolor=class_colour(label), linewidth=2.2)
        ax.add_patch(outline)
    if error.result is not None:
        _draw_dashed(ax, error.result, size, window)


def _draw_dashed(
    ax: Axes, entry: dict[str, Any], image_size: Sequence[int], window: Window
) -> None:
    """The box of a result or annotation, black and white so that it is seen on any image."""
    solid, dashed = (_outline(entry, image_size, window) for _ in range(2))
    solid.set_edgecolor("black")
    dashed.set_edgecolor("white")
    dashed.set_linestyle((0, (3, 3)))
    ax.add_patch(solid)
    ax.add_patch(dashed)


def _outline(entry: dict[str, Any], image_size: Sequence[int], window: Window) -> Rectangle:
    left, top, right, bottom = box_of(entry, image_size)
    corner = (left - window[0], top - window[1])
    return Rectangle(corner, right - left, bottom - top, fill=False, linewidth=1.0)


def _window(error: DetectionError, image_size: Sequence[int]) -> Window:
    """The square around the detection and the object it concerns, moved into the image; the whole
    of a side that is shorter."""
    height, width = image_size
    entries = [entry for entry in (error.result, error.truth) if entry is not None]
    boxes = torch.tensor([box_of(entry, image_size) for entry in entries])
    low, high = boxes[:, :2].min(0).values, boxes[:, 2:].max(0).values
    side = max(SMALLEST, round(CONTEXT * float((high - low).max())))
    spans = []
    for centre, pixels in zip(((low + high) / 2).tolist(), (width, height), strict=True):
        start = min(max(0, round(centre - side / 2)), max(0, pixels - side))
        spans.append((start, min(pixels, start + side)))
    (x0, x1), (y0, y1) = spans
    return x0, y0, x1, y1


def _shifted(target: Target, window: Window) -> Target:
    """The target in the pixels of a window of its image."""
    corner = torch.tensor([window[0], window[1]] * 2)
    masks = target.masks
    if masks is not None:
        masks = Crops(masks.boxes - corner, masks.bitmaps)
    return Target(target.boxes - corner, target.labels, masks)


def _size(window: Window) -> tuple[int, int]:
    return window[3] - window[1], window[2] - window[0]
