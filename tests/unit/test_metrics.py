"""COCO metrics: published numbers, pycocotools, and cases worked out by hand."""

import contextlib
import copy
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mimdet.analysis.metrics import COLUMNS, Metrics, coco_metrics, doubts_about, read_results
from mimdet.structures import bitmap_to_rle

DATA = os.environ.get("MIMDET_DATA", "")


def rectangle(x: int, y: int, w: int, h: int, size: tuple[int, int] = (200, 200)) -> dict[str, Any]:
    """bbox, segmentation and area of a filled rectangle of whole pixels."""
    bitmap = np.zeros(size, dtype=np.uint8)
    bitmap[y : y + h, x : x + w] = 1
    return {"bbox": [x, y, w, h], "segmentation": bitmap_to_rle(bitmap), "area": w * h}


def truth_of(*objects: dict[str, Any], images: int = 1, categories: int = 1) -> dict[str, Any]:
    """A COCO dictionary; objects without an image or category are in the first one."""
    return {
        "images": [{"id": i + 1, "height": 200, "width": 200} for i in range(images)],
        "categories": [{"id": i + 1, "name": f"kind {i + 1}"} for i in range(categories)],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1, "iscrowd": 0} | entry
            for i, entry in enumerate(objects)
        ],
    }


def found(score: float, shape: dict[str, Any], **fields: Any) -> dict[str, Any]:
    result = {"image_id": 1, "category_id": 1, "score": score, **shape, **fields}
    result.pop("area")
    return result


# --- published numbers ------------------------------------------------------------------------


def published() -> dict[str, list[str]]:
    """{"segm": 12 numbers as printed, "bbox": 12 numbers}."""
    numbers: dict[str, list[str]] = {}
    kind = ""
    for line in (Path(DATA) / "evalbench/val2014_fake_eval_res.txt").read_text().splitlines():
        if line.startswith("type="):
            kind = line.removeprefix("type=")
        elif "@[" in line:
            numbers.setdefault(kind, []).append(line.split("= ")[-1])
    return numbers


@pytest.mark.skipif(not DATA, reason="set MIMDET_DATA to the folder that holds evalbench")
@pytest.mark.parametrize("iou_type, row", [("bbox", "box"), ("segm", "mask")])
def test_published_numbers_of_the_coco_api(iou_type: Any, row: str) -> None:
    folder = Path(DATA) / "evalbench"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    name = f"instances_val2014_fake{iou_type}100_results.json"
    results = json.loads((folder / name).read_text())
    numbers = getattr(coco_metrics(truth, results, iou_types=(iou_type,)), row)
    assert [f"{numbers[column]:.3f}" for column in COLUMNS] == published()[iou_type]


def test_summary_names_the_worst_classes_first() -> None:
    numbers = dict.fromkeys(COLUMNS, 0.5)
    aps = {"dog": 0.3, "cat": 0.1, "cow": None, "owl": 0.2}
    metrics = Metrics(numbers, {}, aps, {})
    assert metrics.summary().splitlines() == [
        *metrics.table().splitlines(),
        "cat                  10.0",
        "owl                  20.0",
        "dog                  30.0",
    ]
    metrics = Metrics(numbers, numbers, aps, aps | {"cat": 0.4})
    assert metrics.summary(1).splitlines()[3:] == [
        "cat                  10.0 / 40.0",
        "and 2 classes with a higher AP",
    ]


# --- pycocotools ------------------------------------------------------------------------------


def reference(truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> list[float]:
    """pycocotools' twelve numbers, -1 as NaN, with the other kind of shape taken out."""
    other = "segmentation" if iou_type == "bbox" else "bbox"
    kept = [{k: v for k, v in result.items() if k != other} for result in copy.deepcopy(results)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(kept), iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [math.nan if number == -1 else number for number in evaluator.stats]


def check_against_reference(truth: dict[str, Any], results: list[dict[str, Any]]) -> None:
    metrics = coco_metrics(truth, results)
    for iou_type, numbers in (("bbox", metrics.box), ("segm", metrics.mask)):
        ours = [numbers[column] for column in COLUMNS]
        np.testing.assert_allclose(ours, reference(truth, results, iou_type), rtol=0, atol=1e-9)
    both = ((metrics.box, metrics.box_per_class), (metrics.mask, metrics.mask_per_class))
    for numbers, per_class in both:
        known = [ap for ap in per_class.values() if not math.isnan(ap)]
        mean = sum(known) / len(known) if known else math.nan
        np.testing.assert_allclose(mean, numbers["AP"], rtol=0, atol=1e-9)


def random_ellipse(rng: np.random.Generator, around: list[float] | None = None) -> dict[str, Any]:
    """An ellipse of any size in a 200 x 200 image, or one that overlaps the box `around`."""
    if around is None:
        w, h = np.exp(rng.uniform(np.log(4), np.log(160), 2))
        x, y = rng.uniform(0, 200 - w), rng.uniform(0, 200 - h)
    else:
        x, y, w, h = np.array(around) + np.array(around)[[2, 3, 2, 3]] * rng.normal(0, 0.08, 4)
        w, h = abs(w), abs(h)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], axis=1)
    polygon = points.round(2).ravel().tolist()
    rle = coco_mask.frPyObjects([polygon], 200, 200)[0]
    area = float(coco_mask.area(rle))
    compressed = {"size": [200, 200], "counts": rle["counts"].decode()}
    return {"bbox": [x, y, w, h], "polygon": [polygon], "segmentation": compressed, "area": area}


def plain_counts(rle: dict[str, Any]) -> dict[str, Any]:
    """Uncompressed run lengths, as COCO stores crowds."""
    flat = coco_mask.decode(rle).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return {"size": rle["size"], "counts": np.diff([0, *edges, flat.size]).tolist()}


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Crowds, tied scores, polygons and both kinds of RLE, duplicates, a category (4) without
    objects, another (3) without detections, images without either."""
    rng = np.random.default_rng(seed)
    objects, results = [], []
    for image_id in rng.permutation(8)[:5].tolist():
        for _ in range(rng.integers(0, 7)):
            shape = random_ellipse(rng)
            polygon, rle = shape.pop("polygon"), shape["segmentation"]
            category, crowd = int(rng.integers(1, 4)), int(rng.random() < 0.2)
            forms = [plain_counts(rle), rle] if crowd else [polygon, plain_counts(rle), rle]
            shape["segmentation"] = forms[rng.integers(len(forms))]
            where = {"image_id": image_id, "category_id": category}
            objects.append(shape | where | {"iscrowd": crowd})
            if category == 3 or rng.random() < 0.2:
                continue
            for _ in range(rng.integers(1, 15 if rng.random() < 0.2 else 4)):
                guess = random_ellipse(rng, around=shape["bbox"])
                results.append(found(rng.random().__round__(1), guess, **where))
        for _ in range(rng.integers(0, 4)):
            where = {"image_id": image_id, "category_id": int(rng.choice([1, 2, 4]))}
            results.append(found(rng.random().__round__(1), random_ellipse(rng), **where))
    for result in results:
        result.pop("polygon")
    truth = truth_of(*objects, categories=4)
    truth["images"] = [{"id": i, "height": 200, "width": 200} for i in range(8)]
    order = rng.permutation(len(results))
    return truth, [results[i] for i in order]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_equal_to_pycocotools(seed: int) -> None:
    truth, results = random_case(seed)
    if results:  # pycocotools cannot load an empty list
        check_against_reference(truth, results)


def test_more_masks_than_a_byte_counts() -> None:
    """pycocotools' mask.area overflows beyond 255 masks; and only the best 100 count."""
    rng = np.random.default_rng(0)
    truth = truth_of(*(rectangle(20 * i, 30, 18, 40) for i in range(10)))
    shapes = [rectangle(int(rng.integers(0, 180)), 30, 18, 40) for _ in range(400)]
    check_against_reference(truth, [found(float(rng.random()), shape) for shape in shapes])


# --- by hand ----------------------------------------------------------------------------------


def test_a_wrong_detection_ranked_first_halves_ap_and_image_ids_may_be_names() -> None:
    truth = truth_of(rectangle(10, 10, 40, 40))
    results = [found(0.9, rectangle(120, 120, 40, 40)), found(0.8, rectangle(10, 10, 40, 40))]
    metrics = coco_metrics(truth, results)
    for numbers in (metrics.box, metrics.mask):
        assert numbers["AP"] == numbers["AP50"] == numbers["AP75"] == pytest.approx(0.5)
        assert (numbers["AR1"], numbers["AR10"], numbers["AR100"]) == (0, 1, 1)
        assert numbers["AP_medium"] == pytest.approx(0.5)
        assert math.isnan(numbers["AP_small"]) and math.isnan(numbers["AR_large"])
    truth = truth_of(rectangle(10, 10, 40, 40), rectangle(5, 5, 30, 30), images=2)
    truth["images"][0]["id"], truth["images"][1]["id"] = "b.png", "a.png"
    for annotation, name in zip(truth["annotations"], ("b.png", "a.png"), strict=True):
        annotation["image_id"] = name
        del annotation["iscrowd"]  # an object, then
    results = [annotation | {"score": 0.5} for annotation in truth["annotations"]]
    assert coco_metrics(truth, results).box["AP"] == 1.0


def test_annotation_id_0_scores_1_on_itself() -> None:
    truth = truth_of(rectangle(10, 10, 40, 40), rectangle(80, 80, 20, 90), images=2)
    for annotation in truth["annotations"]:
        annotation["id"] -= 1
    truth["annotations"][1]["image_id"] = 2
    results = [annotation | {"score": 1.0} for annotation in truth["annotations"]]
    metrics = coco_metrics(truth, results)
    assert metrics.box["AP"] == metrics.mask["AP"] == 1.0
    assert metrics.box["AR100"] == metrics.mask["AR100"] == 1.0


def test_mask_sizes_are_mask_areas_though_results_have_boxes() -> None:
    """A wrong mask of 320 px in a box of 1600 px is a small mistake for masks, not for boxes."""
    thin = rectangle(100, 100, 8, 40) | {"bbox": [100, 100, 40, 40]}
    truth = truth_of(rectangle(10, 10, 20, 20))
    metrics = coco_metrics(truth, [found(0.9, thin), found(0.8, rectangle(10, 10, 20, 20))])
    assert metrics.mask["AP_small"] == pytest.approx(0.5)
    assert metrics.box["AP_small"] == pytest.approx(1.0)


def test_area_scale_moves_the_size_rows_only() -> None:
    truth = truth_of(rectangle(10, 10, 6, 6), rectangle(60, 60, 10, 10))
    results = [found(0.9, rectangle(60, 60, 10, 10))]
    standard, scaled = (coco_metrics(truth, results, area_scale=s) for s in (1, (128 / 640) ** 2))
    assert standard.area_ranges["medium"] == (1024, 9216)
    assert scaled.area_ranges["small"] == (0, pytest.approx(40.96))
    assert scaled.area_ranges["large"] == (pytest.approx(368.64), 1e10)
    assert standard.box["AP_small"] == pytest.approx(51 / 101)  # one of two; 51 of 101 recalls
    assert math.isnan(standard.box["AP_medium"])
    assert (scaled.box["AP_small"], scaled.box["AP_medium"]) == (0, pytest.approx(1))
    assert scaled.mask["AP_small"] == 0
    assert scaled.box["AP"] == standard.box["AP"]


def test_per_class_and_categories_without_objects() -> None:
    second = rectangle(80, 80, 40, 40) | {"category_id": 2}
    truth = truth_of(rectangle(10, 10, 40, 40), second, categories=3)
    third = found(0.9, rectangle(0, 0, 9, 9), category_id=3)
    results = [found(0.9, rectangle(10, 10, 40, 40)), third]
    metrics = coco_metrics(truth, results)
    for per_class in (metrics.box_per_class, metrics.mask_per_class):
        assert list(per_class) == ["kind 1", "kind 2", "kind 3"]
        assert per_class["kind 1"] == pytest.approx(1) and per_class["kind 2"] == 0
        assert math.isnan(per_class["kind 3"])
    assert metrics.box["AP"] == pytest.approx(0.5)  # the mean leaves the third out


def test_categories_of_one_name_stay_apart() -> None:
    truth = truth_of(rectangle(10, 10, 40, 40), categories=2)
    truth["categories"] = [{"id": 2, "name": "cell"}, {"id": 1, "name": "cell"}]
    metrics = coco_metrics(truth, [found(0.9, rectangle(10, 10, 40, 40))])
    assert metrics.box_per_class["cell (id 1)"] == pytest.approx(1)
    assert math.isnan(metrics.box_per_class["cell (id 2)"])


def test_no_results_and_no_images() -> None:
    truth = truth_of(rectangle(10, 10, 40, 40))
    nothing_found = coco_metrics(truth, [])
    assert nothing_found.box["AP"] == nothing_found.mask["AP"] == nothing_found.mask["AR100"] == 0
    no_objects = coco_metrics(truth_of(images=2), [found(0.9, rectangle(0, 0, 9, 9))])
    no_images = coco_metrics(truth_of(images=0), [])
    for metrics in (no_objects, no_images):
        assert all(math.isnan(number) for number in [*metrics.box.values(), *metrics.mask.values()])


def test_inputs_are_left_alone_and_nothing_is_printed(capfd, caplog) -> None:
    caplog.set_level(logging.INFO)
    truth, results = random_case(3)
    before = copy.deepcopy((truth, results))
    coco_metrics(truth, results)
    assert (truth, results) == before
    assert capfd.readouterr() == ("", "") and not caplog.records


SIZES = ["_small", "_medium", "_large"]
NUMBERS = [f"AP{part}" for part in ["", "50", "75", *SIZES]]
NUMBERS += [f"AR{part}" for part in ["1", "10", "100", *SIZES]]
"""COCO's twelve, in its order."""


def test_table_and_json_and_one_iou_type_leaves_the_other_empty() -> None:
    truth = truth_of(rectangle(10, 10, 40, 40))
    metrics = coco_metrics(truth, [found(0.9, rectangle(10, 10, 40, 40))])
    heading, box, mask = metrics.table().splitlines()
    assert heading.split() == "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    assert list(metrics.box) == list(COLUMNS) == NUMBERS
    assert (mask[:5], list(metrics.mask)) == ("mask ", NUMBERS)
    assert box.split()[:5] == ["box", "100.0", "100.0", "100.0", "-"]
    assert len({len(line) for line in (heading, box, mask)}) == 1
    written = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert written["box"]["AP_small"] is None and written["mask"]["AP"] == pytest.approx(1)
    assert written["area_ranges"]["small"] == [0, 1024]
    result = found(0.9, rectangle(10, 10, 40, 40))
    result.pop("segmentation")
    metrics = coco_metrics(truth_of(rectangle(10, 10, 40, 40)), [result], iou_types=("bbox",))
    assert metrics.mask == metrics.mask_per_class == {}
    assert len(metrics.table().splitlines()) == 2
    columns = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl"
    assert Metrics().table().split() == columns.split()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 7}, r"results\[1\]: image_id 7"),
        ({"category_id": 0}, r"results\[1\]: category_id 0 .* not labels"),
        ({"bbox": None}, r"results\[1\] has no 'bbox'"),
        ({"segmentation": None}, r"results\[1\] has no 'segmentation'"),
        ({"segmentation": [[0, 0, 9, 0, 9, 9]]}, r"results\[1\]: segmentation must be RLE"),
        ({"score": math.nan}, r"results\[1\]: score is nan"),
    ],
)
def test_results_that_cannot_be_evaluated(change: dict[str, Any], message: str) -> None:
    good = found(0.9, rectangle(10, 10, 40, 40))
    with pytest.raises(ValueError, match=message):
        coco_metrics(truth_of(rectangle(10, 10, 40, 40)), [good, good | change])


def test_truth_that_cannot_be_evaluated() -> None:
    truth = truth_of(rectangle(10, 10, 40, 40))
    no_area = {"annotations": [truth["annotations"][0] | {"area": None}]}
    for change, options, message in (
        (no_area, {}, "annotation 1 has no 'area'"),
        ({"images": [{"id": 1}]}, {}, "image 1 has no height and width"),
        ({}, {"area_scale": 0}, "area_scale=0"),
        ({}, {"iou_types": ("boxes",)}, "iou_types"),
    ):
        with pytest.raises(ValueError, match=message):
            coco_metrics(truth | change, [], **options)


GONE = object()
"""As the value of a field: it is taken out."""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": "0.9"}, r"`float`, got `str` - at `\$\.score`"),
        ({"score": math.nan}, "got `float`|score"),
        ({"category_id": 1.7}, r"`int`, got `float` - at `\$\.category_id`"),
        ({"bbox": [1, 2, 3]}, "length 4"),
        ({"bbox": GONE}, "it has no 'bbox'"),
        ({"image_id": 7}, "image_id 7 is not among the images"),
        ({"segmentation": {"size": [200, 200], "counts": [5]}}, "its runs cover 5 of 40000"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"for \(9, 9\) pixels"),
        ({"segmentation": {"size": [200, 200], "counts": "o"}}, "malformed|cover"),
    ],
)
def test_a_results_file_is_read_by_declared_types(change, said, tmp_path) -> None:
    """Run lengths included: pycocotools would read beyond those that are cut off."""
    truth, good = truth_of(rectangle(10, 10, 40, 40)), found(0.9, rectangle(10, 10, 40, 40))
    file = tmp_path / "results.json"
    file.write_text(json.dumps([good, good | {"score": 0.8}]))
    assert read_results(file, truth) == [good, good | {"score": 0.8}]
    bad = {key: value for key, value in (good | change).items() if value is not GONE}
    file.write_text(json.dumps([good, bad]))
    with pytest.raises(ValueError, match=rf"results\.json: results\[1\]: .*({said})"):
        read_results(file, truth)


def results_of_others(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """A sound result in each of ten images, in different places and of different scores."""
    return [
        {"image_id": image["id"], "category_id": 1, "score": i / 10}
        | {"bbox": [100.0 + i, 90.0, 60.0, 50.0 + i]}
        for i, image in enumerate(truth["images"])
    ]


def boxes_of(results: list[Any], change: Callable[[list[float]], list[float]]) -> list[Any]:
    return [one | {"bbox": change(one["bbox"])} for one in results]


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r, None),
        (lambda r: [one | {"score": one["score"] * 3} for one in r], "6 of 10 scores are not in"),
        (lambda r: r[:5], "5 of 10 images have no result, first 6"),
        (lambda r: r[:9], None),
        (lambda r: boxes_of(r, corners), "10 of 10 boxes reach .* as x1, y1, x2, y2 they"),
        (lambda r: [*r, *r[:3]], "3 of 13 results are there more than once"),
        (lambda r: boxes_of(r, lambda _: [0.1, 0.2, 0.3, 0.4]), "10 of 10 boxes lie in 0..2, like"),
        (lambda r: boxes_of(r[:1], lambda _: [9.0, 9.0, 0.0, 4.0]) + r[1:], "1 of 10 .*empty"),
        (lambda r: boxes_of(r, lambda box: [4 * side for side in box]), r"10 of 10 .*, height$"),
        (lambda r: [], None),
    ],
)
def test_results_of_others_are_doubted_with_counts(change, said, tmp_path, recwarn) -> None:
    """Each of these gives an AP without a word from COCO's evaluation."""
    truth = truth_of(rectangle(10, 10, 40, 40))
    truth["images"] = [{"id": i, "height": 200, "width": 200} for i in range(1, 11)]
    file = tmp_path / "others.json"
    file.write_text(json.dumps(change(results_of_others(truth))))
    read_results(file, truth)
    told = [str(one.message) for one in recwarn]
    assert len(told) == (said is not None)
    assert not said or (re.search(said, told[0]) and "others.json" in told[0]), told


def test_a_file_that_holds_no_list_of_detections_or_faulty_ones_which_are_counted(tmp_path) -> None:
    neither = {"image_id": 1, "category_id": 1, "score": 0.5}
    mask = {k: v for k, v in found(0.9, rectangle(10, 10, 40, 40)).items() if k != "bbox"}
    for content, said in (
        ({"annotations": []}, "it holds no list of detections"),
        ([neither], "it has neither bbox nor segmentation"),
        ([mask, neither], r"results\[1\]: .*has no 'segmentation'"),
    ):
        (tmp_path / "others.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=said):
            read_results(tmp_path / "others.json", truth_of(rectangle(10, 10, 40, 40)))
    good = found(0.9, rectangle(10, 10, 40, 40))
    truth = truth_of(rectangle(10, 10, 40, 40))
    faulty = [good, *[good | {"image_id": 7}] * 3, good | {"score": math.nan}]
    (tmp_path / "others.json").write_text(json.dumps(faulty))
    message = r"results\[1\]: .*image_id 7 is not among the images \(4 of 5 results cannot be used"
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "others.json", truth)
    with pytest.raises(ValueError, match=message):
        coco_metrics(truth, faulty)


def test_doubts_in_full() -> None:
    """Borders included: a score of 0 or 1 is sound, so is a box of one pixel's width."""
    truth = truth_of(rectangle(10, 10, 40, 40))  # in 200 x 200 pixels
    sound = {"image_id": 1, "category_id": 1, "bbox": [5.0, 5.0, 1.0, 9.0], "score": 0.0}
    beyond = "boxes reach beyond their image as x, y, width, height"
    for change, doubts in (
        ({"score": 0.0}, []),
        ({"score": 1.0}, []),
        ({"score": -0.1}, ["scores are not in 0..1"]),
        ({"bbox": [5.0, 5.0, 9.0, 0.0]}, ["boxes are empty"]),
        (
            {"bbox": [0.1, 0.1, 0.5, 0.5]},
            ["boxes lie in 0..2, like shares of the image; they are pixels"],
        ),
        ({"bbox": [5.0, 198.0, 1.0, 9.0]}, [beyond]),  # beyond the lower edge alone
        ({"bbox": [100.0, 100.0, 100.0, 200.0]}, [f"{beyond}; as x1, y1, x2, y2 they would fit"]),
    ):
        assert doubts_about(truth, [sound | change]) == [f"1 of 1 {doubt}" for doubt in doubts]
