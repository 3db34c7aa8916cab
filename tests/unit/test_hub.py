"""Hub tables: box formats that are never guessed, both nestings, names, masks."""

import pickle

import datasets
import pytest
import torch
from PIL import Image

from mimdet.config import DataConfig
from mimdet.data.coco import build_dataset
from mimdet.data.hub import HubDataset

SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]]


def hub_table(boxes: list[list[float]], nested: bool = False, **more):
    """One image of 30 x 20 (W x H) with these boxes; the second image has none."""
    picture = Image.new("RGB", (30, 20), (1, 2, 3))
    kinds = datasets.ClassLabel(names=["cat", "cup"])
    columns = {"bbox": boxes, "category": [1] * len(boxes)} | more
    fields = {"bbox": datasets.List(datasets.Value("float64")), "category": kinds}
    if "segmentation" in more:
        fields["segmentation"] = datasets.List(fields["bbox"])
    if nested:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        objects, feature = [rows, []], datasets.List(fields)
    else:
        objects = [columns, {name: [] for name in columns}]
        feature = {name: datasets.List(part) for name, part in fields.items()}
    features = datasets.Features({"image": datasets.Image(), "objects": feature})
    content = {"image": [picture, picture], "objects": objects}
    return datasets.Dataset.from_dict(content, features=features)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("bbox_format", "box"),
    [("xywh", [3, 4, 6, 8]), ("xyxy", [3, 4, 9, 12]), ("cxcywh_normalised", [0.2, 0.4, 0.2, 0.4])],
)
def test_hub_table(bbox_format, box, nested):
    dataset = HubDataset(hub_table([box], nested), bbox_format=bbox_format)
    assert dataset.categories == ["cat", "cup"] and len(dataset) == 2 and not dataset.has_masks
    assert dataset.image_size(0) == (20, 30)
    record = dataset[0]
    torch.testing.assert_close(record.target.boxes, torch.tensor([[3.0, 4.0, 9.0, 12.0]]))
    assert record.target.labels.tolist() == [1] and record.target.masks is None
    assert record.image[:, 0, 0].tolist() == [1, 2, 3] and record.image_id == 0
    (item,) = dataset.ground_truth()["annotations"]
    assert item["bbox"] == pytest.approx([3, 4, 6, 8]) and item["area"] == pytest.approx(48)
    assert item["id"] == 1 and item["category_id"] == dataset.category_ids[1]
    skipped = HubDataset(hub_table([box], nested), bbox_format=bbox_format, skip_empty=True)
    assert len(skipped) == 1 and skipped.version == dataset.version
    other = HubDataset(hub_table([box, box], nested), bbox_format=bbox_format)
    assert other.version != dataset.version
    assert len(pickle.loads(pickle.dumps(dataset))[1].target) == 0


def test_rows_without_objects_categories_or_size():
    picture = Image.new("RGB", (30, 20))
    one = {"bbox": [[1.0, 1, 5, 5]], "category": ["dog"]}
    two = {"bbox": [[1.0, 1, 5, 5]], "category": ["ant"]}
    content = {"image": [picture] * 3, "objects": [one, None, two]}
    content |= {"height": [20, None, 20], "width": [30, None, 30]}
    table = datasets.Dataset.from_dict(content)
    dataset = HubDataset(table, bbox_format="xywh")
    assert len(dataset[1].target) == 0 and dataset.image_size(1) == (20, 30)
    few = HubDataset(table, bbox_format="xywh", limit=2)
    assert len(few) == 2 and few.categories == ["ant", "dog"]  # those of the whole table
    content["objects"][2] = two | {"category": [None]}
    with pytest.raises(ValueError, match="row 2: an object has no category"):
        HubDataset(datasets.Dataset.from_dict(content), bbox_format="xywh")


def test_faulty_rows_are_named():
    unequal = {"bbox": [[1.0, 1, 5, 5]], "category": [0, 1]}
    pictures = [Image.new("RGB", (30, 20))]
    table = datasets.Dataset.from_dict({"image": pictures, "objects": [unequal]})
    with pytest.raises(ValueError, match=r"row 0: .*differ in length"):
        HubDataset(table, bbox_format="xywh")
    with pytest.raises(ValueError, match=r"table is a IterableDataset"):
        HubDataset(table.to_iterable_dataset(), bbox_format="xywh")
    with pytest.raises(ValueError, match=r"row 0: an object has no category"):
        HubDataset(hub_table([[1, 1, 5, 5]], category=[-1]), bbox_format="xywh")
    text = hub_table([[2, 2, 8, 8]], segmentation=[[[1.0, 2, 3]]])
    with pytest.raises(ValueError, match=r"row 0: polygon 0 has an odd number"):
        HubDataset(text, bbox_format="xywh")[0]


def test_ids_of_images_and_faults_of_objects():
    pictures = [Image.new("RGB", (30, 20))] * 2
    objects = {"bbox": [[1.0, 1, 5, 5], [2.0, 2, 0, 5]], "category": ["dog", "dog"]}
    content = {"image": pictures, "objects": [objects] * 2, "image_id": [7, 7]}
    with pytest.raises(ValueError, match="image_id 7 stands in more than one row"):
        HubDataset(datasets.Dataset.from_dict(content), bbox_format="xywh")
    content["image_id"] = [7, 8]
    dataset = HubDataset(datasets.Dataset.from_dict(content), bbox_format="xywh")
    with pytest.warns(UserWarning, match=r"table, row 0: width 0, height 5 .empty-box") as said:
        assert [len(dataset[i].target) for i in range(2)] == [1, 1]
    assert len(said) == 1  # named once


def test_hub_masks():
    table = hub_table([[2, 2, 8, 8]], segmentation=[SQUARE])
    dataset = HubDataset(table, bbox_format="xywh")
    assert dataset.has_masks
    assert dataset[0].target.masks.bitmaps[0, 1:-1, 1:-1].float().mean() > 0.95
    assert dataset.ground_truth()["annotations"][0]["segmentation"] == SQUARE
    half = hub_table([[2, 2, 8, 8]] * 2, segmentation=[SQUARE, []])
    with pytest.raises(ValueError, match=r"1 of 2 objects have no segmentation"):
        HubDataset(half, bbox_format="xywh")
    assert not HubDataset(half, bbox_format="xywh", masks=False).has_masks


@pytest.mark.parametrize(
    ("bbox_format", "box", "message"),
    [
        ("", [3, 4, 6, 8], "bbox_format=''.*xywh, xyxy, cxcywh_normalised"),
        ("yolo", [3, 4, 6, 8], "bbox_format='yolo'"),
        ("xyxy", [9, 4, 6, 8], "row 0.*contradicts bbox_format='xyxy'"),
        ("xywh", [9, 4, -6, 8], "row 0.*contradicts"),
        ("cxcywh_normalised", [3, 4, 6, 8], "row 0.*contradicts"),
        ("xywh", [0.2, 0.4, 0.2, 0.4], "not pixels.*cxcywh_normalised"),
        ("xywh", [20, 10, 29, 19], "leaves the image of 30 x 20"),
        ("xywh", [1, 2, 3], "four numbers"),
    ],
)
def test_hub_box_format_is_never_guessed(bbox_format, box, message):
    with pytest.raises(ValueError, match=message):
        HubDataset(hub_table([box]), bbox_format=bbox_format)


def test_hub_columns_are_checked_and_names_may_be_plain(tmp_path):
    with pytest.raises(ValueError, match=r"needs `image` and `objects`"):
        HubDataset(datasets.Dataset.from_dict({"pixels": [1]}), bbox_format="xywh")
    table = hub_table([[3, 4, 6, 8]])
    pictures = [Image.new("RGB", (30, 20))]
    content = {"image": pictures, "objects": [{"box": [[1, 1, 5, 5]], "label": ["dog"]}]}
    with pytest.raises(ValueError, match=r"it needs `bbox`"):
        HubDataset(datasets.Dataset.from_dict(content), bbox_format="xywh")
    objects = [{"bbox": [[1, 1, 5, 5], [2, 2, 5, 5]], "label": ["dog", "ant"]}]
    content = {"image": pictures, "objects": objects, "image_id": ["first"]}
    dataset = HubDataset(datasets.Dataset.from_dict(content), bbox_format="xywh")
    assert dataset.categories == ["ant", "dog"] and dataset.category_ids == [1, 2]
    assert dataset[0].target.labels.tolist() == [1, 0] and dataset.image_id(0) == "first"

    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    cfg = DataConfig(source="hub", hub_name=str(tmp_path / "saved"), bbox_format="xywh")
    assert len(build_dataset(cfg, "train")) == 1  # without the empty image
    with pytest.raises(ValueError, match=r"no split 'validation'; it has .'train'."):
        build_dataset(cfg, "val")
