"""Detections as COCO results and results as a file."""

import json

import pytest
import torch
from pycocotools.coco import COCO

from mimdet.analysis.evaluate import results_for, save_results
from mimdet.structures import Detections, rle_to_bitmap
from tests.small import nothing_found


def two_detections(masks: bool = True) -> Detections:
    return Detections(
        boxes=torch.tensor([[1.0, 2.0, 5.0, 4.0], [0.5, 0.0, 3.0, 6.0]]),
        scores=torch.tensor([0.75, 0.5]),
        labels=torch.tensor([1, 0]),
        image_size=(6, 8),
        mask_probabilities=torch.ones(2, 28, 28) if masks else None,
    )


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
    truth.dataset = {
        "images": [{"id": 42, "height": 6, "width": 8}],
        "categories": [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}],
        "annotations": [],
    }
    truth.createIndex()
    loaded = truth.loadRes(str(path))
    assert loaded.annToMask(loaded.loadAnns([1])[0]).sum() == 8

    def disk_full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_results([{"score": 2.0}], path)
    assert json.loads(path.read_text()) == results and list(tmp_path.iterdir()) == [path]
