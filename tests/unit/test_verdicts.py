"""What became of every detection and object, and of one run against another, image by image: by
hand, equal to the error report, and to COCO's AP of single images."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimdet.analysis.comparison import compare_runs
from mimdet.analysis.errors import find_errors
from mimdet.analysis.matching import VERDICTS
from mimdet.analysis.metrics import IouType, coco_metrics
from tests.unit.test_metrics import found, random_case, rectangle, truth_of

# Image 1: A is found, found again, and of B only a part; image 2: A is called otherwise, B is
# missed and there is a detection of nothing; image 3: A is found. Small is below 1024 square
# pixels, so A (1600) is medium and B (900) small.
A, B = rectangle(10, 10, 40, 40), rectangle(100, 100, 30, 30)
PART_OF_B, NOTHING = rectangle(100, 100, 12, 30), rectangle(150, 20, 20, 20)
OTHERS = [A | {"image_id": 2}, B | {"image_id": 2, "category_id": 2}, A | {"image_id": 3}]
TRUTH = truth_of(A, B, *OTHERS, images=3, categories=2)
RESULTS = [
    found(0.9, A),
    found(0.7, A),
    found(0.6, PART_OF_B),
    found(0.8, A, image_id=2, category_id=2),
    found(0.35, NOTHING, image_id=2),
    found(0.45, A, image_id=3),
]
BETTER = [found(0.9, A), found(0.9, B), found(0.9, A, image_id=2), found(0.9, A, image_id=3)]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_verdicts_by_hand(iou_type: Any) -> None:
    verdicts = find_errors(TRUTH, RESULTS, iou_type).verdicts(0.3)
    names = [VERDICTS[number] for number in verdicts.verdict]
    assert names == [
        "correct",  # .9
        "classification",  # .8
        "duplicate",  # .7
        "localisation",  # .6: IoU 12 / 30
        "correct",  # .45
        "background",  # .35
        "missed",
    ]
    assert verdicts.image.tolist() == [0, 1, 0, 0, 2, 1, 1]
    assert verdicts.said.tolist() == [0, 1, 0, 0, 0, 0, -1]
    assert verdicts.true.tolist() == [0, 0, 0, 0, 0, -1, 1]
    assert verdicts.area.tolist() == [1600, 1600, 1600, 900, 1600, 400, 900]
    assert verdicts.result.tolist() == [0, 3, 1, 2, 5, 4, -1]
    assert verdicts.annotation.tolist() == [0, 2, 0, 1, 4, -1, 3]
    assert verdicts.count()["correct"] == 2 and verdicts.count()["both"] == 0


def test_thresholds_make_objects_missed_and_scores_may_be_negative() -> None:
    judged = find_errors(TRUTH, RESULTS)
    assert judged.verdicts(0.3).count()["missed"] == 1
    assert judged.verdicts(0.45).count() == judged.verdicts(0.4).count()  # .45 itself still counts
    at = judged.verdicts(0.65)  # without the part of B, and without image 3
    missed = at[at.verdict == VERDICTS.index("missed")]
    assert missed.annotation.tolist() == [1, 3, 4]
    report = find_errors(truth_of(A, B), [found(-1.0, A), found(-2.0, PART_OF_B)])
    assert report.correct == report.verdicts().count()["correct"] == 1
    assert [error.score for error in report.errors("localisation")] == [-2.0]


@pytest.mark.parametrize("seed", range(4))
def test_a_threshold_is_the_same_as_leaving_results_out(seed: int) -> None:
    truth, results = random_case(seed)
    score = statistics.median(result["score"] for result in results)
    fewer = [result for result in results if result["score"] >= score]
    assert 0 < len(fewer) < len(results)
    expected = find_errors(truth, fewer).verdicts(0)
    got = find_errors(truth, results).verdicts(score)
    for name in ("verdict", "image", "said", "true", "area", "annotation"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_chosen_by_hand() -> None:
    judged = find_errors(TRUTH, RESULTS)
    verdicts = judged.verdicts(0.3)

    def places(**wanted: Any) -> list[int]:
        return np.flatnonzero(judged.chosen(verdicts, **wanted)).tolist()

    assert places() == [0, 1, 2, 3, 4, 5, 6]
    assert places(verdict="missed") == [6]
    assert places(category="kind 2") == [1, 6]  # called kind 2; is one
    assert places(size="small") == [3, 5, 6]
    assert places(verdict="localisation", category="kind 1", size="small") == [3]
    assert places(verdict="localisation", size="large") == []
    for wanted in ({"verdict": "wrong"}, {"category": "cat"}, {"size": "tiny"}):
        with pytest.raises(ValueError, match="use one of"):
            judged.chosen(verdicts, **wanted)  # type: ignore[arg-type]


# --- two runs -----------------------------------------------------------------------------------

LARGE, NEXT = rectangle(10, 10, 50, 50), rectangle(100, 10, 40, 40)
NOWHERE = rectangle(150, 150, 30, 30)


def three_images() -> tuple[dict[str, Any], dict[str, Any]]:
    """Image 1 has LARGE and NEXT (of kind 2), image 2 nothing, image 3 LARGE."""
    second, third = NEXT | {"category_id": 2}, LARGE | {"image_id": 3}
    truth = truth_of(LARGE, second, third, images=3, categories=2)
    early = [found(0.9, LARGE), found(0.6, NOWHERE, image_id=2), found(0.8, LARGE, image_id=3)]
    late = [found(0.7, LARGE), found(0.6, NEXT, category_id=2)]
    late.append(found(0.9, rectangle(10, 10, 50, 41), image_id=3))
    return truth, {"early": early, "late": late}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_two_runs_by_hand(iou_type: IouType) -> None:
    """Image 1: one of two objects, 51 of 101 recall levels, then both. Image 2 has no object, so no
    AP. Image 3: LARGE, then it with IoU .82, which counts at seven of the ten thresholds."""
    comparison = compare_runs(*three_images(), iou_type)
    images = comparison.images
    assert comparison.names == ("early", "late")
    assert list(images["image_id"]) == [1, 2, 3] and list(images["objects"]) == [2, 0, 1]
    np.testing.assert_allclose(images["ap_1"], [51 / 101, math.nan, 1])
    np.testing.assert_allclose(images["ap_2"], [1, math.nan, 0.7])
    np.testing.assert_allclose(images["change"], [50 / 101, math.nan, -0.3])
    assert list(images["found_1"]) == [1, 0, 1] and list(images["found_2"]) == [2, 0, 1]
    assert list(comparison.gained()["image_id"]) == [1]
    assert list(comparison.lost()["image_id"]) == [3]
    expected = {"images": 2, "gained": 1, "lost": 1, "same": 0, "found_1": 2, "found_2": 3}
    expected |= {"mean_ap_1": (51 / 101 + 1) / 2, "mean_ap_2": 0.85}
    assert comparison.summary() == pytest.approx(expected)
    assert comparison.table().splitlines() == [
        f"{iou_type}, from early to late: of 2 images 1 gained, 1 lost, 0 kept their AP",
        "mean AP of an image 75.2 -> 85.0, objects found 2 -> 3",
        "gained  image 1: AP 50.5 -> 100.0, found 1 -> 2 of 2",
        "lost    image 3: AP 100.0 -> 70.0, found 1 -> 1 of 1",
    ]


def test_wrong_classes_and_crowds_and_the_largest_change_first() -> None:
    """The first of two detections is wrong: precision 1/2 at recall 1; in a crowd it is neither
    right nor wrong."""
    truth = truth_of(LARGE, NOWHERE | {"iscrowd": 1}, categories=2)
    right, called_2 = found(0.8, LARGE), found(0.9, LARGE, category_id=2)
    inside = found(0.9, rectangle(155, 155, 10, 10))
    (row,) = compare_runs(truth, {"a": [called_2, right], "b": [inside, right]}).images.itertuples()
    assert (row.objects, row.ap_1, row.ap_2) == pytest.approx((1, 0.5, 1))
    truth = truth_of(*(LARGE | {"image_id": i} for i in range(1, 5)), images=4)
    shapes = [rectangle(10, 10, 50, height) for height in (50, 41, 30, 20)]  # IoU 1, .82, .6, .4
    results = [found(0.9, shape, image_id=i) for i, shape in enumerate(shapes, start=1)]
    perfect = [found(0.9, LARGE, image_id=i) for i in range(1, 5)]
    comparison = compare_runs(truth, {"a": results, "b": perfect})
    assert list(comparison.images["ap_1"]) == pytest.approx([1, 0.7, 0.3, 0])
    assert list(comparison.gained()["image_id"]) == [4, 3, 2]
    assert list(comparison.gained(1)["image_id"]) == [4]
    back = compare_runs(truth, {"b": perfect, "a": results})
    assert list(back.lost()["image_id"]) == [4, 3, 2] and len(back.gained()) == 0


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["bbox", "segm"]))
def test_of_one_class_it_is_the_ap_of_the_image_alone(seed: int, iou_type: IouType) -> None:
    truth, results = random_case(seed)
    for entry in (*truth["annotations"], *results):
        entry["category_id"] = 1
    truth["categories"] = truth_of()["categories"]
    comparison = compare_runs(truth, {"all": results, "half": results[::2]}, iou_type)
    for row in comparison.images.itertuples():
        objects, alone = (
            [entry for entry in entries if entry["image_id"] == row.image_id]
            for entries in (truth["annotations"], results)
        )
        metrics = coco_metrics(truth | {"annotations": objects}, alone, (iou_type,))
        np.testing.assert_allclose(row.ap_1, (metrics.box or metrics.mask)["AP"], rtol=0, atol=1e-9)


def test_nothing_to_compare() -> None:
    for truth in (truth_of(images=0), truth_of(images=2, categories=0)):
        comparison = compare_runs(truth, {"a": [], "b": []})
        assert comparison.summary()["images"] == 0 and len(comparison.gained()) == 0
        assert "of 0 images" in comparison.table()
    with pytest.raises(ValueError, match=r"runs has 1 entries \(only\): give two"):
        compare_runs(truth_of(A), {"only": []})
    with pytest.raises(ValueError, match=r"results\[0\]: image_id 9"):
        compare_runs(truth_of(A), {"a": [], "b": [found(0.9, A, image_id=9)]})
