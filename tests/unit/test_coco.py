"""COCO files, their cached tables, and the data set a config names."""

import gc
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from mimdet import files
from mimdet.analysis.metrics import coco_metrics
from mimdet.config import DataConfig
from mimdet.data import coco
from mimdet.data.annotations import (
    AnnotationEntry,
    Side,
    Whole,
    checked,
    clipped_box,
    mask_area,
    mask_extent,
    ring_area,
)
from mimdet.data.coco import CocoDataset, build_dataset
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
    names = {"left": "a.png", 7: "b.png", 3: "c.png"}
    images = [{"id": i, "file_name": n, "height": 20, "width": 30} for i, n in names.items()]
    first = {"image_id": "left", "iscrowd": 0}
    strip = {"category_id": 5, "bbox": [0, 0, 2, 20], "segmentation": RUNS}
    square = {"category_id": 90, "bbox": [2, 2, 8, 8], "segmentation": SQUARE}
    crowd = {"image_id": 3, "iscrowd": 1, "area": 33} | strip
    annotations = [{"id": 0} | square | first, {"id": 1} | strip | first, {"id": 2} | crowd]
    categories = [{"id": 90, "name": "cup"}, {"id": 5, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, content: dict) -> tuple[Path, Path]:
    """-> (json file, image folder) with a grey PNG for every image of the content."""
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    for image in content["images"]:
        Image.new("RGB", (30, 20), (1, 2, 3)).save(folder / image["file_name"])
    return path, folder


def test_records_of_a_small_file(tmp_path, content):
    dataset = CocoDataset(*write(tmp_path, content))
    assert dataset.categories == ["cat", "cup"] and dataset.category_ids == [5, 90]
    assert dataset.has_masks and len(dataset) == 3
    assert [dataset.image_id(i) for i in range(3)] == ["left", 7, 3]
    assert dataset.image_size(1) == (20, 30)

    record = dataset[0]
    assert record.image_id == "left" and record.image.dtype == torch.uint8
    assert record.image.shape == (3, 20, 30) and record.image[:, 0, 0].tolist() == [1, 2, 3]
    assert record.target.boxes.tolist() == [[2, 2, 10, 10], [0, 0, 2, 20]]
    assert record.target.labels.tolist() == [1, 0]
    assert record.target.labels.dtype == torch.int64 and record.target.boxes.dtype == torch.float32
    inner = record.target.masks.bitmaps[:, 1:-1, 1:-1].float().mean((1, 2))
    assert (inner > 0.95).all()  # both masks fill their boxes

    for index in (1, 2):  # the empty image and the one with a crowd only
        assert len(dataset[index].target) == 0 and len(dataset[index].target.masks) == 0

    copied = pickle.loads(pickle.dumps(dataset))  # as it travels to another process
    assert torch.equal(copied[0].target.masks.bitmaps, record.target.masks.bitmaps)
    assert copied.ground_truth() == dataset.ground_truth()


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


def test_ground_truth_keeps_crowds_and_renumbers_and_may_be_boxes_only(tmp_path, content):
    truth = CocoDataset(*write(tmp_path, content)).ground_truth()
    fields = ("id", "category_id", "image_id", "iscrowd", "area")  # two areas computed, one given
    rows = [tuple(a[field] for field in fields) for a in truth["annotations"]]
    assert rows == [(1, 90, "left", 0, 64), (2, 5, "left", 0, 40), (3, 5, 3, 1, 33)]
    assert truth["annotations"][0]["segmentation"] == SQUARE
    assert coco_mask.decode(truth["annotations"][1]["segmentation"])[:, :2].sum() == 40
    assert [image["id"] for image in truth["images"]] == ["left", 7, 3]
    assert [c["id"] for c in truth["categories"]] == [5, 90]
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    dataset = CocoDataset(*write(tmp_path, content))
    assert not dataset.has_masks and dataset[0].target.masks is None
    assert dataset[0].target.boxes.shape == (2, 4)
    assert "segmentation" not in dataset.ground_truth()["annotations"][0]
    assert dataset.ground_truth()["annotations"][0]["area"] == 64


def test_limit_and_skip_empty(tmp_path, content):
    paths = write(tmp_path, content)
    assert [CocoDataset(*paths, limit=2).image_id(i) for i in range(2)] == ["left", 7]
    trainable = CocoDataset(*paths, skip_empty=True)
    assert len(trainable) == 1 and trainable.image_id(0) == "left"
    assert len(CocoDataset(*paths, limit=3).ground_truth()["images"]) == 3
    content["annotations"] = []
    with pytest.raises(ValueError, match=r"no images with objects"):
        CocoDataset(*write(tmp_path, content), skip_empty=True)


def test_boxes_are_clipped_and_empty_boxes_and_masks_left_out(tmp_path, content):
    content["annotations"][0]["bbox"] = [-5, 3, 10, 100]
    content["annotations"][1]["bbox"] = [4, 4, 0, 7]
    with pytest.warns(UserWarning, match=r"1 empty-box \(annotations.1., annotation 1, image"):
        dataset = CocoDataset(*write(tmp_path, content))
    assert dataset[0].target.boxes.tolist() == [[0, 3, 5, 20]]
    assert len(dataset.ground_truth()["annotations"]) == 3
    content["annotations"][0]["segmentation"] = [[1, 1, 5, 5]]
    content["annotations"][1] |= {"segmentation": RUNS | {"counts": [600]}, "bbox": [0, 0, 2, 20]}
    with pytest.warns(UserWarning, match=r"1 polygon-too-short .*; 2 segmentation-empty"):
        dataset = CocoDataset(*write(tmp_path, content))
    assert len(dataset[0].target) == 0


GONE = object()
"""As the value of a field: it is taken out."""
FAULTS = [
    # (message, section, entry, fields that are set); check-data's tests plant every kind
    (r"categories.1.*id 90 is also that of categories.0", "categories", 1, {"id": 90}),
    ("annotation 0.*missing required field `bbox`", "annotations", 0, {"bbox": GONE}),
    ("polygon 0 has an odd number", "annotations", 0, {"segmentation": [[1, 2, 3]]}),
    ("runs cover 44 of 600", "annotations", 1, {"segmentation": RUNS | {"counts": "0X14"}}),
    ("annotation 1.*malformed", "annotations", 1, {"segmentation": RUNS | {"counts": "ooo"}}),
    ("height comes first", "annotations", 1, {"segmentation": RUNS | {"size": [30, 20]}}),
    ("annotation 0.*category_id 77 is not", "annotations", 0, {"category_id": 77}),
    ("annotation 0.*image_id 'gone' is not", "annotations", 0, {"image_id": "gone"}),
    (r"images.2.*id 7 is also that of images.1", "images", 2, {"id": 7}),
]


@pytest.mark.parametrize(("message", "section", "index", "fields"), FAULTS)
def test_faults_name_file_and_entry(tmp_path, content, cache, message, section, index, fields):
    path, folder = write(tmp_path, content)
    entry = content[section][index] | fields
    content[section][index] = {key: value for key, value in entry.items() if value is not GONE}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        CocoDataset(path, folder)
    assert "instances.json" in str(caught.value)
    assert not list(cache.glob("*"))


def test_files_that_are_not_there_or_not_json(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"nothing.json does not exist"):
        CocoDataset(tmp_path / "nothing.json", tmp_path)
    path, folder = write(tmp_path, content)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"instances.json: it is not a json file"):
        CocoDataset(path, folder)
    for message, text in {
        "not a COCO instances file": "[1, 2]",
        "missing required field `images`": "{}",
        "has no categories": json.dumps(content | {"categories": []}),
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"instances.json: .*{message}"):
            CocoDataset(path, folder)


def test_missing_and_wrong_images(tmp_path, content):
    path, folder = write(tmp_path, content)
    dataset = CocoDataset(path, folder)
    (folder / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json.*b\.png.*mimdet check-data"):
        dataset[1]
    Image.new("RGB", (20, 30)).save(folder / "c.png")
    swapped = r"instances\.json.*c\.png.*say 30 x 20 .swapped., the file is 20 x 30"
    with pytest.raises(ValueError, match=swapped):
        dataset[2]
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.png cannot be read.*mimdet check-data"):
        dataset[0]
    with pytest.raises(FileNotFoundError, match=r"elsewhere is not a folder"):
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
    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CocoDataset(*paths)
    assert not list(cache.iterdir()) and gc.isenabled()  # which was off while it was built
    monkeypatch.undo()
    monkeypatch.setenv("MIMDET_CACHE", str(cache))
    assert len(CocoDataset(*paths)) == 3


@pytest.mark.parametrize("damage", ["half", "empty", "one byte", "garbage"])
def test_a_damaged_table_is_made_again(tmp_path, content, cache, damage):
    paths = write(tmp_path, content)
    first = CocoDataset(*paths).ground_truth()
    (table,) = cache.iterdir()
    sound = table.read_bytes()
    middle = len(sound) // 2
    flipped = bytes([sound[middle] ^ 1])
    damaged = {"half": sound[:middle], "empty": b"", "garbage": b"ARROW1" * 1000}
    damaged["one byte"] = sound[:middle] + flipped + sound[middle + 1 :]
    table.write_bytes(damaged[damage])
    with pytest.warns(UserWarning, match=r"\.arrow is damaged: it is made again"):
        again = CocoDataset(*paths)
    assert again.ground_truth() == first and table.read_bytes() == sound


def test_boxes_of_a_mixed_file(tmp_path, content):
    """Some objects have a segmentation and some have none: boxes can be trained on all the same."""
    del content["annotations"][1]["segmentation"]
    paths = [str(path) for path in write(tmp_path, content)]
    said = r"instances.json.*annotation 1.*this one has not \(segmentation-missing.*"
    said += r"in all: 1\).*--no-masks"
    with pytest.raises(ValueError, match=said):
        CocoDataset(*paths)
    cfg = DataConfig(source="coco", train_json=paths[0], train_images=paths[1])
    dataset = build_dataset(cfg, "train", masks=False)
    assert not dataset.has_masks and dataset[0].target.masks is None
    assert len(dataset[0].target) == 2


def test_a_link_out_of_the_folder_is_named_once(tmp_path, content):
    (tmp_path / "images").mkdir()
    path, folder = write(tmp_path / "images", content)
    for name in ("a.png", "b.png"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    dataset = CocoDataset(path, folder)
    with pytest.warns(UserWarning, match=r"'a\.png': it leads to .*link-leaves-folder") as said:
        assert [len(dataset[i].target) for i in range(3)] == [2, 0, 0]
    assert ["link" in str(one.message) for one in said].count(True) == 1


def test_many_at_once_make_one_table(tmp_path, content, cache, monkeypatch):
    """One builds it, the others wait for that and read; of several processes too."""
    paths, built = write(tmp_path, content), []

    def slowly(*given):
        built.append(given)
        time.sleep(0.3)
        build(*given)

    build = coco._build
    monkeypatch.setattr(coco, "_build", slowly)
    with ThreadPoolExecutor(8) as pool:
        datasets = list(pool.map(lambda _: CocoDataset(*paths), range(16)))
    assert len(built) == 1
    assert all(len(dataset[0].target) == 2 for dataset in datasets)
    assert [path.suffix for path in cache.iterdir()] == [".arrow"]


def test_without_a_cache_folder_it_is_done_without(tmp_path, content, monkeypatch):
    paths = write(tmp_path, content)
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("MIMDET_CACHE", str(tmp_path / "taken"))
    with pytest.warns(UserWarning, match=r"taken.*cannot be written .*MIMDET_CACHE"):
        dataset = CocoDataset(*paths)
    assert len(pickle.loads(pickle.dumps(dataset))[0].target) == 2


@pytest.mark.parametrize(
    ("message", "split", "fields"),
    [
        ("data.train_json is empty", "train", {"source": "coco"}),
        ("data.val_images is empty", "val", {"source": "coco", "val_json": "x.json"}),
        ("data.hub_name is empty", "train", {"source": "hub"}),
        ("data.source='voc'", "train", {"source": "voc"}),
        ("does not read data.train_json", "val", {"train_json": "x.json"}),
        ("split='test'", "test", {}),
    ],
)
def test_build_dataset_says_what_is_missing(message, split, fields):
    with pytest.raises(ValueError, match=message):
        build_dataset(DataConfig(**fields), split)


def test_build_dataset_opens_coco_files_and_makes_shapes(tmp_path, content):
    path, folder = (str(path) for path in write(tmp_path, content))
    cfg = DataConfig(source="coco", train_json=path, train_images=folder, limit_val=2)
    cfg.val_json, cfg.val_images = path, folder
    assert len(build_dataset(cfg, "train")) == 1  # only there are empty images left out
    assert len(build_dataset(cfg, "val")) == 2

    cfg = DataConfig(shapes_size=64, shapes_train=50, limit_train=9, shapes_val=5)
    train, val = build_dataset(cfg, "train", seed=3), build_dataset(cfg, "val", seed=3)
    assert (len(train), len(val)) == (9, 5)
    other_seed = build_dataset(cfg, "val", seed=4)
    assert torch.equal(val[0].image, other_seed[0].image)  # evaluation is the same for every seed
    assert not torch.equal(train[0].image, build_dataset(cfg, "train", seed=4)[0].image)


def overlaps(mine: np.ndarray, theirs: np.ndarray) -> list[float]:
    """IoU of each pair of masks, both (N, H, W) bool."""
    both, either = (mine & theirs).sum((1, 2)), (mine | theirs).sum((1, 2))
    return (both / either.clip(1)).tolist()


def full_masks(dataset: CocoDataset, index: int) -> np.ndarray:
    return crops_to_bitmaps(dataset[index].target.masks, *dataset.image_size(index)).numpy()


@pytest.mark.parametrize(("split", "images", "objects"), [("train", 268, 2300), ("val", 75, 674)])
def test_real_coco(shared_data, split, images, objects):
    """Every third image loads; masks agree with pycocotools on the full image."""
    folder = shared_data / "coco"
    path = folder / "annotations" / f"instances_{split}2017.json"
    dataset = CocoDataset(path, folder / f"{split}2017")
    assert len(dataset) == images and dataset.categories[0] == "person"
    truth = dataset.ground_truth()["annotations"]
    assert len(truth) == objects
    found = []
    for index in range(0, len(dataset), 3):
        mine = full_masks(dataset, index)
        theirs = np.zeros_like(mine)
        single = [a for a in truth if a["image_id"] == dataset.image_id(index) and not a["iscrowd"]]
        for mask, item in zip(theirs, single, strict=True):
            parts = coco_mask.frPyObjects(item["segmentation"], *dataset.image_size(index))
            mask[:] = coco_mask.decode(coco_mask.merge(parts))
        found += overlaps(mine, theirs)
    assert np.mean(found) > 0.97 and np.min(found) > 0.8


def test_the_picture_that_comes_with_the_package():
    """Nine tiles that fit together; no pixel belongs to two nuclei, and nuclei are brighter."""
    train, val = coco.Nuclei("train"), coco.Nuclei("val")
    records = [*train, *val]
    tiles = [record.image[0] for record in records]
    whole = torch.cat([torch.cat(tiles[row : row + 3], 1) for row in (0, 3, 6)])
    assert whole.shape == (512, 512) and train.categories == val.categories == ["nucleus"]
    assert sum(len(record.target) for record in train) == 94
    assert sum(len(record.target) for record in val) == 49
    for record in records:
        height, width = record.image.shape[1:]
        layers = crops_to_bitmaps(record.target.masks, height, width).sum(0)
        assert layers.max() == 1
        inside, outside = (record.image[0][layers == n].float().mean() for n in (1, 0))
        assert inside > 1.5 * outside
    named = build_dataset(DataConfig(source="nuclei", limit_val=2), "val")
    assert len(named) == 2 and named.version == val.version
    with pytest.raises(ValueError, match=r"'nuclei' does not read data\.train_json.*--source coco"):
        build_dataset(DataConfig(source="nuclei", train_json="own.json"), "train")


def test_real_nuclei_polygons_and_runs_agree(shared_data):
    folder = shared_data / "nuclei"
    polygons, runs = (
        CocoDataset(folder / "annotations" / name, folder / "val")
        for name in ("instances_val.json", "instances_val_rle.json")
    )
    assert len(polygons) == len(runs) == 60
    found = []
    for index in range(len(polygons)):
        assert torch.equal(polygons[index].target.boxes, runs[index].target.boxes)
        found += overlaps(full_masks(polygons, index), full_masks(runs, index))
    assert len(found) == 1649
    assert np.mean(found) > 0.999 and np.min(found) > 0.95


@pytest.mark.parametrize(
    ("kind", "least", "most"), [(Whole, -(2**63), 2**63 - 1), (Side, 1, 2**31 - 1)]
)
def test_numbers_of_a_file_have_limits(kind, least, most):
    """Of ids, what a table holds; of sides, what pycocotools counts with."""
    assert [msgspec.convert(value, kind) for value in (least, most)] == [least, most]
    for value in (least - 1, most + 1):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(value, kind)


def test_boxes_and_masks_by_hand():
    triangle, line = [3.0, 4.0, 7.0, 4.0, 3.0, 8.0], [0.0, 1.0, 9.0, 9.0]
    assert mask_extent([triangle, line]) == mask_extent([triangle]) == (3, 4, 7, 8)
    assert mask_extent([triangle, [0.0, 9.0, 5.0, 5.0, 1.0, 6.0]]) == (0, 4, 7, 9)
    assert mask_extent([line]) == mask_extent(None) == (0, 0, 0, 0)
    assert ring_area(triangle) == 8 and ring_area(triangle[::-1]) == 8
    areas = [
        mask_area(mask, box, 20, 30)
        for box, mask in (
            ((0.0, 0.0, 0.5, 0.5), None),
            ((0.0, 0.0, -2.0, -3.0), None),
            ((0.0, 0.0, 2.0, 3.0), [line]),
            ((0.0, 0.0, 1.0, 1.0), SQUARE),
        )
    ]
    assert areas == [0.25, 0, 6, 64]
    assert clipped_box((-5.0, -4.0, 50.0, 60.0), 20, 30) == (0, 0, 30, 20)

    def read(box, mask):
        return checked(AnnotationEntry(1, 1, box), mask, 20, 30, lambda *_: None)

    square = (0.0, 0.0, 0.5, 0.5)
    assert [bool(read(square, mask).left_out) for mask in (None, [triangle], [line])] == [0, 0, 1]
    thin = [(0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0), (30.0, 0.0, 1.0, 1.0)]
    assert all(read(box, None).left_out for box in thin)
    assert read(square, [[0.0, 0.0, 300.0, 0.0, 5.0, 5.0]]).left_out == ""
    with pytest.raises(ValueError, match="a polygon leaves its image by 10 times"):
        read(square, [[0.0, 0.0, 301.0, 0.0, 5.0, 5.0]])
