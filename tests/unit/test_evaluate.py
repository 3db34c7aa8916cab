"""evaluate: a perfect detector scores 1, draws are reproducible, batches do not matter; and its
results as COCO's and as a file."""

import copy
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from pycocotools.coco import COCO

import mimdet
from mimdet.analysis.evaluate import (
    belonging,
    check_belonging,
    evaluate,
    evaluate_ratios,
    image_seed,
    ratio_row,
    ratio_table,
    results_for,
    save_evaluation,
    save_results,
)
from mimdet.config import model_part
from mimdet.data.loader import ids_of_labels
from mimdet.structures import Detections, rle_to_bitmap
from tests.small import nothing_found, small_detector


@pytest.fixture(scope="module")
def scenes():
    return mimdet.ShapesCOCO(size=64, length=5, split="val")


@pytest.fixture(scope="module")
def model():
    return small_detector()


def test_a_detector_that_returns_the_truth_scores_one(model, scenes, monkeypatch):
    """Everything between the network and the numbers is right: sizes, pasting, ids, areas."""
    truth = iter(range(len(scenes)))

    def oracle(images, **_):
        found = []
        for image in images:
            target = scenes[next(truth)].target
            boxes = target.masks.boxes * (image.shape[1] / 64)
            cells = target.masks.bitmaps.float()  # (N, 112, 112): the crop's own grid
            sure = torch.ones(len(target))
            found.append(Detections(boxes, sure, target.labels, tuple(image.shape[1:]), cells))
        return found

    monkeypatch.setattr(model, "detect", oracle)
    evaluation = evaluate(model, scenes)
    assert evaluation.mask["AP"] > 0.97  # masks have passed through 112 x 112 cells
    assert evaluation.box["AP50"] > 0.9  # the crop's box is a ring of cells larger than the object


def test_labels_go_by_names(model, scenes):
    """A file of the same classes in another order, of fewer, and of others."""

    other = SimpleNamespace(categories=["star", "disc"], category_ids=[7, 3])
    assert ids_of_labels(["disc", "ring", "star"], other) == [3, None, 7]
    assert ids_of_labels([], other) == ids_of_labels(["class 1", "class 2"], other) == [7, 3]
    with pytest.raises(ValueError, match="3 classes without names, the data set 2"):
        ids_of_labels(["class 1", "class 2", "class 3"], other)
    with pytest.raises(ValueError, match=r"does not know the classes \['star'\]"):
        ids_of_labels(["disc", "ring"], other)
    named = copy.deepcopy(model)
    named.categories = list(scenes.categories)
    rotated = copy.copy(scenes)
    rotated.categories = [*scenes.categories[1:], scenes.categories[0]]
    rotated.category_ids = list(range(2, 13)) + [1]
    first, second = evaluate(named, scenes).results, evaluate(named, rotated).results
    assert first and first == second
    fewer = copy.copy(scenes)
    fewer.categories, fewer.category_ids = scenes.categories[:11], scenes.category_ids[:11]
    assert ids_of_labels(named.categories, fewer)[-1] is None
    kept = [result for result in first if result["category_id"] != 12]
    fewer.ground_truth = scenes.ground_truth
    assert evaluate(named, fewer).results == kept


def test_a_canvas_larger_than_the_image(model, scenes, monkeypatch):
    """The box of an object is where it was before the canvas."""
    seen = []

    def found(images, **_):
        boxes = torch.tensor([[8.0, 16.0, 24.0, 48.0]])
        one = torch.ones(1)
        seen.append(len(images))
        return [Detections(boxes, one, one.long(), (96, 96), torch.ones(1, 28, 28)) for _ in images]

    monkeypatch.setattr(model, "detect", found)
    monkeypatch.setattr(model, "canvas", 96)  # images of 64 x 64
    results = evaluate(model, scenes).results
    assert results[0]["bbox"] == pytest.approx([8, 16, 16, 32]) and sum(seen) == 5
    boxes = mimdet.predict(model, scenes[0].image).boxes
    assert boxes.tolist() == [[8.0, 16.0, 24.0, 48.0]]


def test_draws_are_reproducible_and_do_not_depend_on_the_batch(model, scenes):
    first = evaluate(model, scenes, sample_ratio=0.25, seed=1, batch_size=1)
    second = evaluate(model, scenes, sample_ratio=0.25, seed=1, batch_size=4)
    other = evaluate(model, scenes, sample_ratio=0.25, seed=2)
    scores = [[r["score"] for r in e.results[:20]] for e in (first, second, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[0] != pytest.approx(scores[2], abs=1e-5)
    seeds = {image_seed(seed, index) for seed in range(5) for index in range(1000)}
    assert len(seeds) == 5000
    assert (image_seed(0, 7), image_seed(2, 7)) == (7, 2_000_013)  # the draws of stored results


def test_results_made_by_another_process_are_the_same(model, scenes):
    """Run lengths of masks beside the model: the same results, in the same order."""
    alone, beside = (evaluate(model, scenes, workers=n, batch_size=2) for n in (0, 1))
    assert alone.results and beside.results == alone.results
    assert beside.metrics == alone.metrics


def test_ratio_rows_by_hand(model, scenes, tmp_path):
    rows = evaluate_ratios(model, scenes, [0.25, 1.0], draws=3, save_to=tmp_path)
    assert [row["draws"] for row in rows] == [3, 1]
    for kind in ("box", "mask"):
        values = torch.tensor([m[kind]["AP"] for m in rows[0]["metrics"]], dtype=torch.float64)
        assert rows[0][f"{kind}_ap"] == pytest.approx(values.mean().item())
        assert rows[0][f"{kind}_ap_sd"] == pytest.approx(values.std().item())
        assert rows[1][f"{kind}_ap_sd"] == 0
    saved = json.loads((tmp_path / "predictions.json").read_text())
    assert saved == evaluate(model, scenes, sample_ratio=1.0).results
    passes = [{"box": {"AP": ap}, "mask": {}} for ap in (0.2, 0.4)]
    row = ratio_row(0.5, passes, 1.234)
    assert (row["box_ap"], row["box_ap_sd"]) == pytest.approx((0.3, 0.02**0.5))
    table = ratio_table([row, ratio_row(1.0, passes[:1], 60.0)])
    assert table.splitlines() == [
        "ratio  draws      box AP     mask AP  s a draw",
        " 0.50      2  30.0 ± 14.1           -       0.6",
        " 1.00      1        20.0           -      60.0",
    ]
    assert len(evaluate_ratios(model, scenes, [0.5], draws=1)[0]["metrics"]) == 1
    for ratios, draws, said in (([0.5], 0, "draws=0"), ([], 1, "at least one share")):
        with pytest.raises(ValueError, match=said):
            evaluate_ratios(model, scenes, ratios, draws=draws)
    assert evaluate_ratios(model, scenes, [0.25, 1.0], known=rows) == rows
    assert [row["about"]["sample_ratio"] for row in rows] == [0.25, 1.0]
    assert [row["about"]["seed"] for row in rows] == [0, 0]  # of the first draw


def test_what_numbers_belong_to(model, scenes):
    about = belonging(model, scenes, 0.5)
    weights = hashlib.sha256()
    for name, value in model.state_dict().items():
        weights.update(name.encode() + value.numpy().tobytes())
    assert about == {
        "step": model.step,
        "sample_ratio": 0.5,
        "keep": "valid",
        "seed": 0,
        "data": scenes.version,
        "images": 5,
        "config": hashlib.sha256(model_part(model.config).encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }
    assert belonging(model, scenes, 0.5, "padded", 3) == about | {"keep": "padded", "seed": 3}


def test_predictions_are_told_by_what_stands_beside_them(model, scenes, tmp_path):
    save_evaluation(evaluate(model, scenes, sample_ratio=0.5, seed=2), tmp_path)
    file = tmp_path / "predictions.json"
    said = check_belonging(tmp_path, scenes.version)
    assert said == f"{file}: step {model.step}, sample ratio 0.5, draw 2"
    with pytest.raises(ValueError, match=r"was made on .*, the data of the run are other data"):
        check_belonging(tmp_path, "other data")
    save_evaluation(evaluate(model, scenes), tmp_path)
    assert check_belonging(tmp_path, scenes.version).endswith("sample ratio 1")
    file.write_text("[]")
    with pytest.raises(ValueError, match="an evaluation was interrupted"):
        check_belonging(tmp_path, scenes.version)
    (tmp_path / "eval.json").unlink()
    said = check_belonging(tmp_path, "any")
    assert said == f"{file}: of another tool, there is no eval.json beside it"


def test_small_means_small_on_a_coco_sized_image(model, scenes, capsys):
    small_ends = evaluate(model, scenes).metrics.area_ranges["small"][1]
    assert small_ends == pytest.approx((32 * 64 / 640) ** 2)
    evaluate(model, scenes)
    assert not capsys.readouterr().out
    evaluate(model, scenes, progress=True, batch_size=2)
    assert "5/5" in capsys.readouterr().out


def two_detections(masks: bool = True) -> Detections:
    boxes = torch.tensor([[1.0, 2.0, 5.0, 4.0], [0.5, 0.0, 3.0, 6.0]])
    scores, labels = torch.tensor([0.75, 0.5]), torch.tensor([1, 0])
    return Detections(boxes, scores, labels, (6, 8), torch.ones(2, 28, 28) if masks else None)


def test_fields_of_a_result() -> None:
    first, second = results_for(two_detections(), 42, [3, 90], has_masks=True)
    rle = first.pop("segmentation")
    assert first == {"image_id": 42, "category_id": 90, "bbox": [1, 2, 4, 2], "score": 0.75}
    assert second["category_id"] == 3 and second["bbox"] == [0.5, 0, 2.5, 6]
    bitmap = rle_to_bitmap(rle)
    assert bitmap.shape == (6, 8) and bitmap[2:4, 1:5].all() and bitmap.sum() == 8
    results = results_for(two_detections(masks=False), "a.jpg", [1, 2], has_masks=False)
    assert [set(result) for result in results] == [{"image_id", "category_id", "bbox", "score"}] * 2
    with pytest.raises(ValueError, match=r"a\.jpg.*no masks"):
        results_for(two_detections(masks=False), "a.jpg", [1, 2], has_masks=True)
    assert results_for(nothing_found(6, 8), 1, [1], has_masks=True) == []


def test_the_file_is_read_by_pycocotools_and_survives_a_failed_write(tmp_path, monkeypatch) -> None:
    path = tmp_path / "predictions.json"
    results = results_for(two_detections(), 42, [3, 90], has_masks=True)
    save_results(results, path)
    truth = COCO()
    truth.dataset = {"images": [{"id": 42, "height": 6, "width": 8}], "annotations": []}
    truth.dataset["categories"] = [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}]
    truth.createIndex()
    loaded = truth.loadRes(str(path))
    assert loaded.annToMask(loaded.loadAnns([1])[0]).sum() == 8

    def disk_full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_results([{"score": 2.0}], path)
    assert json.loads(path.read_text()) == results and list(tmp_path.iterdir()) == [path]
