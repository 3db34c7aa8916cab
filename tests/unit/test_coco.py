"""COCO files, their cached tables, and the data set a config names."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from mimdet.analysis.metrics import coco_metrics
from mimdet.config import DataConfig
from mimdet.data import coco
from mimdet.data.coco import CocoDataset, build_dataset
from mimdet.data.coco_file import clipped_box
from mimdet.structures import crops_to_bitmaps

SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]]
RUNS = {"size": [20, 30], "counts": [0, 40, 560]}  # the two leftmost columns, by columns


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MIMDET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def content() -> dict:
    """Three images of 20 x 30 (H x W): one with all kinds of annotations, one empty, one crowd."""
    images = [
        {"id": "left", "file_name": "a.png", "height": 20, "width": 30},
        {"id": 7, "file_name": "b.png", "height": 20, "width": 30},
        {"id": 3, "file_name": "c.png", "height": 20, "width": 30},
    ]
    first = {"image_id": "left", "iscrowd": 0}
    annotations = [
        {"id": 0, "category_id": 90, "bbox": [2, 2, 8, 8], "segmentation": SQUARE} | first,
        {"id": 1, "category_id": 5, "bbox": [0, 0, 2, 20], "segmentation": RUNS} | first,
        {
            "id": 2,
            "image_id": 3,
            "category_id": 5,
            "bbox": [0, 0, 2, 20],
            "segmentation": RUNS,
            "iscrowd": 1,
            "area": 33,
        },
    ]
    categories = [{"id": 90, "name": "cup"}, {"id": 5, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, content: object) -> tuple[Path, Path]:
    """-> (json file, image folder) with a grey PNG for every image of the content."""
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    for image in content["images"] if isinstance(content, dict) else []:
        Image.new("RGB", (30, 20), (1, 2, 3)).save(folder / image["file_name"])
    return path, folder


def test_records_of_a_small_file(tmp_path, content):
    dataset = CocoDataset(*write(tmp_path, content))
    assert dataset.categories == ["cat", "cup"] and dataset.category_ids == [5, 90]
    assert dataset.has_masks and len(dataset) == 3
    assert [dataset.image_id(i) for i in range(3)] == ["left", 7, 3]
    assert dataset.image_size(1) == (20, 30)

    record = dataset[0]
    assert record.image_id == "left"
    assert record.image.dtype == torch.uint8 and record.image.shape == (3, 20, 30)
    assert record.image[:, 0, 0].tolist() == [1, 2, 3]
    assert record.target.boxes.tolist() == [[2, 2, 10, 10], [0, 0, 2, 20]]
    assert record.target.labels.tolist() == [1, 0]
    assert record.target.labels.dtype == torch.int64 and record.target.boxes.dtype == torch.float32
    inner = record.target.masks.bitmaps[:, 1:-1, 1:-1].float().mean((1, 2))
    assert (inner > 0.95).all()  # both masks fill their boxes

    for index in (1, 2):  # the empty image and the one with a crowd only
        assert len(dataset[index].target) == 0 and len(dataset[index].target.masks) == 0


def test_a_crowd_without_a_mask_is_its_box(tmp_path, content):
    """Detections there count neither as found nor as wrong, for masks as for boxes."""
    del content["annotations"][2]["segmentation"]
    truth = CocoDataset(*write(tmp_path, content)).ground_truth()
    assert truth["annotations"][2]["segmentation"] == [[0, 0, 2, 0, 2, 20, 0, 20]]
    bitmap = np.zeros((20, 30), np.uint8, order="F")
    bitmap[:20, :2] = 1
    wrong = {"image_id": 3, "category_id": 5, "bbox": [0, 0, 2, 20], "score": 0.9}
    wrong["segmentation"] = coco_mask.encode(bitmap)
    right = wrong | {"image_id": "left", "score": 0.5}
    metrics = coco_metrics(truth, [wrong, right], ["bbox", "segm"])
    assert metrics.box_per_class["cat"] == metrics.mask_per_class["cat"] == 1.0


def test_ground_truth_keeps_crowds_and_renumbers(tmp_path, content):
    truth = CocoDataset(*write(tmp_path, content)).ground_truth()
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3]
    assert [a["category_id"] for a in truth["annotations"]] == [90, 5, 5]
    assert [a["image_id"] for a in truth["annotations"]] == ["left", "left", 3]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 0, 1]
    assert [a["area"] for a in truth["annotations"]] == [64, 40, 33]  # two computed, one given
    assert truth["annotations"][0]["segmentation"] == SQUARE
    assert coco_mask.decode(truth["annotations"][1]["segmentation"])[:, :2].sum() == 40
    assert [image["id"] for image in truth["images"]] == ["left", 7, 3]
    assert [c["id"] for c in truth["categories"]] == [5, 90]


def test_limit_and_skip_empty(tmp_path, content):
    paths = write(tmp_path, content)
    assert [CocoDataset(*paths, limit=2).image_id(i) for i in range(2)] == ["left", 7]
    trainable = CocoDataset(*paths, skip_empty=True)
    assert len(trainable) == 1 and trainable.image_id(0) == "left"
    assert len(CocoDataset(*paths, limit=3).ground_truth()["images"]) == 3
    content["annotations"] = []
    with pytest.raises(ValueError, match=r"no images with objects"):
        CocoDataset(*write(tmp_path, content), skip_empty=True)


def test_boxes_are_clipped_and_empty_ones_left_out(tmp_path, content):
    assert clipped_box([-5, 3, 10, 100], 20, 30) == (0, 3, 5, 20)
    content["annotations"][0]["bbox"] = [-5, 3, 10, 100]
    content["annotations"][1]["bbox"] = [4, 4, 0, 7]
    with pytest.warns(UserWarning, match=r"annotations 1, \.\.\. have an empty box"):
        dataset = CocoDataset(*write(tmp_path, content))
    assert dataset[0].target.boxes.tolist() == [[0, 3, 5, 20]]
    assert len(dataset.ground_truth()["annotations"]) == 3


def test_empty_masks_are_left_out(tmp_path, content):
    content["annotations"][0]["segmentation"] = [[1, 1, 5, 5]]
    content["annotations"][1]["segmentation"] = {"size": [20, 30], "counts": [600]}
    with pytest.warns(UserWarning, match=r"annotations 0, 1, \.\.\."):
        dataset = CocoDataset(*write(tmp_path, content))
    assert len(dataset[0].target) == 0


def test_boxes_only(tmp_path, content):
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    dataset = CocoDataset(*write(tmp_path, content))
    assert not dataset.has_masks and dataset[0].target.masks is None
    assert dataset[0].target.boxes.shape == (2, 4)
    assert "segmentation" not in dataset.ground_truth()["annotations"][0]
    assert dataset.ground_truth()["annotations"][0]["area"] == 64


FAULTS = {
    "some have none.*annotations 1": lambda c: c["annotations"][1].pop("segmentation"),
    "missing required field `images`": lambda c: c.pop("images"),
    "has no categories": lambda c: c.update(categories=[]),
    r"categories.2.*id 5 is also that of categories.1": lambda c: c["categories"].append(
        {"id": 5, "name": "x"}
    ),
    r"categories.0.: .*got `bool` - at `\$.id`": lambda c: c["categories"][0].update(id=True),
    "annotation 0.*missing required field `bbox`": lambda c: c["annotations"][0].pop("bbox"),
    "annotation 1.*`array` of length 4": lambda c: c["annotations"][1].update(bbox=[1, 2, 3]),
    r"annotation 2.*got `str` - at `\$.bbox.2.`": lambda c: c["annotations"][2].update(
        bbox=[0, 0, float("nan"), 2]
    ),
    r"annotation 0.*`float`, got `str` - at `\$.bbox": lambda c: c["annotations"][0].update(
        bbox=list("abcd")
    ),
    r"annotation 0.*at `\$.iscrowd`": lambda c: c["annotations"][0].update(iscrowd="false"),
    r"annotation 0.*got `float` - at `\$.category_id`": lambda c: c["annotations"][0].update(
        category_id=1.7
    ),
    "odd number of coordinates": lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]),
    "runs cover 3 of 600": lambda c: set_runs(c, {"size": [20, 30], "counts": [1, 2]}),
    "runs cover 44 of 600": lambda c: set_runs(c, {"size": [20, 30], "counts": "0X14"}),
    "annotation 1.*malformed": lambda c: set_runs(c, {"size": [20, 30], "counts": "ooo"}),
    r"for \(9, 9\) pixels": lambda c: set_runs(c, {"size": [9, 9], "counts": "abc"}),
    r"for \(30, 20\).*height comes first": lambda c: set_runs(c, {"size": [30, 20], "counts": ""}),
    "annotation 0.*category_id 77 is not": lambda c: c["annotations"][0].update(category_id=77),
    "annotation 0.*image_id 'gone' is not": lambda c: c["annotations"][0].update(image_id="gone"),
    r"images.2.*id 7 is also that of images.1": lambda c: c["images"][2].update(id=7),
    "missing required field `file_name`": lambda c: c["images"][0].pop("file_name"),
    r"`int` >= 1 - at `\$.height`": lambda c: c["images"][0].update(height=0),
    r"images.0., .*`int . str`, got `array` - at `\$.id`": lambda c: c["images"][0].update(id=[1]),
}


def set_runs(content: dict, runs: dict) -> None:
    content["annotations"][1]["segmentation"] = runs


@pytest.mark.parametrize("message", FAULTS)
def test_faults_name_file_and_entry(tmp_path, content, cache, message):
    faulty = copy.deepcopy(content)
    FAULTS[message](faulty)
    paths = write(tmp_path, content)[0], tmp_path
    paths[0].write_text(json.dumps(faulty))
    with pytest.raises(ValueError, match=message) as caught:
        CocoDataset(*paths)
    assert "instances.json" in str(caught.value)
    assert message.startswith("some") or not list(cache.glob("*"))


def test_files_that_are_not_there_or_not_json(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"nothing.json does not exist"):
        CocoDataset(tmp_path / "nothing.json", tmp_path)
    path, folder = write(tmp_path, content)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"instances.json: it is not a json file"):
        CocoDataset(path, folder)
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"not a COCO instances file"):
        CocoDataset(path, folder)


def test_missing_and_wrong_images(tmp_path, content):
    path, folder = write(tmp_path, content)
    dataset = CocoDataset(path, folder)
    (folder / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png.*instances\.json.*mimdet check-data"):
        dataset[1]
    Image.new("RGB", (20, 30)).save(folder / "c.png")
    with pytest.raises(ValueError, match=r"c\.png is 20 x 30.*instances\.json says 30 x 20.*EXIF"):
        dataset[2]
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.png cannot be read.*mimdet check-data"):
        dataset[0]
    with pytest.raises(FileNotFoundError, match=r"check the image folder"):
        CocoDataset(path, folder / "elsewhere")


def test_the_table_is_built_once_and_anew_for_new_content(tmp_path, content, cache, monkeypatch):
    paths = write(tmp_path, content)
    first = CocoDataset(*paths)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(coco, "CocoReader", None)  # a second reading would fail
    again = CocoDataset(*paths)
    assert torch.equal(again[0].target.boxes, first[0].target.boxes)
    monkeypatch.undo()
    monkeypatch.setenv("MIMDET_CACHE", str(cache))
    content["annotations"][0]["bbox"] = [1, 1, 3, 3]
    assert CocoDataset(*write(tmp_path, content))[0].target.boxes[0].tolist() == [1, 1, 4, 4]
    assert len(list(cache.iterdir())) == 2
    assert again.version == first.version != CocoDataset(*paths).version


def test_an_interruption_leaves_no_partial_table(tmp_path, content, cache, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    paths = write(tmp_path, content)
    monkeypatch.setattr(coco.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CocoDataset(*paths)
    assert not list(cache.iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("MIMDET_CACHE", str(cache))
    assert len(CocoDataset(*paths)) == 3


def test_many_at_once_make_one_table(tmp_path, content, cache):
    paths = write(tmp_path, content)
    with ThreadPoolExecutor(8) as pool:
        datasets = list(pool.map(lambda _: CocoDataset(*paths), range(16)))
    assert all(len(dataset[0].target) == 2 for dataset in datasets)
    assert [path.suffix for path in cache.iterdir()] == [".arrow"]


def test_a_data_set_travels_to_another_process(tmp_path, content):
    dataset = CocoDataset(*write(tmp_path, content))
    copied = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copied[0].target.masks.bitmaps, dataset[0].target.masks.bitmaps)
    assert copied.ground_truth() == dataset.ground_truth()


def test_build_dataset_says_what_is_missing(tmp_path, content):
    with pytest.raises(ValueError, match=r"data.train_json is empty"):
        build_dataset(DataConfig(source="coco"), "train")
    with pytest.raises(ValueError, match=r"data.val_images is empty"):
        build_dataset(DataConfig(source="coco", val_json="x.json"), "val")
    with pytest.raises(ValueError, match=r"data.hub_name is empty"):
        build_dataset(DataConfig(source="hub"), "train")
    with pytest.raises(ValueError, match=r"data.source='voc'"):
        build_dataset(DataConfig(source="voc"), "train")
    with pytest.raises(ValueError, match=r"split='test'"):
        build_dataset(DataConfig(), "test")
    json_path, folder = (str(path) for path in write(tmp_path, content))
    cfg = DataConfig(
        source="coco",
        train_json=json_path,
        train_images=folder,
        val_json=json_path,
        val_images=folder,
        limit_val=2,
    )
    assert len(build_dataset(cfg, "train")) == 1  # only there are empty images left out
    assert len(build_dataset(cfg, "val")) == 2


def test_build_dataset_makes_shapes():
    cfg = DataConfig(shapes_size=64, shapes_train=50, limit_train=9, shapes_val=5)
    train, val = build_dataset(cfg, "train", seed=3), build_dataset(cfg, "val", seed=3)
    assert (len(train), len(val)) == (9, 5)
    other_seed = build_dataset(cfg, "val", seed=4)
    assert torch.equal(val[0].image, other_seed[0].image)  # evaluation is the same for every seed
    assert not torch.equal(train[0].image, build_dataset(cfg, "train", seed=4)[0].image)


@pytest.mark.parametrize(("split", "images"), [("train", 268), ("val", 75)])
def test_real_coco(shared_data, split, images):
    """Every third image loads; masks agree with pycocotools on the full image."""
    folder = shared_data / "coco"
    dataset = CocoDataset(
        folder / "annotations" / f"instances_{split}2017.json", folder / f"{split}2017"
    )
    assert len(dataset) == images and dataset.categories[0] == "person"
    truth = dataset.ground_truth()
    assert len(truth["annotations"]) == {"train": 2300, "val": 674}[split]
    overlaps = []
    for index in range(0, len(dataset), 3):
        record = dataset[index]
        height, width = dataset.image_size(index)
        objects = [
            a for a in truth["annotations"] if a["image_id"] == record.image_id and not a["iscrowd"]
        ]
        for mine, item in zip(
            crops_to_bitmaps(record.target.masks, height, width).numpy(), objects, strict=True
        ):
            runs = coco_mask.merge(coco_mask.frPyObjects(item["segmentation"], height, width))
            theirs = coco_mask.decode(runs).astype(bool)
            overlaps.append((mine & theirs).sum() / max(1, (mine | theirs).sum()))
    assert np.mean(overlaps) > 0.97 and np.min(overlaps) > 0.8


def test_real_nuclei_polygons_and_runs_agree(shared_data):
    folder = shared_data / "nuclei"
    polygons, runs = (
        CocoDataset(folder / "annotations" / name, folder / "val")
        for name in ("instances_val.json", "instances_val_rle.json")
    )
    assert len(polygons) == len(runs) == 60
    overlaps = []
    for index in range(len(polygons)):
        a, b = polygons[index].target, runs[index].target
        assert torch.equal(a.boxes, b.boxes)
        height, width = polygons.image_size(index)
        first, second = (crops_to_bitmaps(t.masks, height, width).numpy() for t in (a, b))
        both, either = (first & second).sum((1, 2)), (first | second).sum((1, 2))
        overlaps += (both / either.clip(1)).tolist()
    assert len(overlaps) == 1649
    assert np.mean(overlaps) > 0.999 and np.min(overlaps) > 0.95
