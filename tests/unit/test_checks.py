"""check-data: every kind of fault, planted into a clean data set, is found where it was planted.
Hostile files and values are findings too, and real data sets have none."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mimdet.data.annotations import AnnotationEntry, checked
from mimdet.data.checks import ERRORS, KINDS, Report, check_dataset
from mimdet.data.coco import CocoDataset
from mimdet.data.coco_file import REFUSED
from tests.small import write_coco

WIDTH, HEIGHT = 64, 48


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Six images of two objects each: the second object is a crowd (run lengths as a list), the
    fourth has compressed run lengths, all others polygons."""
    boxes = [[[4 + i, 6, 20, 16], [34, 20 + i, 24, 18]] for i in range(6)]
    content: Any = json.loads(write_coco(tmp_path, boxes, (WIDTH, HEIGHT)).read_text())
    things = content["annotations"]
    for thing in things[1::2]:
        thing["category_id"] = 3
    things[1] |= {"iscrowd": 1, "segmentation": rle_of(things[1]["bbox"], False)}
    things[3]["segmentation"] = rle_of(things[3]["bbox"], True)
    content["categories"].append({"id": 3, "name": "nucleus"})
    return content


def rle_of(box: list[int], compressed: bool) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    text = coco_mask.encode(mask)["counts"].decode()
    plain = [HEIGHT * x + y, *([h, HEIGHT - h] * w)]
    plain[-1] = HEIGHT * WIDTH - sum(plain[:-1])
    return {"size": [HEIGHT, WIDTH], "counts": text if compressed else plain}


def check(content: Any, folder: Path, **options: Any) -> Report:
    path = folder / "set.json"
    path.write_text(json.dumps(content))
    return check_dataset(path, folder / "images", **options)


# ---- planted faults ------------------------------------------------------------------------------

GONE = object()
"""As the value of a field: it is taken out."""
AT = {"annotations": 4, "images": 2, "categories": 1}
"""The entry of each section that is spoilt."""
MISMATCH = "segmentation-box-mismatch"
EMPTY = "segmentation-empty"
Plant = Callable[[dict[str, Any], Path], Any]
"""Changes the content, which it may return as another one, or the files."""

FIELDS: list[tuple[Any, ...]] = [
    # (kind, section, fields that are set, further kinds that rightly follow); more values of the
    # wrong kind are in tests/faults/corpus.toml
    ("bad-field", "annotations", {"image_id": GONE}),
    ("bad-field", "images", {"width": "64"}),
    ("bad-field", "categories", {"id": True}, "unknown-category"),
    ("annotation-id", "annotations", {"id": GONE}),
    ("annotation-id", "annotations", {"id": 0}),
    ("duplicate-annotation-id", "annotations", {"id": 1}),
    ("duplicate-image-id", "images", {"id": 2}, "unknown-image"),
    ("unknown-image", "annotations", {"image_id": 99}),
    ("unknown-category", "annotations", {"category_id": 2}),
    ("duplicate-file-name", "images", {"file_name": "2.png"}),
    ("image-missing", "images", {"file_name": "absent.png"}),
    ("image-size-wrong", "images", {"width": WIDTH + 1}),
    ("image-size-wrong", "images", {"width": HEIGHT, "height": WIDTH}, "box-exceeds-image"),
    ("empty-box", "annotations", {"bbox": [26, 6, -20, 16]}),
    ("box-outside", "annotations", {"bbox": [106, 6, 20, 16]}, MISMATCH),
    ("box-exceeds-image", "annotations", {"bbox": [-1.5, 6, 24, 16]}),
    ("area-missing", "annotations", {"area": GONE}),
    ("bad-area", "annotations", {"area": 0}),
    ("area-mismatch", "annotations", {"area": 3200}),
    ("iscrowd-missing", "annotations", {"iscrowd": GONE}),
    ("crowd-with-polygon", "annotations", {"iscrowd": 1}),
    ("segmentation-missing", "annotations", {"segmentation": GONE}),
    ("segmentation-missing", "annotations", {"segmentation": []}),
    ("bad-segmentation", "annotations", {"segmentation": "polygon"}),
    ("polygon-too-short", "annotations", {"segmentation": [[6, 6, 26, 22]]}, EMPTY),
    ("segmentation-empty", "annotations", {"segmentation": [[6, 6, 26, 6, 6, 6]]}),
    (EMPTY, "annotations", {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3072]}}),
    (MISMATCH, "annotations", {"segmentation": [[36, 6, 56, 6, 56, 22, 36, 22]]}),
]


def sets(section: str, fields: dict[str, Any]) -> Plant:
    def plant(data: dict[str, Any], folder: Path) -> None:
        entry = data[section][AT[section]] | fields
        sound = {key: value for key, value in entry.items() if value is not GONE}
        data[section][AT[section]] = sound

    return plant


def adds(section: str, entry: Any) -> Plant:
    return lambda data, folder: data[section].append(entry)


def every_annotation(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    def plant(data: dict[str, Any], folder: Path) -> None:
        for annotation in data["annotations"]:
            annotation |= change(annotation)

    return plant


def xyxy(annotation: dict[str, Any]) -> dict[str, Any]:
    x, y, w, h = annotation["bbox"]
    return {"bbox": [x, y, x + w, y + h]}


def normalised(annotation: dict[str, Any]) -> dict[str, Any]:
    x, y, w, h = annotation["bbox"]
    return {"bbox": [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]}


def rotated(data: dict[str, Any], folder: Path) -> None:
    with Image.open(folder / "3.png") as image:
        tags = image.getexif()
        tags[274] = 6
        image.save(folder / "3.png", exif=tags)


def stored_as(kind: Any, file_name: str) -> Plant:
    def plant(data: dict[str, Any], folder: Path) -> None:
        Image.fromarray(np.zeros((HEIGHT, WIDTH), kind)).save(folder / file_name)
        data["images"][2]["file_name"] = file_name

    return plant


def cut_off(data: dict[str, Any], folder: Path) -> None:
    runs = data["annotations"][3]["segmentation"]
    runs["counts"] = runs["counts"][:-3]


def linked(data: dict[str, Any], folder: Path) -> None:
    (folder / "3.png").rename(folder.parent / "elsewhere.png")
    (folder / "3.png").symlink_to(folder.parent / "elsewhere.png")


def not_an_image(data: dict[str, Any], folder: Path) -> None:
    (folder / "3.png").write_text("<html>404</html>")


def copied(data: dict[str, Any], folder: Path) -> None:
    (folder / "4.png").write_bytes((folder / "3.png").read_bytes())


def crowd(annotation: dict[str, Any]) -> dict[str, Any]:
    return {"iscrowd": 1, "segmentation": rle_of(annotation["bbox"], True)}


SPOT = {"id": 4, "name": "spot"}
TWIN = {"id": 13, "image_id": 3, "category_id": 7, "bbox": [6, 6, 20, 16]}
TWIN |= {"area": 320, "iscrowd": 0, "segmentation": [[6, 6, 26, 6, 26, 22, 6, 22]]}
FAULTS: list[tuple[Any, ...]] = [
    # (kind, place, what plants it, further kinds that rightly follow)
    *((row[0], f"{row[1]}[{AT[row[1]]}]", sets(*row[1:3]), *row[3:]) for row in FIELDS),
    ("not-coco", "", lambda data, folder: data["annotations"]),
    ("empty-section", "", lambda data, folder: data | {"categories": []}, "unknown-category"),
    ("bad-field", "annotations[12]", adds("annotations", "text")),
    ("duplicate-category-id", "categories[2]", adds("categories", SPOT | {"id": 3})),
    ("duplicate-category-name", "", sets("categories", {"name": "cell"})),
    ("category-unused", "", adds("categories", SPOT)),
    ("duplicate-annotation", "annotations[12], annotation 13", adds("annotations", TWIN)),
    ("file-name-leaves-folder", "images[2]", sets("images", {"file_name": "../images/3.png"})),
    ("link-leaves-folder", "images[2]", linked),
    ("image-unreadable", "images[2]", not_an_image),
    ("image-rotated", "images[2]", rotated),
    ("image-float", "images[2], image 3 'a.tif'", stored_as(np.float32, "a.tif")),
    ("image-16-bit", "images[2]", stored_as(np.uint16, "3.png")),
    ("duplicate-image-content", "images[3]", copied),
    ("mostly-empty-images", "", lambda data, _: data | {"annotations": data["annotations"][:4]}),
    ("bad-segmentation", "annotations[3], annotation 4", cut_off),
    ("boxes-look-xyxy", "", every_annotation(xyxy), MISMATCH, "box-exceeds-image"),
    ("boxes-look-normalised", "", every_annotation(normalised), MISMATCH),
    ("mostly-crowds", "", every_annotation(crowd)),
]


@pytest.mark.parametrize(
    ("kind", "place", "plant", "also"),
    [pytest.param(*row[:3], set(row[3:]), id=row[0]) for row in FAULTS],
)
def test_a_fault_is_found_named_and_no_surprise_in_training(
    kind, place, plant, also, data, tmp_path, monkeypatch
) -> None:
    changed = plant(data, tmp_path / "images")
    report = check(data if changed is None else changed, tmp_path)
    assert set(report.by_kind()) == {kind, *also}
    (problem,) = report.by_kind()[kind]
    assert problem.where.startswith(place) and problem.file == str(tmp_path / "set.json")
    assert report.ok == (not ERRORS.keys() & report.by_kind())
    text = f"{kind} (1)\n    {problem.where or problem.file}: {problem.message}"
    assert text in report.table()
    assert json.loads(json.dumps(report.to_dict()))["problems"]
    if kind in ERRORS:
        monkeypatch.setenv("MIMDET_CACHE", str(tmp_path / "cache"))
        training_refuses_or_names(kind, problem.message, tmp_path)


def training_refuses_or_names(kind: str, said: str, folder: Path) -> None:
    """In the words of check-data, when the file is opened or the image is read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset = CocoDataset(folder / "set.json", folder / "images")
            objects = sum(len(dataset[i].target) for i in range(len(dataset)))
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            assert kind in REFUSED and ("mimdet check-data" in text or kind == "image-float")
            if kind not in ("image-unreadable", "image-float"):  # the reader of images says why
                assert said in text or said.partition(";")[0] in text
                assert f"({kind}). {KINDS[kind]}" in text
            return
    assert kind not in REFUSED
    (text,) = [str(one.message) for one in caught if "set.json" in str(one.message)]
    assert kind in text and said in text
    left_out = {annotation.left_out for i in range(6) for annotation in dataset.annotations(i)}
    assert (kind in left_out) == (kind in ("empty-box", "box-outside", EMPTY))
    assert f"{objects} objects" in dataset.summary
    assert kind not in left_out or f"1 {kind}" in dataset.summary
    if kind == "mostly-empty-images":  # both say what becomes of them
        used = CocoDataset(folder / "set.json", folder / "images", skip_empty=True)
        assert f"{6 - len(used)} images without objects (--no-skip-empty" in used.summary
        assert "Training leaves them out; with --no-skip-empty" in KINDS[kind]


def test_every_kind_is_planted() -> None:
    planted = {row[0] for row in FAULTS}
    alone = {"json-unreadable", "folder-missing", "in-both-sets", "nearly-in-both-sets"}
    assert set(KINDS) - planted == alone  # tested by themselves


# ---- clean sets ----------------------------------------------------------------------------------


def test_clean_set_has_no_problem(data: dict[str, Any], tmp_path: Path) -> None:
    """Nor has one of boxes only, with unusual ids."""
    report = check(data, tmp_path)
    assert report.problems == [] and report.ok
    assert report.table().endswith("0 errors, 0 warnings")
    for image in data["images"]:
        image["id"] = f"scan/{image['id']}"
    for annotation in data["annotations"]:
        annotation["image_id"] = f"scan/{annotation['image_id']}"
        annotation["id"] += 10**12
        del annotation["segmentation"]
    assert check(data, tmp_path).problems == []


def test_summary_by_hand(data: dict[str, Any], tmp_path: Path) -> None:
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 6]
    data["annotations"][0]["area"] = 1024  # no longer small; its mask covers 320
    summary = check(data, tmp_path).summary
    counts = {"images": 6, "empty_images": 1, "annotations": 10, "crowds": 1, "with_masks": 10}
    assert {key: summary[key] for key in counts} == counts
    assert summary["class_histogram"] == {"cell": 5, "nucleus": 4}  # the crowd is not counted
    assert summary["instances_per_image"] == {"min": 0, "25%": 2, "50%": 2, "75%": 2, "max": 2}
    assert (summary["image_width"]["max"], summary["image_height"]["min"]) == (WIDTH, HEIGHT)
    assert summary["size_share"] == pytest.approx({"small": 8 / 9, "medium": 1 / 9, "large": 0})


def test_missing_image_is_looked_for_elsewhere(data, tmp_path) -> None:
    (tmp_path / "images/part1").mkdir()
    (tmp_path / "images/3.png").rename(tmp_path / "images/part1/3.png")
    (problem,) = check(data, tmp_path).problems
    assert "part1/3.png" in problem.message


def test_without_decoding_only_headers_are_read(data, tmp_path) -> None:
    path = tmp_path / "images/3.png"
    path.write_bytes(path.read_bytes()[:-2000])
    assert check(data, tmp_path, decode=False).ok
    assert not check(data, tmp_path, decode=True).ok


def test_table_shows_a_few_examples_of_many(data: dict[str, Any], tmp_path: Path) -> None:
    for annotation in data["annotations"]:
        annotation["category_id"] = 77
    table = check(data, tmp_path).table(examples=2)
    assert "error unknown-category (12)" in table and "... and 10 more" in table
    assert "annotation 2, " in table and "annotation 3, " not in table


def test_missing_file_and_missing_folder_are_findings(data, tmp_path: Path) -> None:
    report = check_dataset(tmp_path / "absent.json", tmp_path)
    assert "absent.json" in report.table() and "json-unreadable" in report.by_kind()
    path = tmp_path / "annotations.json"
    (problem,) = check_dataset(path, tmp_path / "absent").problems
    assert problem.kind == "folder-missing" and str(tmp_path / "absent") in problem.message


REAL_SETS = [
    ("coco/annotations/instances_train2017.json", "coco/train2017"),
    ("coco/annotations/instances_val2017.json", "coco/val2017"),
    ("nuclei/annotations/instances_val.json", "nuclei/val"),
    ("nuclei/annotations/instances_val_rle.json", "nuclei/val"),
]


@pytest.mark.parametrize(("annotations", "images"), REAL_SETS)
def test_real_sets_have_no_error(annotations: str, images: str, shared_data: Path) -> None:
    report = check_dataset(shared_data / annotations, shared_data / images)
    assert report.ok, report.table()
    # One COCO crowd has an area that is not its mask's; 3 of the 80 classes are not in this val.
    expected = {"area-mismatch": 1} if "coco/train" in images else {}
    expected |= {"category-unused": 3} if "coco/val" in images else {}
    assert {kind: len(found) for kind, found in report.by_kind().items()} == expected


def test_real_boxes_stored_as_xyxy_are_noticed(shared_data, tmp_path) -> None:
    data = json.loads((shared_data / REAL_SETS[1][0]).read_text())
    every_annotation(xyxy)(data, tmp_path)
    (tmp_path / "set.json").write_text(json.dumps(data))
    report = check_dataset(tmp_path / "set.json", shared_data / REAL_SETS[1][1], decode=False)
    assert "boxes-look-xyxy" in report.by_kind()


def kinds_of(mask: Any = None, thorough: bool = False, **fields: Any) -> tuple[list[str], str]:
    """What is noted of one annotation in an image of 40 x 60 pixels, and why it is left out."""
    sound = {"image_id": 1, "category_id": 1, "bbox": (10.0, 10.0, 10.0, 10.0), "area": 100.0}
    entry = AnnotationEntry(**sound | {"id": 1, "iscrowd": 0} | fields)
    noted: list[str] = []
    annotation = checked(entry, mask, 40, 60, lambda kind, _: noted.append(kind), thorough)
    return noted, annotation.left_out


SQUARE = [[10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]]


@pytest.mark.parametrize(
    ("fields", "kinds", "left_out"),
    [
        ({}, [], ""),
        ({"area": 0.0}, ["bad-area"], ""),
        ({"bbox": (-1.0, -1.0, 62.0, 42.0)}, [], ""),
        ({"bbox": (-1.5, 0.0, 9.0, 9.0)}, ["box-exceeds-image"], ""),
        ({"bbox": (0.0, 0.0, 9.0, 41.5)}, ["box-exceeds-image"], ""),
        ({"bbox": (-5.0, 0.0, 5.0, 9.0)}, ["box-outside"], "box-outside"),
        ({"bbox": (0.0, -5.0, 9.0, 5.0)}, ["box-outside"], "box-outside"),
        ({"bbox": (60.0, 0.0, 5.0, 9.0)}, ["box-outside"], "box-outside"),
        ({"bbox": (0.0, 40.0, 5.0, 9.0)}, ["box-outside"], "box-outside"),
        ({"bbox": (40.0, 10.0, 0.0, 9.0), "mask": SQUARE}, ["empty-box"], "empty-box"),
        ({"bbox": (40.0, 10.0, 9.0, 0.0), "mask": SQUARE}, ["empty-box"], "empty-box"),
        ({"mask": SQUARE}, [], ""),
        ({"bbox": (12.0, 8.0, 10.0, 10.0), "mask": SQUARE}, [], ""),  # 2 pixels are rounding
        ({"bbox": (30.0, 10.0, 9.0, 9.0), "mask": SQUARE}, ["segmentation-box-mismatch"], ""),
        ({"mask": [[15.0, 10, 15, 20, 15, 12]]}, ["segmentation-empty"], "segmentation-empty"),
        ({"area": 1.0, "thorough": True}, [], ""),
        ({"area": 0.5, "thorough": True}, ["area-mismatch"], ""),
        ({"area": 139.0, "thorough": True}, [], ""),
        ({"area": 141.0, "thorough": True}, ["area-mismatch"], ""),
    ],
)
def test_borders_of_what_is_noted(fields: Any, kinds: list[str], left_out: str) -> None:
    assert kinds_of(**fields) == (kinds, left_out)


def test_an_image_id_of_another_type_is_hinted_at(data: dict[str, Any], tmp_path: Path) -> None:
    for image_id, hinted in ((999, False), ("1", True)):
        data["annotations"][0]["image_id"] = image_id
        (found,) = [p for p in check(data, tmp_path).problems if p.kind == "unknown-image"]
        assert ("a number here and text there?" in found.message) == hinted
