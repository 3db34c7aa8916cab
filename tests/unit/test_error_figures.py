"""Figures of errors: what is drawn and where, never pixels."""

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from mimdet.analysis.comparison import compare_runs
from mimdet.analysis.errors import ErrorReport, find_errors
from mimdet.analysis.matching import KINDS
from mimdet.data.shapes import ShapesCOCO
from mimdet.structures import bitmap_to_rle
from mimdet.viz import draw, show_comparison, show_error_gallery, show_errors, show_precision_recall

SIZE = 64


@pytest.fixture(scope="module")
def scenes() -> ShapesCOCO:
    return ShapesCOCO(size=SIZE, length=6, split="val")


@pytest.fixture(scope="module")
def results(scenes: ShapesCOCO) -> list[dict[str, Any]]:
    """The truth of the scenes with mistakes of all types: moved, called otherwise, said twice, left
    out, and one in an empty corner."""
    truth = scenes.ground_truth()
    found = []
    for number, entry in enumerate(truth["annotations"]):
        result = {key: entry[key] for key in ("image_id", "category_id", "bbox", "segmentation")}
        result["score"] = 1 - 0.01 * number
        other = (entry["category_id"] % len(scenes.categories)) + 1
        moved = {"bbox": [entry["bbox"][0] + 0.4 * entry["bbox"][2], *entry["bbox"][1:]]}
        mistakes: list[list[dict[str, Any]]] = [
            [result],
            [result, result | {"score": 0.01}],
            [result | {"category_id": other}],
            [result | moved],
            [result | moved | {"category_id": other}],
            [],
        ]
        found += mistakes[number % len(mistakes)]
    corner = np.zeros((SIZE, SIZE), dtype=bool)
    corner[:3, :3] = True
    nothing = {"bbox": [0, 0, 3, 3], "segmentation": bitmap_to_rle(corner), "score": 0.5}
    return [*found, nothing | {"image_id": scenes.image_id(0), "category_id": 1}]


@pytest.fixture(scope="module")
def report(scenes: ShapesCOCO, results: list[dict[str, Any]]) -> ErrorReport:
    report = find_errors(scenes.ground_truth(), results, "bbox", area_scale=scenes.area_scale)
    assert min(report.counts.values()) >= 1
    return report


def bars(ax: Axes, number: int = 0) -> list[float]:
    container = ax.containers[number]
    assert isinstance(container, BarContainer)
    return [bar.get_width() for bar in container]


def labels(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts if isinstance(text, Annotation)]


# ------------------------------------------------------------------------------- bars


def test_bars_are_as_long_as_the_costs(report: ErrorReport) -> None:
    fig = show_errors(report)
    (types,) = fig.axes
    costs = [*report.dap.values(), *report.special.values()]
    assert bars(types) == pytest.approx([100 * dap for dap in costs])
    assert types.get_xlim()[1] > max(bars(types))
    names = [text.get_text().splitlines()[0] for text in types.get_yticklabels()]
    assert names == [*KINDS, "false positives", "false negatives"]
    assert types.get_ylim()[0] > types.get_ylim()[1]  # the first type on top
    count = report.counts["missed"]
    assert labels(types)[5] == f"{100 * report.dap['missed']:.1f}  ({count} errors)"
    assert f"AP {100 * report.ap:.1f} at IoU 0.5" in fig.alt_text and not fig.legends


def test_two_reports_side_by_side(report: ErrorReport, scenes: ShapesCOCO) -> None:
    perfect = find_errors(scenes.ground_truth(), [], "bbox")
    fig = show_errors({"run": report, "nothing": perfect})
    assert bars(fig.axes[0], 0)[:6] == pytest.approx([100 * dap for dap in report.dap.values()])
    assert bars(fig.axes[0], 1)[:6] == pytest.approx([0, 0, 0, 0, 0, 100])
    (legend,) = fig.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [f"run: AP {100 * report.ap:.1f}", "nothing: AP 0.0"]
    first, second = (container[0] for container in fig.axes[0].containers)
    assert first.get_facecolor() != second.get_facecolor()
    assert first.get_y() + first.get_height() <= second.get_y() + 1e-9  # they do not overlap


def test_too_many_reports_are_refused_and_one_without_objects_is_drawn(report: ErrorReport) -> None:
    with pytest.raises(ValueError, match="7 reports: give 1 to 6"):
        show_errors({str(number): report for number in range(7)})
    with pytest.raises(ValueError, match="0 reports"):
        show_errors({})
    with pytest.raises(ValueError, match="no curves to show"):
        show_precision_recall([])
    few = show_precision_recall(report.curves(), most_classes=2)
    assert len(few.axes) == 3 and "the 2 classes of the lowest AP of" in few.get_suptitle()
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    empty = find_errors(truth, [], "bbox")
    assert bars(show_errors(empty).axes[0]) == [0] * 8
    show_precision_recall(empty.curves()).canvas.draw()
    comparison = compare_runs(truth, {"a": [], "b": []}, "bbox")
    show_comparison(comparison).canvas.draw()


# ------------------------------------------------------------------------------- curves


def test_a_panel_per_class_and_a_line_per_threshold(report: ErrorReport) -> None:
    curves = report.curves((0.75, 0.5))
    fig = show_precision_recall(curves)
    known = [c for c in curves if not math.isnan(c.ap)]
    assert len(fig.axes) == len({c.category for c in known})
    assert fig.axes[0].get_title("left") == "mean"
    (strict, *_), (loose, *_) = (
        [c for c in known if c.iou_threshold == threshold] for threshold in (0.75, 0.5)
    )
    lines = fig.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["IoU 0.50", "IoU 0.75"]
    np.testing.assert_array_equal(lines[0].get_ydata(), loose.precision)
    np.testing.assert_array_equal(lines[1].get_ydata(), strict.precision)
    aps = f"AP {100 * loose.ap:.0f} · {100 * strict.ap:.0f}"
    assert fig.axes[0].get_title("right") == aps
    sums = [sum(c.ap for c in known if c.category == ax.get_title("left")) for ax in fig.axes[1:]]
    assert sums == sorted(sums)  # the worst class first


# ------------------------------------------------------------------------------- gallery


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_its_detection_and_its_truth(kind, report, scenes, monkeypatch) -> None:
    """The dashed box is the detection's (or a missed object's own), the thick one its truth's."""
    drawn: list[Any] = []
    monkeypatch.setattr(draw, "with_marks", lambda pixels, marks, *_: drawn.append(marks) or pixels)
    errors = report.errors(kind)[:4]
    fig = show_error_gallery(errors, scenes)
    assert len(fig.axes) == 2 * len(errors)
    for i, error in enumerate(errors):
        said, truth = fig.axes[2 * i].get_title("left"), fig.axes[2 * i + 1].get_title("left")
        missed = error.result is None
        score = f"{error.score:.2f}".removeprefix("0")
        words = "nothing points to it" if missed else f"{error.said} {score}"
        assert said == f"image {error.image_id}\n{words}"
        assert error.true in truth or kind == "duplicate"
        assert ("IoU" in truth) == (not missed), "nothing has no overlap"
        (dashed,) = (mark for mark in drawn[2 * i + (not missed)] if mark.dashed)
        assert extent(dashed) == pytest.approx(
            ((error.truth if missed else error.result) or {})["bbox"][2:]
        )
        assert missed or extent(drawn[2 * i][0]) == pytest.approx(extent(dashed))
        thick = [mark for mark in drawn[2 * i + 1] if mark.strong and not mark.dashed]
        if error.truth is not None:
            assert [extent(mark) for mark in thick] == [pytest.approx(error.truth["bbox"][2:])]
            assert missed or offset(dashed, thick[0]) == pytest.approx(
                [a - b for a, b in zip(error.result["bbox"], error.truth["bbox"], strict=True)][:2]
            )
    assert kind in fig.alt_text


def extent(mark: Any) -> list[float]:
    return [mark.box[2] - mark.box[0], mark.box[3] - mark.box[1]]


def offset(a: Any, b: Any) -> list[float]:
    return [a.box[0] - b.box[0], a.box[1] - b.box[1]]


def test_results_without_boxes_and_with_empty_masks(scenes, results, report: ErrorReport) -> None:
    empty = bitmap_to_rle(np.zeros((SIZE, SIZE), dtype=bool))
    said = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    said.append(said[0] | {"segmentation": empty, "score": 0.99})
    report = find_errors(scenes.ground_truth(), said, "segm")
    kinds = [kind for kind in KINDS if report.counts[kind]]
    assert {"classification", "background", "missed"} <= set(kinds)
    assert report.errors("background")[0].result is said[-1]
    for kind in kinds:
        show_error_gallery(report.errors(kind)[:2], scenes).canvas.draw()
    # Galleries that cannot be drawn.
    with pytest.raises(ValueError, match="nothing to show"):
        show_error_gallery([], scenes)
    fewer = ShapesCOCO(size=SIZE, length=1, split="val")
    with pytest.raises(ValueError, match=r"image \d is not in the data set shapes-v1-medium@64"):
        show_error_gallery(report.errors("missed"), fewer)


# ------------------------------------------------------------------------------- comparison


def test_two_runs(scenes: ShapesCOCO, results: list[dict[str, Any]]) -> None:
    first = scenes.image_id(0)
    worse = [r | {"score": 1 - r["score"]} for r in results if r["image_id"] != first]
    comparison = compare_runs(scenes.ground_truth(), {"a": results, "b": worse}, "bbox")
    numbers = comparison.summary()
    assert numbers["lost"] >= 2
    fig = show_comparison(comparison, count=2)
    left, right = fig.axes
    assert left.get_xlabel() == "AP × 100 with a" and left.get_ylabel() == "AP × 100 with b"
    drawn = [len(points.get_xdata()) for points in left.lines[1:]]
    assert drawn == [numbers["gained"], numbers["lost"], numbers["same"]]
    (largest,) = comparison.lost(1).itertuples()
    names = [text.get_text() for text in right.get_yticklabels()]
    assert names[-1] == f"image {largest.image_id}"  # the largest loss at the bottom
    lengths = [bar.get_width() for bar in right.patches if isinstance(bar, Rectangle)]
    assert lengths[-1] == pytest.approx(100 * largest.change)
    assert f"lost {numbers['lost']}" in fig.alt_text
