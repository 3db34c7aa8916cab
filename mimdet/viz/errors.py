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
from torch import Tensor

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
    INK,
    LARGE,
    NORMAL,
    SERIES,
    SMALL,
    VERMILLION,
    WIDTH,
    NotebookFigure,
    add_legend,
    axes_of,
    new_figure,
    plain_axes,
    plural,
    write_beside,
    write_title,
)


def show_errors(reports: ErrorReport | Mapping[str, ErrorReport]) -> NotebookFigure:
    """dAP x 100 of the six types and of the two oracles, as bars; several reports side by side.

    reports: one, or {name: report}, at most six. Raises ValueError for none or more.
    """
    named = {"": reports} if isinstance(reports, ErrorReport) else dict(reports)
    if not 1 <= len(named) <= len(SERIES):
        raise ValueError(f"{len(named)} reports: give 1 to {len(SERIES)}")
    first = next(iter(named.values()))
    title = f"What each type of error costs at IoU {first.iou_threshold:g}"
    if len(named) == 1:
        title += f" (AP {100 * first.ap:.1f})"
    groups = list(first.dap), list(first.special)
    row = (0.26 if len(named) == 1 else 0.17) * len(named) + 0.13  # inches
    fig = new_figure(WIDTH, row * sum(map(len, groups)) + 1.1)
    grid = {"height_ratios": [len(names) for names in groups]}
    axes = fig.subplots(2, 1, sharex=True, gridspec_kw=grid)
    for ax, names in zip(axes, groups, strict=True):
        plain_axes(ax, lines="x")
        for number, (name, report) in enumerate(named.items()):
            _draw_bars(ax, report, names, number, len(named), f"{name}: AP {100 * report.ap:.1f}")
        ax.set_yticks(range(len(names)), [f"{name}\n{MEANINGS[name]}" for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
    lengths = [bar.get_width() for ax in axes for bar in ax.patches]
    axes[0].set_xlim(0, 1.25 * max(lengths) or 1.0)
    write_title(axes[0], title, LARGE)
    axes[1].set_xlabel("AP × 100 gained if fixed")
    if len(named) > 1:
        add_legend(axes[0], loc="lower right")
    said = "; ".join(f"{name} {_in_words(report)}".lstrip() for name, report in named.items())
    return fig.finish(f"What each type of error costs, AP × 100. {said}.")


def _in_words(report: ErrorReport) -> str:
    costs = (report.dap | report.special).items()
    said = ", ".join(f"{name} {100 * cost:.1f}" for name, cost in costs if not math.isnan(cost))
    return f"AP {100 * report.ap:.1f} at IoU {report.iou_threshold:g}: {said}"


def show_precision_recall(
    curves: Sequence[Curve], most_classes: int = 15, columns: int = 4
) -> NotebookFigure:
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
    rows = -(-len(shown) // columns)
    fig = new_figure(WIDTH, 0.6 + 1.85 * rows)
    first = None
    for place, (name, own) in enumerate(shown.items()):
        ax = fig.add_subplot(rows, columns, place + 1, sharex=first, sharey=first)
        y = "precision" if place % columns == 0 else ""
        x = "recall" if place + columns >= len(shown) else ""
        plain_axes(ax, name, x, y, lines="both")
        _draw_curves(ax, own, thresholds)
        ax.tick_params(labelbottom=bool(x), labelleft=bool(y))
        first = first or ax
    fig.axes[0].title.set_fontweight("bold")
    handles, labels = fig.axes[0].get_legend_handles_labels()
    add_legend(fig, handles=handles, loc="outside upper right", ncols=len(labels))
    few = len(shown) - 1
    note = f", the {few} classes of the lowest AP of {len(classes)}" if few < len(classes) else ""
    heading = f"Precision over recall, AP × 100{note}"
    fig.suptitle(heading, x=0.01, ha="left", fontsize=LARGE, color=INK)
    numbers = ", ".join(f"{100 * c.ap:.1f} at IoU {c.iou_threshold:g}" for c in mean)
    return fig.finish(f"Precision over recall, mean AP {numbers}.")


def show_comparison(comparison: RunComparison, count: int = 8) -> NotebookFigure:
    """Two runs image by image: AP of each image in both (left), the largest changes (right).

    count: images that gained most, and as many that lost most, on the right.
    """
    first, second = comparison.names
    images = comparison.images.dropna(subset="change")
    numbers = comparison.summary()
    fig = new_figure(WIDTH, 4.4)
    x, y = f"AP × 100 with {first}", f"AP × 100 with {second}"
    left = axes_of(fig, 1, 2, f"{numbers['images']} images", x, y, lines="both")
    left.plot([0, 100], [0, 100], color=FAINT, linewidth=0.8)
    change = images["change"]
    kinds = {
        "gained": (images[change > SAME], BLUE, "^"),
        "lost": (images[change < -SAME], VERMILLION, "v"),
        "same": (images[change.abs() <= SAME], FAINT, "o"),
    }
    for name, (rows, colour, marker) in kinds.items():
        style: dict[str, Any] = {"marker": marker, "s": 18, "alpha": 0.75, "linewidth": 0}
        label = f"{name}: {numbers[name]}"
        left.scatter(100 * rows["ap_1"], 100 * rows["ap_2"], color=colour, label=label, **style)
    left.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal")
    add_legend(left, loc="upper left", markerscale=1.4)
    gained, lost = comparison.gained(count), comparison.lost(count)
    title = f"the {plural(len(gained), 'largest gain')} and {plural(len(lost), 'loss', 'es')}"
    right = axes_of(fig, 2, 2, title, "change of the image's AP × 100", "", lines="")
    _draw_changes(right, [*gained.itertuples(), *reversed([*lost.itertuples()])])
    return fig.finish(
        f"From {first} to {second}, {numbers['gained']} of {numbers['images']} images gain AP, "
        f"{numbers['lost']} lose and {numbers['same']} keep theirs; the mean AP of an image goes "
        f"from {100 * numbers['mean_ap_1']:.1f} to {100 * numbers['mean_ap_2']:.1f}."
    )


# ------------------------------------------------------------------------------- parts


def _draw_bars(
    ax: Axes, report: ErrorReport, names: Sequence[str], number: int, of: int, label: str
) -> None:
    """Bars of report `number` of `of`, each with its value and the number of errors behind it."""
    thickness = 0.76 / of
    dap = report.dap | report.special
    values = [0.0 if math.isnan(dap[name]) else 100 * dap[name] for name in names]
    places = np.arange(len(names)) + (number - (of - 1) / 2) * thickness
    bars = ax.barh(places, values, height=0.9 * thickness, color=SERIES[number], label=label)
    counts = {name: f"  ({plural(count, 'error')})" for name, count in report.counts.items()}
    labels = [f"{v:.1f}{counts.get(n, '')}" for n, v in zip(names, values, strict=True)]
    beneath = {"facecolor": "white", "linewidth": 0, "pad": 1}  # no grid line through the text
    ax.bar_label(bars, labels, padding=4, fontsize=NORMAL, color=INK, bbox=beneath)


def _draw_curves(ax: Axes, curves: Sequence[Curve], thresholds: Sequence[float]) -> None:
    """A line per IoU threshold, the strictest darkest; their APs in the upper right corner."""
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    shades = mpl.colormaps["Blues"](np.linspace(0.45, 1.0, len(thresholds)))
    for curve in curves:
        shade, label = (
            shades[thresholds.index(curve.iou_threshold)],
            f"IoU {curve.iou_threshold:.2f}",
        )
        ax.plot(curve.recall, curve.precision, color=shade, lw=1.6, clip_on=False, label=label)
    aps = " · ".join(f"{100 * curve.ap:.0f}" for curve in curves)
    ax.set_title(f"AP {aps}", loc="right", fontsize=NORMAL, color=INK)


def _draw_changes(ax: Axes, rows: Sequence[Any]) -> None:
    """A bar per image, from its AP in the first run to that in the second."""
    ax.axvline(0, color=FAINT, linewidth=0.8)
    for place, row in enumerate(rows):
        ax.barh(place, 100 * row.change, height=0.7, color=BLUE if row.change > 0 else VERMILLION)
        found = f"{row.found_1} → {row.found_2} of {row.objects} found"
        write_beside(ax, found, (0, place), (-4 if row.change > 0 else 4, 0), fontsize=SMALL)
    largest = max((abs(100 * row.change) for row in rows), default=1.0)
    ax.set(xlim=(-1.1 * largest, 1.1 * largest), ylim=(len(rows) - 0.4, -0.6))
    ax.set_yticks(range(len(rows)), [f"image {row.image_id}" for row in rows])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


# ------------------------------------------------------------------------------- gallery

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
        _draw_said(said, error, record, window, dataset)
        _draw_truth(truth, error, record, window, dataset)
    kinds = sorted({error.kind for error in errors})
    fig.alt_text = (
        f"{len(errors)} cut-outs of images with errors of type {', '.join(kinds)}: the detection "
        "on the left, the true objects on the right."
    )
    return fig


def _said(error: DetectionError) -> str:
    if error.result is None:
        return "nothing points to it"
    return f"{error.said} {score_text(error.score)}"


def _truth(error: DetectionError) -> str:
    if error.kind == "missed":
        return f"truth: {error.true}"
    overlap = f"IoU {score_text(error.iou)}"
    if error.kind == "background":
        return f"no object, {overlap}" if error.iou > 0 else "no object"
    return f"found before, {overlap}" if error.kind == "duplicate" else f"{error.true}, {overlap}"


def _draw_said(
    ax: Axes, error: DetectionError, record: Record, window: Window, dataset: Dataset
) -> None:
    """The detection's mask and box in the colour of its class, or the place of a missed object, and
    the image's id in a corner."""
    size = record.image.shape[1:]
    if error.result is not None:
        box = torch.tensor([box_of(error.result, size)], dtype=torch.float32)
        label = torch.tensor([dataset.category_ids.index(error.result["category_id"])])
        found = Target(box, label, mask_of(error.result, size))
        _draw_window(ax, _said(error), record.image, found, window, [""])  # the title names it
    else:
        _draw_window(ax, _said(error), record.image, None, window)
        _draw_outline(ax, error.truth, size, window)
    corner: dict[str, Any] = {"transform": ax.transAxes, "fontsize": SMALL, "color": INK}
    white = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.5}
    ax.text(0.02, 0.02, f"image {error.image_id}", bbox=white, zorder=6, **corner)


def _draw_truth(
    ax: Axes, error: DetectionError, record: Record, window: Window, dataset: Dataset
) -> None:
    """The true objects in the window: thick the one it is about, dashed the detection."""
    _draw_window(ax, _truth(error), record.image, record.target, window, dataset.categories)
    size = record.image.shape[1:]
    if error.truth is not None:
        label = dataset.category_ids.index(error.truth["category_id"])
        _draw_outline(ax, error.truth, size, window, class_colour(label))
    if error.result is not None:
        _draw_outline(ax, error.result, size, window)


def _draw_window(
    ax: Axes,
    title: str,
    image: Tensor,
    objects: Target | None,
    window: Window,
    categories: Sequence[str] = (),
) -> None:
    """A cut-out of the image with the objects that reach into it."""
    x0, y0, x1, y1 = window
    draw_image(ax, image[:, y0:y1, x0:x1], title)
    if objects is None:
        return
    boxes, masks = objects.boxes, objects.masks
    near = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
    corner = torch.tensor([x0, y0, x0, y0])
    if masks is not None:
        masks = Crops(masks.boxes[near] - corner, masks.bitmaps[near])
    moved = Target(boxes[near] - corner, objects.labels[near], masks)
    draw_objects(ax, moved, (y1 - y0, x1 - x0), categories)


def _draw_outline(
    ax: Axes, entry: dict[str, Any] | None, size: Sequence[int], window: Window, colour: str = ""
) -> None:
    """The box of a result or annotation: thick in a colour, else dashed, black and white so that it
    is seen on any image."""
    left, top, right, bottom = box_of(entry or {}, size)
    corner, extent = (left - window[0], top - window[1]), (right - left, bottom - top)
    lines: list[dict[str, Any]] = [{"edgecolor": colour, "linewidth": 2.2}]
    if not colour:
        lines = [{"edgecolor": "black"}, {"edgecolor": "white", "linestyle": (0, (3, 3))}]
    for line in lines:
        ax.add_patch(Rectangle(corner, *extent, fill=False, **{"linewidth": 1.0} | line))


def _window(error: DetectionError, size: Sequence[int]) -> Window:
    """The square around the detection and the object it concerns, moved into the image; the whole
    of a side that is shorter."""
    height, width = size
    entries = [entry for entry in (error.result, error.truth) if entry is not None]
    boxes = torch.tensor([box_of(entry, size) for entry in entries])
    low, high = boxes[:, :2].min(0).values, boxes[:, 2:].max(0).values
    side = max(SMALLEST, round(CONTEXT * float((high - low).max())))
    spans = []
    for centre, pixels in zip(((low + high) / 2).tolist(), (width, height), strict=True):
        start = min(max(0, round(centre - side / 2)), max(0, pixels - side))
        spans.append((start, min(pixels, start + side)))
    (x0, x1), (y0, y1) = spans
    return x0, y0, x1, y1
