"""Figures of errors: what each type costs, precision over recall, the errors themselves, two runs.

Each function returns a new `NotebookFigure`; `mimdet.viz.style.save_figure` writes it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes

from mimdet.analysis.comparison import SAME, RunComparison
from mimdet.analysis.errors import MEANINGS, Curve, DetectionError, ErrorReport
from mimdet.data.loader import Dataset
from mimdet.structures import Crops, Record
from mimdet.viz import draw, style
from mimdet.viz.style import NotebookFigure, plural


def show_errors(reports: ErrorReport | Mapping[str, ErrorReport]) -> NotebookFigure:
    """dAP x 100 of the six types and of the two oracles, as bars; several reports side by side.

    reports: one, or {name: report}, at most six. Raises ValueError for none or more.
    """
    named = {"": reports} if isinstance(reports, ErrorReport) else dict(reports)
    if not 1 <= len(named) <= len(style.SERIES):
        raise ValueError(f"{len(named)} reports: give 1 to {len(style.SERIES)}")
    first = next(iter(named.values()))
    title = f"What each type of error costs at IoU {first.iou_threshold:g}"
    if len(named) == 1:
        title += f" (AP {100 * first.ap:.1f})"
    names = [*first.dap, *first.special]
    row = (0.26 if len(named) == 1 else 0.17) * len(named) + 0.13  # inches
    fig = style.new_figure(style.WIDTH, row * len(names) + 0.9)
    ax = style.axes_of(fig, 1, 1, title, "AP × 100 gained if fixed", "", lines="x")
    for number, (name, report) in enumerate(named.items()):
        _draw_bars(ax, report, number, len(named), f"{name}: AP {100 * report.ap:.1f}")
    ax.axhline(len(first.dap) - 0.5, color=style.FAINT, linewidth=0.8)
    ax.set_yticks(range(len(names)), [f"{name}\n{MEANINGS[name]}" for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 1.25 * ax.dataLim.x1 or 1.0)
    if len(named) > 1:
        style.add_legend(fig, loc="outside upper right", ncols=len(named))
    said = "; ".join(f"{name} {_in_words(report)}".lstrip() for name, report in named.items())
    return fig.finish(f"What each type of error costs, AP × 100. {said}.")


def _in_words(report: ErrorReport) -> str:
    costs = (report.dap | report.special).items()
    said = ", ".join(f"{name} {100 * cost:.1f}" for name, cost in costs if not math.isnan(cost))
    return f"AP {100 * report.ap:.1f} at IoU {report.iou_threshold:g}: {said}"


def show_precision_recall(curves: Sequence[Curve], most_classes: int = 15) -> NotebookFigure:
    """Precision over recall: a panel for the mean and one for each class, a line per IoU threshold.

    curves: of `ErrorReport.curves`. Classes come in the order of their AP, the worst first, and
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
    shown = {"mean": mean, **{name: panels[name] for name in classes[:most_classes]}}
    rows = -(-len(shown) // 4)
    fig = style.new_figure(style.WIDTH, 0.6 + 1.85 * rows)
    grid = fig.subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
    for ax in grid.flat[len(shown) :]:
        ax.remove()
    for place, (name, own) in enumerate(shown.items()):
        ax = grid.flat[place]
        below = place + 4 >= len(shown)
        style.plain_axes(
            ax, name, "recall" if below else "", "" if place % 4 else "precision", "both"
        )
        ax.tick_params(labelbottom=below)
        _draw_curves(ax, own, thresholds)
    fig.axes[0].title.set_fontweight("bold")
    handles, labels = fig.axes[0].get_legend_handles_labels()
    style.add_legend(fig, handles=handles, loc="outside upper right", ncols=len(labels))
    few = len(shown) - 1
    note = f", the {few} classes of the lowest AP of {len(classes)}" if few < len(classes) else ""
    heading = f"Precision over recall, AP × 100{note}"
    fig.suptitle(heading, x=0.01, ha="left", fontsize=style.LARGE, color=style.INK)
    numbers = ", ".join(f"{100 * c.ap:.1f} at IoU {c.iou_threshold:g}" for c in mean)
    return fig.finish(f"Precision over recall, mean AP {numbers}.")


def show_comparison(comparison: RunComparison, count: int = 8) -> NotebookFigure:
    """Two runs image by image: AP of each image in both (left), the largest changes (right).

    count: images that gained most, and as many that lost most, on the right.
    """
    first, second = comparison.names
    images = comparison.images.dropna(subset="change")
    numbers = comparison.summary()
    fig = style.new_figure(style.WIDTH, 4.4)
    x, y = f"AP × 100 with {first}", f"AP × 100 with {second}"
    left = style.axes_of(fig, 1, 2, f"{numbers['images']} images", x, y, lines="both")
    left.plot([0, 100], [0, 100], color=style.FAINT, linewidth=0.8)
    change = images["change"]
    kinds = {
        "gained": (change > SAME, style.BLUE, "^"),
        "lost": (change < -SAME, style.VERMILLION, "v"),
        "same": (change.abs() <= SAME, style.FAINT, "o"),
    }
    for name, (mine, colour, marker) in kinds.items():
        points = 100 * images.loc[mine, ["ap_1", "ap_2"]].to_numpy()
        label = f"{name}: {numbers[name]}"
        left.plot(*points.T, marker, color=colour, alpha=0.75, markersize=4, label=label)
    left.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal")
    style.add_legend(left, loc="upper left", markerscale=1.4)
    gained, lost = comparison.gained(count), comparison.lost(count)
    title = f"the {plural(len(gained), 'largest gain')} and {plural(len(lost), 'loss', 'es')}"
    right = style.axes_of(fig, 2, 2, title, "change of the image's AP × 100", "", lines="")
    _draw_changes(right, [*gained.itertuples(), *reversed([*lost.itertuples()])])
    means = " to ".join(f"{100 * numbers[mean]:.1f}" for mean in ("mean_ap_1", "mean_ap_2"))
    return fig.finish(
        f"AP of {numbers['images']} images with {first} and {second}: gained {numbers['gained']}, "
        f"lost {numbers['lost']}, same {numbers['same']}; on average {means}."
    )


# ------------------------------------------------------------------------------- parts


def _draw_bars(ax: Axes, report: ErrorReport, number: int, of: int, label: str) -> None:
    """Bars of report `number` of `of`, each with its value and the number of errors behind it."""
    thickness = 0.76 / of
    dap = report.dap | report.special
    values = 100 * np.nan_to_num([*dap.values()])
    places = np.arange(len(dap)) + (number - (of - 1) / 2) * thickness
    bars = ax.barh(places, values, height=0.9 * thickness, color=style.SERIES[number], label=label)
    counts = {name: f"  ({plural(count, 'error')})" for name, count in report.counts.items()}
    labels = [f"{v:.1f}{counts.get(n, '')}" for n, v in zip(dap, values, strict=True)]
    beneath = {"facecolor": "white", "linewidth": 0, "pad": 1}  # no grid line through the text
    ax.bar_label(bars, labels, padding=4, fontsize=style.NORMAL, color=style.INK, bbox=beneath)


def _draw_curves(ax: Axes, curves: Sequence[Curve], thresholds: Sequence[float]) -> None:
    """A line per IoU threshold, the strictest darkest; their APs in the upper right corner."""
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    shades = mpl.colormaps["Blues"](np.linspace(0.45, 1.0, len(thresholds)))
    for curve in curves:
        shade = shades[thresholds.index(curve.iou_threshold)]
        label = f"IoU {curve.iou_threshold:.2f}"
        ax.plot(curve.recall, curve.precision, color=shade, lw=1.6, clip_on=False, label=label)
    aps = " · ".join(f"{100 * curve.ap:.0f}" for curve in curves)
    ax.set_title(f"AP {aps}", loc="right", fontsize=style.NORMAL, color=style.INK)


def _draw_changes(ax: Axes, rows: Sequence[Any]) -> None:
    """A bar per image, from its AP in the first run to that in the second."""
    ax.axvline(0, color=style.FAINT, linewidth=0.8)
    for place, row in enumerate(rows):
        colour, side = (style.BLUE, -4) if row.change > 0 else (style.VERMILLION, 4)
        ax.barh(place, 100 * row.change, height=0.7, color=colour)
        found = f"{row.found_1} → {row.found_2} of {row.objects} found"
        style.write_beside(ax, found, (0, place), (side, 0), fontsize=style.SMALL)
    largest = max((abs(100 * row.change) for row in rows), default=1.0)
    ax.set(xlim=(-1.1 * largest, 1.1 * largest), ylim=(len(rows) - 0.4, -0.6))
    ax.set_yticks(range(len(rows)), [f"image {row.image_id}" for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


# ------------------------------------------------------------------------------- gallery

CONTEXT = 1.8
"""Side of a cut-out, in long sides of what it is about."""
SMALLEST = 32
"""Pixels of the smallest cut-out: fewer show nothing of the surroundings."""


def show_error_gallery(errors: Sequence[DetectionError], dataset: Dataset) -> NotebookFigure:
    """For each error what the detector said (left) and all true objects around it (right).

    errors: of `ErrorReport.errors`, as `report.errors("background")[:12]`; dataset: the images they
    were made on. Among the true objects the thick box is that of the object it concerns, the dashed
    one the detection's; a missed object's place is dashed on the left. Raises ValueError when there
    are no errors, or an image is not in the data set.
    """
    places = {dataset.image_id(index): index for index in range(len(dataset))}
    pictures = []
    for error in draw.few(errors):
        if error.image_id not in places:
            raise ValueError(
                f"image {error.image_id!r} is not in the data set {dataset.version}: give the one "
                "that the results were made on"
            )
        record = dataset[places[error.image_id]]
        size = draw.image_size(record.image)
        window = _window(error, size)
        place = draw.Mark(
            draw.box_of(error.result or error.truth or {}, size), "white", dashed=True
        )
        found = [place] if error.result is None else [_mark(error.result, dataset, size)]
        true = [] if error.result is None else [place]
        true += [] if error.truth is None else [_mark(error.truth, dataset, size, error.true)]
        for other in draw.marks_of(record.target, dataset.categories):
            true.append(replace(other, strong=error.truth is None))
        pictures.append(_cut_out(f"image {error.image_id}\n{_said(error)}", record, found, window))
        pictures.append(_cut_out(f"true objects\n{_truth(error)}", record, true, window))
    kinds = ", ".join(sorted({error.kind for error in errors}))
    what = f"Errors ({kinds}), the detection left, the true objects right"
    return draw.show_rows(what, pictures, columns=6, group=2)


def _mark(entry: dict[str, Any], dataset: Dataset, size: draw.Size, name: str = "") -> draw.Mark:
    """A result or annotation in the colour of its class."""
    colour = draw.class_colour(dataset.category_ids.index(entry["category_id"]))
    return draw.Mark(draw.box_of(entry, size), colour, name, draw.mask_of(entry, size))


def _said(error: DetectionError) -> str:
    found = f"{error.said} {draw.score_text(error.score)}"
    return "nothing points to it" if error.result is None else found


def _truth(error: DetectionError) -> str:
    kinds = {"background": "none", "duplicate": "found before"}
    said = kinds.get(error.kind, error.true)
    return said if error.result is None else f"{said}, IoU {draw.score_text(error.iou)}"


def _cut_out(
    title: str, record: Record, marks: Sequence[draw.Mark], window: draw.Box
) -> draw.Picture:
    """A window of the image with those of the marks that reach into it."""
    x0, y0, x1, y1 = map(int, window)
    corner = torch.tensor([x0, y0, x0, y0])
    moved = []
    for mark in marks:
        if draw.overlap(mark.box, window):
            box = (torch.tensor(mark.box) - corner).tolist()
            crop = mark.mask and Crops(mark.mask.boxes - corner, mark.mask.bitmaps)
            moved.append(replace(mark, box=box, mask=crop))
    return draw.Picture(title, draw.to_pixels(record.image[:, y0:y1, x0:x1]), moved)


def _window(error: DetectionError, size: draw.Size) -> draw.Box:
    """The square around the detection and the object it concerns, moved into the image; the whole
    of a side that is shorter. In whole pixels."""
    entries = [entry for entry in (error.result, error.truth) if entry is not None]
    boxes = np.array([draw.box_of(entry, size) for entry in entries])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = max(SMALLEST, round(CONTEXT * (high - low).max()))
    pixels = np.array(size[::-1])
    start = np.rint((low + high - side) / 2).clip(0, np.maximum(0, pixels - side))
    (x0, y0), (x1, y1) = start.tolist(), np.minimum(pixels, start + side).tolist()
    return x0, y0, x1, y1
