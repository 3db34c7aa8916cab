"""Types and prices of errors: by hand, by plain loops, by editing the files, and by tidecv."""

import copy
import itertools
import json
import math
import sys
import types
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mimdet.analysis import errors
from mimdet.analysis.errors import ErrorReport, find_errors
from mimdet.analysis.matching import KINDS, VERDICTS, Kind, are
from mimdet.analysis.metrics import IouType, coco_metrics
from mimdet.structures import bitmap_to_rle
from tests.unit.test_metrics import found, random_case, rectangle, truth_of

IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")
FALSE_POSITIVES = [kind for kind in KINDS if kind != "missed"]


def of(kind: int, shape: dict[str, Any]) -> dict[str, Any]:
    """The shape as an object of category 1, 2, ..."""
    return shape | {"category_id": kind}


def check(
    truth: dict[str, Any],
    results: list[dict[str, Any]],
    ap: float,
    oracles: tuple[float, float] | None = None,
    **errors: tuple[int, float],
) -> ErrorReport:
    """AP; what it gains without false positives and without false negatives; and for each type that
    is named (errors, dAP), where every other type has none. Of boxes and of masks, the report of
    which is returned."""
    for iou_type in IOU_TYPES:
        report = find_errors(truth, results, iou_type)
        assert report.ap == pytest.approx(ap)
        assert report.counts == {kind: errors.get(kind, (0, 0.0))[0] for kind in KINDS}
        dap = {kind: errors.get(kind, (0, 0.0))[1] for kind in KINDS}
        assert report.dap == pytest.approx(dap, abs=1e-12)
        assert report.progressive["missed"] == pytest.approx(1)
        if oracles is not None:
            assert tuple(report.special.values()) == pytest.approx(oracles)
    return report


# --- by hand ------------------------------------------------------------------------------------
# A is the box 10 10 40 40; LEFT, half of it, has IoU 1/2 with A, STRIP, a tenth, 1/10, and PART,
# 16 of its 40 columns, 0.4. B lies apart from A. All are filled rectangles, so the IoU of masks is
# that of boxes. AP = precision summed over the 101 recall levels / 101; half of the objects found
# reaches levels 0, .01, ..., .50: 51 of them.

A, B, C = rectangle(10, 10, 40, 40), rectangle(100, 10, 40, 40), rectangle(10, 100, 40, 40)
LEFT, PART, STRIP = rectangle(10, 10, 20, 40), rectangle(10, 10, 16, 40), rectangle(10, 10, 4, 40)
NOTHING = rectangle(150, 150, 30, 30)


def test_one_object_is_repaired_once() -> None:
    """B, of kind 2, is called kind 1 (.9) and kind 3 (.8), and found too small as kind 2 (.7).

    Kinds: 1 has A, found (.95): AP 1; 2: AP 0; 3 has C, found (.6) after the wrong one: AP 1/2.
    Mean 1/2. Fixing classification makes .9 a correct one of kind 2, ahead of the wrong .7, and
    removes .8: all AP 1, dAP 1/2. Fixing localisation corrects nothing, as .9 would be B's better
    detection, but removes .7: kind 2 stays 0.
    """
    truth = truth_of(A, of(2, B), of(3, C), categories=3)
    small_b = rectangle(100, 10, 16, 40)
    results = [found(0.95, A), found(0.9, B), found(0.8, of(3, B)), found(0.7, of(2, small_b))]
    results.append(found(0.6, of(3, C)))
    check(truth, results, 1 / 2, (1 / 6, 0), classification=(2, 1 / 2), localisation=(1, 0))


def test_crowds_forgive_their_own_class() -> None:
    """Detections inside a crowd are neither right nor wrong; of another class they are wrong. A
    crowd is never missed, and nothing is repaired with it. A real object comes before its crowd."""
    truth = truth_of(A, of(2, B), NOTHING | {"iscrowd": 1}, categories=2)
    inside = rectangle(155, 155, 10, 10)
    results = [found(0.9, inside), found(0.8, of(2, inside)), found(0.7, A), found(0.6, of(2, B))]
    report = check(truth, results, 3 / 4, background=(1, 1 / 4))
    assert (report.ignored, report.correct, report.objects) == (1, 2, 2)
    crowd = rectangle(0, 0, 90, 90) | {"iscrowd": 1}
    report = check(truth_of(crowd, A), [found(0.9, A), found(0.8, PART)], 1)
    assert (report.ignored, report.correct, report.objects) == (1, 1, 1)


def test_all_types_in_one_class() -> None:
    """Kind 1 has A, B and C, kind 2 has D; detections of kind 1 in order of score:

    1. NOTHING: background   2. A: right   3. D: classification   4. A again: duplicate
    5. PART of D: both       6. PART of B: localisation           (C is missed; D by kind 2)

    Kind 1 is right at place 2 of 6: precision 1/2 up to recall 1/3, levels 0..33: AP 34/202.
    Kind 2: AP 0. Mean 17/202. Of the fixes
    background:     right first: precision 1: kind 1 34/101, mean + 17/202
    classification: kind 1 the same, kind 2 has D: AP 1, mean + 1/2
    localisation:   B right at place 6, recall 2/3 with precision 2/6: levels 34..66: + 33/3/101,
                    mean + 11/202
    duplicate, both: kind 1 the same (nothing right after place 2): 0
    missed:         C not asked for: recall 1/2 with precision 1/2, levels 0..50: 51/202 instead of
                    34/202, mean + 17/404
    false positives: 34/101, mean + 17/202
    false negatives: kind 1 asks for A alone, precision 1/2 at recall 1: 1/2; kind 2 asks for
                    nothing and claims nothing: 1. Mean 3/4
    """
    d = rectangle(100, 100, 40, 40)
    truth = truth_of(A, B, C, of(2, d), categories=2)
    shapes = [NOTHING, A, d, A, rectangle(100, 100, 16, 40), rectangle(100, 10, 16, 40)]
    results = [found(0.9 - 0.1 * i, shape) for i, shape in enumerate(shapes)]
    report = check(
        truth,
        results,
        17 / 202,
        (17 / 202, 3 / 4 - 17 / 202),
        background=(1, 17 / 202),
        classification=(1, 1 / 2),
        localisation=(1, 11 / 202),
        duplicate=(1, 0),
        both=(1, 0),
        missed=(1, 17 / 404),
    )
    # One after the other: kind 1 is wrong, right, wrong, wrong, wrong for classification (the
    # removed one is later); then B is right at place 5 (2/5); places 4 and 3 go (2/3 of recall
    # at 2/4, then 2/3); then the first (2/2), and at last C is not asked for.
    kind_1 = [34 / 202, (17 + 33 * 2 / 5) / 101, (17 + 33 / 2) / 101]
    kind_1 += [67 * 2 / 3 / 101, 67 / 101, 1]
    assert list(report.progressive) == list(KINDS)
    assert list(report.progressive.values()) == pytest.approx([(ap + 1) / 2 for ap in kind_1])


@pytest.mark.parametrize(
    ("objects", "said", "options", "expected"),
    [
        ([A], [LEFT], {}, {"correct": 1}),  # IoU 1/2 is a match
        # of an object already found it is a wrong place, as in tidecv, not a duplicate; so is 1/10
        ([A], [A, LEFT, STRIP], {}, {"correct": 1, "localisation": 2}),
        # of another class 1/2 is a wrong class, 1/10 background
        ([A], [of(2, LEFT), of(2, STRIP)], {}, {"classification": 1, "background": 1}),
        ([A], [PART], {"iou_threshold": 0.4}, {"correct": 1}),
        ([A], [PART], {"background_threshold": 0.45}, {"background": 1, "missed": 1}),
        # IoU .4 with the own class and 1 with another is a wrong place
        ([A, of(2, PART)], [PART], {}, {"localisation": 1, "missed": 1}),
        # the best hundred of an image and class count
        ([A, of(2, B)], [A, *[NOTHING] * 101, of(2, B)], {}, {"correct": 2, "background": 99}),
    ],
)
def test_thresholds_belong_to_a_type(objects, said, options, expected) -> None:
    results = [found(0.9 - 0.001 * i, shape) for i, shape in enumerate(said)]
    report = find_errors(truth_of(*objects, categories=2), results, **options)
    counts = {"correct": report.correct, **report.counts}
    assert {kind: count for kind, count in counts.items() if count} == expected
    assert report.left_out == max(0, len(said) - 101)


def test_classes_without_objects_cost_nothing() -> None:
    truth = truth_of(A, categories=2)
    report = check(truth, [found(0.9, A), found(0.8, of(2, NOTHING))], 1, background=(1, 0))
    row = report.by_class().loc["kind 2"]
    assert row["errors_background"] == 1 and math.isnan(row["ap"])
    assert math.isnan(row["dap_background"])


def test_ties_and_recall_levels_are_those_of_coco() -> None:
    """Of objects overlapped equally the later is taken, so that the second detection, which only
    meets that one, is a duplicate. 7 of 20 objects: recall .35 is a rounding error below COCO's
    level, so 35 count, not 36."""
    truth = truth_of(rectangle(0, 0, 30, 20), rectangle(10, 0, 30, 20))
    results = [found(0.9, rectangle(5, 0, 30, 20)), found(0.8, rectangle(18, 0, 26, 20))]
    report = find_errors(truth, results)
    assert (report.correct, report.counts["duplicate"]) == (1, 1)
    assert report.ap == pytest.approx(ap50(truth, results, "segm"))
    squares = [rectangle(12 * i, 12 * j, 10, 10) for i in range(5) for j in range(4)]
    truth, results = truth_of(*squares), [found(0.9, square) for square in squares[:7]]
    for ap in (find_errors(truth, results).ap, ap50(truth, results, "segm")):
        assert ap == pytest.approx(35 / 101)


def test_nothing_found_and_nothing_to_find() -> None:
    check(truth_of(A, B), [], 0, missed=(2, 1))
    for truth in (truth_of(images=2), truth_of(images=2, categories=0)):
        report = find_errors(truth, [])
        assert math.isnan(report.ap) and set(report.counts.values()) == {0}
        assert all(math.isnan(dap) for dap in report.dap.values())
        assert len(report.by_class()) == len(truth["categories"])
        assert len(report.by_size()) == 3 and len(report.confusions()) == 0
        assert len(report.table().splitlines()) == 10
        assert math.isnan(report.curves()[0].ap)
        json.dumps(report.to_dict(), allow_nan=False)
    report = find_errors(truth_of(images=0), [])
    assert math.isnan(report.ap)


# --- single errors and tables -------------------------------------------------------------------


def two_kinds() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Two images: in the first, A of kind 1 and B of kind 2, called each other's kind; in the
    second a small missed object and two false alarms."""
    small, large = rectangle(50, 50, 9, 9), rectangle(10, 80, 100, 100)
    truth = truth_of(A, of(2, B), small | {"image_id": 2}, images=2, categories=2)
    in_second = [found(0.3, of(2, NOTHING), image_id=2), found(0.6, large, image_id=2)]
    return truth, [found(0.7, of(2, A)), found(0.8, B), *in_second]


def test_single_errors_have_names() -> None:
    truth, results = two_kinds()
    report = find_errors(truth, results)
    first, second = report.errors("classification")
    assert (first.kind, first.image_id, first.score, first.iou) == ("classification", 1, 0.8, 1.0)
    assert (first.said, first.true) == (second.true, second.said) == ("kind 1", "kind 2")
    assert first.result is results[1] and first.truth is truth["annotations"][1]
    false = report.errors("background")
    assert [(e.score, e.image_id) for e in false] == [(0.6, 2), (0.3, 2)]
    assert false[0].true == "" and false[0].truth is None and false[0].iou == 0
    (missed,) = report.errors("missed")
    assert missed.result is None and missed.truth is truth["annotations"][2]
    assert (missed.said, missed.true, missed.image_id) == ("", "kind 1", 2)
    assert math.isnan(missed.score) and math.isnan(missed.iou)
    assert report.errors("classification", said="kind 2") == [second]
    assert report.errors("classification", true="kind 2") == [first]
    assert report.errors("background", true="kind 2") == []
    shapes = [A, A, of(2, PART), PART, of(2, rectangle(10, 10, 2, 40))]
    results = [found(0.9 - 0.1 * i, shape) for i, shape in enumerate(shapes)]
    report = find_errors(truth_of(A, of(2, B), categories=2), results)
    expected = {"duplicate": 1, "both": 0.4, "localisation": 0.4, "background": 0.05}
    assert {k: e.iou for k in expected for e in report.errors(k)} == pytest.approx(expected)


def test_by_class_by_size_and_by_pair_of_classes() -> None:
    """Kind 1: A and the small one, wrong (.8), wrong (.6): AP 0; fixed, A is right at place 1 of 2
    (the first wrong one has left): half of the objects, 51/101. Kind 2: AP 0, fixed B is right at
    place 1: AP 1. A and B (1600 px) are medium, the missed one (81 px) small, the false alarms of
    900 and 10000 px small and large.
    """
    classes = find_errors(*two_kinds()).by_class()
    assert list(classes.index) == ["kind 1", "kind 2"]
    assert list(classes["dap_classification"]) == pytest.approx([51 / 101, 1])
    expected = {"objects": [2, 1], "ap": [0, 0], "errors_classification": [1, 1]}
    expected |= {"errors_background": [1, 1], "errors_missed": [1, 0], "dap_missed": [0, 0]}
    assert classes[list(expected)].to_dict("list") == expected
    sizes = find_errors(*two_kinds()).by_size()
    assert list(sizes.index) == ["small", "medium", "large"]
    expected = {"objects": [1, 2, 0], "errors_classification": [0, 2, 0]}
    expected |= {"errors_background": [1, 0, 1], "errors_missed": [1, 0, 0]}
    assert sizes[list(expected)].to_dict("list") == expected
    dap = (51 / 101 + 1) / 2
    assert list(sizes["dap_classification"]) == pytest.approx([0, dap, 0])
    scaled = find_errors(*two_kinds(), area_scale=4.0)
    assert list(scaled.by_size()["errors_classification"]) == [2, 0, 0]
    assert scaled.area_ranges["small"] == (0, 4096)
    results = [found(0.9, of(2, A)), found(0.8, of(2, B)), found(0.7, C)]
    table = find_errors(truth_of(A, B, of(2, C), categories=2), results).confusions()
    assert table.values.tolist() == [["kind 2", "kind 1", 2], ["kind 1", "kind 2", 1]]


def test_the_best_score_to_cut_at() -> None:
    """Four objects of kind 1; right .9 .8, wrong .7, right .6, wrong .5. F1 = 2 found / (claimed +
    objects): 2/5, 4/6, 4/7, 6/8, 6/9. Kind 2 is never found."""
    four = [A, B, C, rectangle(100, 100, 40, 40)]
    truth = truth_of(*four, of(2, rectangle(60, 60, 20, 20)), categories=2)
    wrong = rectangle(160, 160, 30, 30)
    results = [found(0.9, A), found(0.8, B), found(0.7, NOTHING), found(0.6, C), found(0.5, wrong)]
    best = find_errors(truth, results).thresholds()
    assert best.to_dict("index") == {
        "kind 1": {"score": 0.6, "precision": 0.75, "recall": 0.75, "f1": 0.75}
    }
    results[4]["score"] = 0.6  # passes together with the right one: 6/9 at both, as 4/6 before
    best = find_errors(truth, results).thresholds()
    assert best.loc["kind 1"].tolist() == pytest.approx([0.8, 1, 0.5, 2 / 3])
    assert len(find_errors(truth, []).thresholds()) == 0


def test_worst_images_and_what_may_be_wrong_with_the_truth() -> None:
    """Image 1: two objects, one found, one nothing points to; image 2: an object that is found, a
    sure false alarm, and one below the threshold; image 3: an object called kind 2."""
    third = {"image_id": 3}
    truth = truth_of(A, B, A | {"image_id": 2}, A | third, of(2, C), images=4, categories=2)
    results = [
        found(0.9, A),
        found(0.7, A, image_id=2),
        found(0.8, NOTHING, image_id=2),
        found(0.2, C, image_id=2),
        found(0.6, of(2, C)),
        found(0.9, of(2, A), image_id=3),
    ]
    report = find_errors(truth, results)
    assert report.thresholds()["score"].tolist() == [0.7, 0.6]
    worst = report.worst_images().to_dict("list")
    assert worst["image_id"] == [3, 1, 2]
    assert (worst["missed"], worst["wrong"]) == ([1, 1, 0], [1, 0, 1])
    assert worst["objects"] == [1, 3, 1]
    assert len(report.worst_images(1)) == 1
    faults = report.label_faults()
    assert {doubt: [error.image_id for error in errors] for doubt, errors in faults.items()} == {
        "not annotated?": [2],
        "another class?": [3],
        "no object?": [1],
    }
    assert faults["not annotated?"][0].score == 0.8 and faults["another class?"][0].said == "kind 2"
    assert report.label_faults(0)["no object?"] == []


def test_size_of_an_error_is_its_objects_where_the_fix_needs_one() -> None:
    """PART of A, 640 px, is a small detection of a medium object, as IoU .4 needs; NOTHING and a
    thin mask in a large box are what they are. Of one object of each size the medium one is found:
    recall 1/3, 34 levels; without one of the missed ones recall is 1/2, 51 levels."""
    table = find_errors(truth_of(A, B), [found(0.9, A), found(0.8, PART), found(0.7, NOTHING)])
    assert list(table.by_size()["errors_localisation"]) == [0, 1, 0]
    assert list(table.by_size()["errors_background"]) == [1, 0, 0]
    thin = rectangle(100, 100, 8, 40) | {"bbox": [100, 100, 40, 40]}
    for iou_type, size in (("segm", "small"), ("bbox", "medium")):
        by_size = find_errors(truth_of(A), [found(0.9, thin)], iou_type).by_size()
        assert by_size.loc[size, "errors_background"] == 1
    truth = truth_of(rectangle(0, 0, 9, 9), A, rectangle(60, 60, 100, 100))
    by_size = find_errors(truth, [found(0.9, A)]).by_size()
    assert list(by_size["errors_missed"]) == [1, 0, 1]
    assert list(by_size["dap_missed"]) == pytest.approx([17 / 101, 0, 17 / 101])


def test_curves_of_a_class() -> None:
    """Right, wrong, right of two objects at IoU .5; at .9 nothing is right."""
    shrunk = rectangle(100, 10, 30, 40)  # IoU .75 with B
    results = [found(0.9, rectangle(10, 10, 30, 40)), found(0.8, NOTHING), found(0.7, shrunk)]
    curves = find_errors(truth_of(A, B, categories=2), results).curves((0.5, 0.9))
    assert [c.category for c in curves] == 2 * ["", "kind 1", "kind 2"]
    assert [c.iou_threshold for c in curves] == 3 * [0.5] + 3 * [0.9]
    assert curves[1].precision[:51] == pytest.approx(1)
    assert curves[1].precision[51:] == pytest.approx(2 / 3)
    assert curves[1].ap == curves[0].ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert math.isnan(curves[2].ap)
    assert curves[3].ap == 0 and curves[3].recall[-1] == 1


def test_table_and_json() -> None:
    report = find_errors(*two_kinds())
    lines = report.table().splitlines()
    assert lines[0] == "segm, IoU 0.5, background 0.1: AP 0.0, 0 of 3 objects found"
    assert lines[2].split()[:3] == ["classification", "75.2", "2"]
    assert [line.split()[0] for line in lines[2:8]] == list(KINDS)
    assert lines[8].startswith("false positives")
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["counts"]["background"] == 2
    assert written["dap"]["classification"] == pytest.approx(report.dap["classification"])


def test_names_as_image_ids_annotation_id_0_and_missed_objects_largest_first() -> None:
    truth = truth_of(rectangle(0, 0, 9, 9), A, rectangle(80, 80, 20, 20))
    truth["images"][0]["id"] = "a.png"
    for annotation in truth["annotations"]:
        annotation |= {"id": annotation["id"] - 1, "image_id": "a.png"}
    report = check(truth, [found(0.9, A, image_id="a.png")], 34 / 101, missed=(2, 67 / 101))
    small = [truth["annotations"][2], truth["annotations"][0]]
    assert [(e.image_id, e.truth) for e in report.errors("missed")] == [("a.png", a) for a in small]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"iou_type": "boxes"}, "iou_types"),
        ({"background_threshold": 0.5}, "background_threshold=0.5, iou_threshold=0.5"),
        ({"background_threshold": 0.0}, "background_threshold=0.0"),
        ({"iou_threshold": 1.5}, "iou_threshold=1.5"),
        ({"area_scale": 0}, "area_scale=0"),
        ({"results": [found(0.9, A, image_id=9)]}, r"results\[0\]: image_id 9"),
        (lambda report: report.errors("wrong"), "kind='wrong': use one of classification"),
        (lambda report: report.errors("missed", true="cat"), "true='cat': use one of kind 1"),
        (lambda report: report.curves((0.1,)), r"iou_thresholds: 0\.1 is not in"),
    ],
)
def test_what_cannot_be_answered(ask: Any, message: str) -> None:
    """Arguments of find_errors, and questions to a report."""
    with pytest.raises(ValueError, match=message):
        if callable(ask):
            ask(find_errors(truth_of(A), []))
        else:
            find_errors(truth_of(A), **{"results": []} | ask)


# --- any scene ----------------------------------------------------------------------------------

SIDE = 48


def ellipse(box: Any) -> dict[str, Any]:
    """A filled ellipse in a box of x, y, width, height, at least a pixel, in a 48 x 48 image."""
    x, y, w, h = (float(value) for value in box)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    bitmap = ((columns - x - w / 2) / w) ** 2 + ((rows - y - h / 2) / h) ** 2 <= 0.25
    bitmap[min(int(y + h / 2), SIDE - 1), min(int(x + w / 2), SIDE - 1)] = True
    return {"bbox": [x, y, w, h], "segmentation": bitmap_to_rle(bitmap), "area": int(bitmap.sum())}


def random_scenes(
    seed: int, images: int = 6, crowds: bool = False, tied: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scenes with all types of errors, in three classes that each have an object and a correct
    detection."""
    rng = np.random.default_rng(seed)
    objects, results = [], []

    def somewhere() -> Any:
        w, h = rng.uniform(6, 24, 2)
        return np.array([rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h), w, h])

    def say(box: Any, image: int, kind: int) -> None:
        score = float(rng.random())
        where = {"image_id": image, "category_id": kind}
        results.append(found(round(score, 1) if tied else score, ellipse(box), **where))

    for image in range(1, images + 1):
        for number in range(int(rng.integers(0, 5)) + 3 * (image == 1)):
            kind = number % 3 + 1 if image == 1 else int(rng.integers(1, 4))
            box = somewhere()
            is_crowd = int(crowds and image > 1 and rng.random() < 0.3)
            where = {"image_id": image, "category_id": kind, "iscrowd": is_crowd}
            objects.append(ellipse(box) | where)
            if image == 1 and number < 3:
                say(box, image, kind)
            for _ in range(rng.integers(0, 4)):
                moved = box + np.array([1, 1, 0, 0]) * rng.normal(0, 4, 4)
                says = kind if rng.random() < 0.6 else int(rng.integers(1, 4))
                say(moved.clip(0, SIDE), image, says)
        for _ in range(rng.integers(0, 3)):
            say(somewhere(), image, int(rng.integers(1, 4)))
    truth = truth_of(*objects, categories=3)
    truth["images"] = [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, images + 1)]
    return truth, [results[i] for i in rng.permutation(len(results))]


def plain_types(
    truth: dict[str, Any], results: list[dict[str, Any]], iou_type: IouType
) -> list[str]:
    """The type of each result, in plain loops over single detections."""
    types, taken = [""] * len(results), set()
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    for place in sorted(range(len(results)), key=lambda i: -results[i]["score"]):
        result, own, others, in_crowd = results[place], {}, {}, 0.0
        for i, a in enumerate(truth["annotations"]):
            if a["image_id"] != result["image_id"]:
                continue
            is_own = a["category_id"] == result["category_id"]
            ((iou,),) = coco_mask.iou([result[shape]], [a[shape]], [a["iscrowd"]])
            if not a["iscrowd"]:
                (own if is_own else others)[i] = iou
            elif is_own:
                in_crowd = max(in_crowd, iou)
        free = {i: iou for i, iou in own.items() if i not in taken and iou >= 0.5}
        mine, other = (max(ious.values(), default=0) for ious in (own, others))
        if free:
            taken.add(max(free, key=lambda i: free[i]))
            types[place] = "correct"
        elif in_crowd >= 0.5:
            types[place] = "ignored"
        elif 0.1 <= mine <= 0.5:
            types[place] = "localisation"
        elif other >= 0.5:
            types[place] = "classification"
        elif mine > 0.5:
            types[place] = "duplicate"
        else:
            types[place] = "background" if max(mine, other) <= 0.1 else "both"
    return types


def ap50(truth: dict[str, Any], results: list[dict[str, Any]], iou_type: IouType) -> float:
    metrics = coco_metrics(truth, results, (iou_type,))
    return (metrics.box or metrics.mask)["AP50"]


def after_fix(
    truth: dict[str, Any], results: list[dict[str, Any]], report: ErrorReport, kind: Kind
) -> float:
    """AP50 of files in which the errors of a type were corrected by hand."""
    verdicts = report.verdicts()
    wrong = verdicts[are(verdicts.verdict, kind)]
    annotations, results = list(truth["annotations"]), list(results)
    for place, meant, repairs in zip(wrong.result, wrong.annotation, wrong.repairs, strict=True):
        if kind == "missed":
            annotations[meant] = None
        elif repairs:
            shape = {key: annotations[meant][key] for key in ("bbox", "segmentation")}
            category = annotations[meant]["category_id"]
            results[place] = results[place] | shape | {"category_id": category}
        else:
            results[place] = None
    left = truth | {"annotations": [a for a in annotations if a]}
    return ap50(left, [r for r in results if r], report.iou_type)


seeds = st.integers(0, 2**32 - 1)


def any_scenes(seed: int, mixed: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of ours, and of those of the metrics: ties, crowds, a class without objects."""
    return random_case(seed) if mixed else random_scenes(seed, crowds=True, tied=True)


any_report = given(seeds, st.sampled_from(IOU_TYPES), st.booleans())


@settings(max_examples=30)
@any_report
def test_types_are_those_of_plain_loops_and_a_fix_is_an_edit(seed, iou_type, crowds) -> None:
    """Every result has the type that loops over single detections give it, and each dAP is the
    difference of two COCO evaluations: of the files as they are, and corrected by hand."""
    truth, results = random_scenes(seed, crowds=crowds, tied=crowds)
    report = find_errors(truth, results, iou_type)
    for kind in KINDS:
        fixed = after_fix(truth, results, report, kind)
        assert report.ap + report.dap[kind] == pytest.approx(fixed, abs=1e-9)
    verdicts = report.verdicts()
    types = ["ignored"] * len(results)
    for place, verdict in zip(verdicts.result, verdicts.verdict, strict=True):
        if place >= 0:
            types[place] = VERDICTS[verdict]
    assert types == plain_types(truth, results, iou_type)
    right = [r for r, name in zip(results, types, strict=True) if name == "correct"]
    without = ap50(truth, right, iou_type) - report.ap
    assert report.special["false positives"] == pytest.approx(without, abs=1e-9)


@settings(max_examples=30)
@any_report
def test_numbers_add_up_and_fixes_reach_100(seed: int, iou_type: IouType, mixed: bool) -> None:
    truth, results = any_scenes(seed, mixed)
    before = copy.deepcopy((truth, results))
    report = find_errors(truth, results, iou_type)
    errors = {kind: report.errors(kind) for kind in KINDS}
    assert {kind: len(of_kind) for kind, of_kind in errors.items()} == report.counts
    wrong = [id(error.result) for kind in FALSE_POSITIVES for error in errors[kind]]
    assert len(set(wrong)) == len(wrong)  # exactly one type each
    assert report.correct + report.ignored + report.left_out + len(wrong) == len(results)
    meant = [*errors["classification"], *errors["localisation"]]
    covered = {id(error.truth) for error in meant}
    missed = {id(error.truth) for error in errors["missed"]}
    assert not covered & missed and len(missed) == report.counts["missed"]
    assert report.correct + len(missed) <= report.objects
    assert report.objects <= report.correct + len(missed) + len(covered)
    for scores in ([error.score for error in of_kind] for of_kind in errors.values()):
        assert scores == sorted(scores, reverse=True) or all(map(math.isnan, scores))

    classes, sizes = report.by_class(), report.by_size()
    for kind in KINDS:
        column = f"errors_{kind}"
        assert classes[column].sum() == sizes[column].sum() == report.counts[kind]
    assert classes["objects"].sum() == sizes["objects"].sum() == report.objects
    assert classes["correct"].sum() == sizes["correct"].sum() == report.correct
    assert report.confusions()["errors"].sum() == report.counts["classification"]
    assert (truth, results) == before

    if not report.objects:
        assert math.isnan(report.ap)
        return
    # A fix never costs, and all of them reach 100.
    reached = [report.ap, *report.progressive.values()]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(reached))
    assert report.progressive["missed"] == pytest.approx(1, abs=1e-12)
    assert min([*report.dap.values(), *report.special.values()]) >= -1e-12
    for kind in KINDS:
        assert classes[f"dap_{kind}"].min() >= -1e-12 and sizes[f"dap_{kind}"].min() >= -1e-12
        assert classes[f"dap_{kind}"].mean() == pytest.approx(report.dap[kind], abs=1e-12)


@settings(max_examples=30)
@any_report
def test_ap_is_that_of_coco(seed: int, iou_type: IouType, mixed: bool) -> None:
    """At IoU .5, and through the curves at all ten thresholds, of each class and their mean."""
    truth, results = any_scenes(seed, mixed)
    metrics = coco_metrics(truth, results, (iou_type,))
    numbers = metrics.box or metrics.mask
    report = find_errors(truth, results, iou_type)
    np.testing.assert_allclose(report.ap, numbers["AP50"], rtol=0, atol=1e-9)
    curves = report.curves(np.linspace(0.5, 0.95, 10).tolist())
    per_class = {"": numbers["AP"]} | (metrics.box_per_class or metrics.mask_per_class)
    for name, ap in per_class.items():
        ours = [curve.ap for curve in curves if curve.category == name]
        np.testing.assert_allclose(np.mean(ours), ap, rtol=0, atol=1e-9)


# --- tidecv -------------------------------------------------------------------------------------


def test_the_scenes_have_errors_of_every_type() -> None:
    counts = sum(
        (Counter(find_errors(*random_scenes(seed)).counts) for seed in range(10)), Counter()
    )
    assert min(counts[kind] for kind in KINDS) >= 10


SHORT = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FalsePos", "FalseNeg")
TIDE_NAMES = dict(zip([*KINDS, "false positives", "false negatives"], SHORT, strict=True))


@pytest.fixture
def tide_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tidecv's own class for one evaluation. What the package loads for drawings and downloads
    (OpenCV, seaborn, appdirs) is replaced by empty modules where it is not installed."""
    for name in ("cv2", "seaborn", "appdirs"):
        try:
            __import__(name)
        except ImportError:
            empty = types.ModuleType(name)
            empty.FONT_HERSHEY_SIMPLEX = empty.user_data_dir = None  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, empty)
    try:
        from tidecv.quantify import TIDERun
    except ImportError:
        pytest.skip("needs the authors' tidecv: pip install --no-deps tidecv")
    return TIDERun


def tide(run_class: Any, truth: dict[str, Any], results: list[dict[str, Any]], mode: str) -> Any:
    """tidecv's evaluation of these files."""
    from tidecv import Data

    real, said = Data("truth"), Data("results")
    for image in truth["images"]:
        real.add_image(image["id"], str(image["id"]))
    for a in truth["annotations"]:
        add = real.add_ignore_region if a["iscrowd"] else real.add_ground_truth
        add(a["image_id"], a["category_id"], a["bbox"], a["segmentation"])
    for r in results:
        shape = (r["bbox"], r["segmentation"])
        said.add_detection(r["image_id"], r["category_id"], r["score"], *shape)
    return run_class(real, said, 0.5, 0.1, {"bbox": "bbox", "segm": "mask"}[mode], 100)


def named(values: dict[Any, Any]) -> dict[str, Any]:
    return {error.short_name: value for error, value in values.items()}


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_the_numbers_of_tidecv(tide_run, iou_type, monkeypatch) -> None:
    """Equal to 1e-9, counts and all dAPs, on scenes in which the departures that the module names
    do not matter, with tidecv's rounding of the recall levels. Of every type there are some."""
    total: Counter[str] = Counter()
    monkeypatch.setattr(errors, "RECALLS", np.arange(101) / 100)
    for seed in range(40):
        truth, results = random_scenes(seed, images=12)
        report = find_errors(truth, results, iou_type)
        total.update(report.counts)
        run = tide(tide_run, truth, results, iou_type)
        assert 100 * report.ap == pytest.approx(run.ap, abs=1e-9)
        assert named(run.count_errors()) == {TIDE_NAMES[k]: n for k, n in report.counts.items()}
        theirs = named(run.fix_main_errors()) | named(run.fix_special_errors())
        for kind, dap in (report.dap | report.special).items():
            assert 100 * dap == pytest.approx(theirs[TIDE_NAMES[kind]], abs=1e-9)
    assert min(total.values()) >= 40
