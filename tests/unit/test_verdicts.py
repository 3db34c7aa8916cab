"""What became of every detection and object: by hand, and equal to the error report."""

import statistics
from typing import Any

import numpy as np
import pytest

from mimdet.analysis.errors import find_errors
from mimdet.analysis.matching import VERDICTS
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
