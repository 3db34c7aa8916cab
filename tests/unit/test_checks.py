"""check-data: every kind of fault, planted into a clean data set, is found where it was planted.
Hostile files and values are findings too, and real data sets have none."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mimdet.data.annotations import AnnotationEntry, checked, compressed
from mimdet.data.checks import ERRORS, KINDS, Report, check_dataset
from mimdet.data.coco import CocoDataset
from mimdet.data.coco_file import REFUSED

WIDTH, HEIGHT = 64, 48


def write_clean_set(folder: Path, count: int = 6) -> dict[str, Any]:
    """`count` noise images, two objects each (annotation ids from 101): image 11 has a crowd (run
    lengths as a list), image 12 a compressed mask, all other masks are polygons.
    """
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        name = f"scene{i}.png"
        noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
        images.append({"id": 11 + i, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for x, y, w, h in ((4 + i, 6, 20, 16), (34, 20 + i, 24, 18)):
            number = len(annotations)
            item = {"id": 101 + number, "image_id": 11 + i, "category_id": (1, 3)[number % 2]}
            item |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(item)
    annotations[1] |= {"iscrowd": 1, "segmentation": rle_of(annotations[1]["bbox"], False)}
    annotations[3]["segmentation"] = rle_of(annotations[3]["bbox"], True)
    categories = [{"id": 1, "name": "cell"}, {"id": 3, "name": "nucleus"}]
    return {"images": images, "annotations": annotations, "categories": categories}


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
    return check_dataset(path, folder, **options)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return write_clean_set(tmp_path)


# ---- planted faults ------------------------------------------------------------------------------

GONE = object()
"""As the value of a field: it is taken out."""
AT = {"annotations": 4, "images": 2, "categories": 1}
"""The entry of each section that is spoilt."""
SIZE = [HEIGHT, WIDTH]
MISMATCH = "segmentation-box-mismatch"
EMPTY = "segmentation-empty"
Plant = Callable[[dict[str, Any], Path], Any]
"""Changes the content, which it may return as another one, or the files."""

FIELDS: list[tuple[Any, ...]] = [
    # (kind, section, fields that are set, further kinds that rightly follow)
    *(
        ("bad-field", section, {field: value})
        for section, field, values in [
            ("annotations", "image_id", [GONE, [13]]),
            ("annotations", "category_id", [GONE, "1", 1.7]),
            ("annotations", "id", [105.5]),
            ("annotations", "iscrowd", ["false"]),
            ("annotations", "area", ["320"]),
            ("annotations", "bbox", [GONE, None, ["1", "2", "3", "4"], [1, 2, 3]]),
            ("annotations", "bbox", [[1, 2, x, 4] for x in (math.nan, math.inf, 10**400)]),
            ("images", "width", [GONE, "64"]),
            ("images", "height", [0]),
            ("images", "file_name", [["scene2.png"]]),
            ("categories", "name", [7]),
        ]
        for value in values
    ),
    ("bad-field", "categories", {"id": True}, "unknown-category"),
    ("annotation-id", "annotations", {"id": GONE}),
    ("annotation-id", "annotations", {"id": 0}),
    ("duplicate-annotation-id", "annotations", {"id": 101}),
    ("duplicate-image-id", "images", {"id": 12}, "unknown-image"),
    ("unknown-image", "annotations", {"image_id": 99}),
    ("unknown-image", "annotations", {"image_id": "13"}),
    ("unknown-category", "annotations", {"category_id": 2}),
    ("duplicate-file-name", "images", {"file_name": "scene1.png"}),
    ("image-missing", "images", {"file_name": "absent.png"}),
    ("image-missing", "images", {"file_name": "a\0b.png"}),
    ("image-missing", "images", {"file_name": "a" * 5000}),
    ("image-size-wrong", "images", {"width": WIDTH + 1}),
    ("image-size-wrong", "images", {"width": HEIGHT, "height": WIDTH}, "box-exceeds-image"),
    ("empty-box", "annotations", {"bbox": [6, 6, 0, 16]}),
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
    ("bad-segmentation", "annotations", {"segmentation": [6, 6, 26, 6, 26, 22]}),
    ("bad-segmentation", "annotations", {"segmentation": [[6, 6, 26, 6, 26, float("nan")]]}),
    ("bad-segmentation", "annotations", {"segmentation": [[6, 6, 26, 6, 26, "22"]]}),
    ("bad-segmentation", "annotations", {"segmentation": [[6, 6, 26, 6, 26, 22, 6]]}),
    ("bad-segmentation", "annotations", {"segmentation": {"counts": [1]}}),
    *(
        ("bad-segmentation", "annotations", {"segmentation": {"size": size, "counts": counts}})
        for size, counts in [
            ([WIDTH, HEIGHT], [0, 3072]),
            (SIZE, [100, 50, 100]),
            (SIZE, [5, -5, 3072]),
            (SIZE, [0.5, 3071.5]),
            (SIZE, None),
            (SIZE, "éé"),
            (SIZE, "ooo"),
            (SIZE, "o" * 100_000),
        ]
    ),
    ("polygon-too-short", "annotations", {"segmentation": [[6, 6, 26, 22]]}, EMPTY),
    ("segmentation-empty", "annotations", {"segmentation": [[6, 6, 26, 6, 6, 6]]}),
    ("segmentation-empty", "annotations", {"segmentation": {"size": SIZE, "counts": [3072]}}),
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
    with Image.open(folder / "scene2.png") as image:
        tags = image.getexif()
        tags[274] = 6
        image.save(folder / "scene2.png", exif=tags)


def stored_as(kind: Any, file_name: str) -> Plant:
    def plant(data: dict[str, Any], folder: Path) -> None:
        Image.fromarray(np.zeros((HEIGHT, WIDTH), kind)).save(folder / file_name)
        data["images"][2]["file_name"] = file_name

    return plant


def cut_off(data: dict[str, Any], folder: Path) -> None:
    runs = data["annotations"][3]["segmentation"]
    runs["counts"] = runs["counts"][:-3]


def outside(data: dict[str, Any], folder: Path) -> None:
    data["images"][2]["file_name"] = f"../{folder.name}/scene2.png"


def linked(data: dict[str, Any], folder: Path) -> None:
    (folder / "scene2.png").rename(folder.with_name(f"{folder.name}-elsewhere.png"))
    (folder / "scene2.png").symlink_to(folder.with_name(f"{folder.name}-elsewhere.png"))


def not_an_image(data: dict[str, Any], folder: Path) -> None:
    (folder / "scene2.png").write_text("<html>404</html>")


def copied(data: dict[str, Any], folder: Path) -> None:
    (folder / "scene3.png").write_bytes((folder / "scene2.png").read_bytes())


def crowd(annotation: dict[str, Any]) -> dict[str, Any]:
    return {"iscrowd": 1, "segmentation": rle_of(annotation["bbox"], True)}


SPOT = {"id": 4, "name": "spot"}
TWIN = {"id": 113, "image_id": 13, "category_id": 1, "bbox": [6, 6, 20, 16]}
TWIN |= {"area": 320, "iscrowd": 0, "segmentation": [[6, 6, 26, 6, 26, 22, 6, 22]]}
FAULTS: list[tuple[Any, ...]] = [
    # (kind, place, what plants it, further kinds that rightly follow)
    *((row[0], f"{row[1]}[{AT[row[1]]}]", sets(*row[1:3]), *row[3:]) for row in FIELDS),
    ("not-coco", "", lambda data, folder: data["annotations"]),
    ("not-coco", "", lambda data, folder: 3),
    ("not-coco", "", lambda data, folder: data.pop("annotations") and None),
    ("empty-section", "", lambda data, folder: data | {"categories": []}, "unknown-category"),
    ("bad-field", "annotations[12]", adds("annotations", "text")),
    ("bad-field", "images[6]", adds("images", [1])),
    ("bad-field", "categories[2]", adds("categories", None)),
    ("duplicate-category-id", "categories[2]", adds("categories", SPOT | {"id": 3})),
    ("duplicate-category-name", "", sets("categories", {"name": "cell"})),
    ("category-unused", "", adds("categories", SPOT)),
    ("duplicate-annotation", "annotations[12], annotation 113", adds("annotations", TWIN)),
    ("file-name-leaves-folder", "images[2]", outside),
    ("link-leaves-folder", "images[2]", linked),
    ("image-unreadable", "images[2]", not_an_image),
    ("image-rotated", "images[2]", rotated),
    ("image-float", "images[2], image 13 'a.tif'", stored_as(np.float32, "a.tif")),
    ("image-16-bit", "images[2]", stored_as(np.uint16, "scene2.png")),
    ("duplicate-image-content", "images[3]", copied),
    ("mostly-empty-images", "", lambda data, _: data | {"annotations": data["annotations"][:4]}),
    ("bad-segmentation", "annotations[3], annotation 104", cut_off),
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
    changed = plant(data, tmp_path)
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
            dataset = CocoDataset(folder / "set.json", folder)
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
        used = CocoDataset(folder / "set.json", folder, skip_empty=True)
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
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 16]
    data["annotations"][0]["area"] = 1024  # no longer small; its mask covers 320
    summary = check(data, tmp_path).summary
    counts = {"images": 6, "empty_images": 1, "annotations": 10, "crowds": 1, "with_masks": 10}
    assert {key: summary[key] for key in counts} == counts
    assert summary["class_histogram"] == {"cell": 5, "nucleus": 4}  # the crowd is not counted
    assert summary["instances_per_image"] == {"min": 0, "25%": 2, "50%": 2, "75%": 2, "max": 2}
    assert (summary["image_width"]["max"], summary["image_height"]["min"]) == (WIDTH, HEIGHT)
    assert summary["size_share"] == pytest.approx({"small": 8 / 9, "medium": 1 / 9, "large": 0})


def test_missing_image_is_looked_for_elsewhere(data, tmp_path) -> None:
    (tmp_path / "part1").mkdir()
    (tmp_path / "scene2.png").rename(tmp_path / "part1" / "scene2.png")
    (problem,) = check(data, tmp_path).problems
    assert "part1/scene2.png" in problem.message


def test_without_decoding_only_headers_are_read(data, tmp_path) -> None:
    path = tmp_path / "scene2.png"
    path.write_bytes(path.read_bytes()[:-2000])
    assert check(data, tmp_path, decode=False).ok
    assert not check(data, tmp_path, decode=True).ok


def test_table_shows_a_few_examples_of_many(data: dict[str, Any], tmp_path: Path) -> None:
    for annotation in data["annotations"]:
        annotation["category_id"] = 77
    table = check(data, tmp_path).table(examples=2)
    assert "error unknown-category (12)" in table and "... and 10 more" in table
    assert "annotation 102" in table and "annotation 103" not in table


# ---- the file itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"images: []",
        b"\xff\xfe\xfa",
        b"\x89PNG\r\n",
        b"[" * 200_000,
        b'{"images": ' + b"1" * 10_000 + b"}",
        *(0.01, 0.3, 0.6, 0.99),
    ],
    ids=["empty", "yaml", "bytes", "png", "deep", "long-number", *["cut off"] * 4],
)
def test_not_json(content: bytes | float, tmp_path: Path) -> None:
    if isinstance(content, float):
        sound = json.dumps(write_clean_set(tmp_path)).encode()
        content = sound[: int(len(sound) * content)]
    (tmp_path / "set.json").write_bytes(content)
    report = check_dataset(tmp_path / "set.json", tmp_path)
    (problem,) = report.problems
    assert problem.kind in ("json-unreadable", "not-coco") and not report.ok


def test_missing_file_and_missing_folder_are_findings(tmp_path: Path) -> None:
    report = check_dataset(tmp_path / "absent.json", tmp_path)
    assert "absent.json" in report.table() and not report.ok
    (tmp_path / "set.json").write_text(json.dumps(write_clean_set(tmp_path)))
    (problem,) = check_dataset(tmp_path / "set.json", tmp_path / "images").problems
    assert problem.kind == "folder-missing" and str(tmp_path / "images") in problem.message


REAL_SETS = [
    ("coco/annotations/instances_train2017.json", "coco/train2017"),
    ("coco/annotations/instances_val2017.json", "coco/val2017"),
    ("nuclei/annotations/instances_train.json", "nuclei/train"),
    ("nuclei/annotations/instances_train_rle.json", "nuclei/train"),
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


@pytest.mark.parametrize(("annotations", "images"), [REAL_SETS[1], REAL_SETS[4]])
def test_real_boxes_stored_as_xyxy_are_noticed(annotations, images, shared_data, tmp_path) -> None:
    data = json.loads((shared_data / annotations).read_text())
    every_annotation(xyxy)(data, tmp_path)
    (tmp_path / "set.json").write_text(json.dumps(data))
    report = check_dataset(tmp_path / "set.json", shared_data / images, decode=False)
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
        ({"area": 0.5}, [], ""),
        ({"area": 0.0}, ["bad-area"], ""),
        ({"bbox": (0.0, 0.0, 60.0, 40.0)}, [], ""),
        ({"bbox": (-1.0, -1.0, 62.0, 42.0)}, [], ""),
        ({"bbox": (-1.5, 0.0, 9.0, 9.0)}, ["box-exceeds-image"], ""),
        ({"bbox": (0.0, 0.0, 9.0, 41.5)}, ["box-exceeds-image"], ""),
        ({"bbox": (-5.0, 0.0, 5.0, 9.0)}, ["box-outside"], "box-outside"),
        ({"bbox": (0.0, -5.0, 9.0, 5.0)}, ["box-outside"], "box-outside"),
        ({"bbox": (60.0, 0.0, 5.0, 9.0)}, ["box-outside"], "box-outside"),
        ({"bbox": (0.0, 40.0, 5.0, 9.0)}, ["box-outside"], "box-outside"),
        ({"bbox": (10.0, 10.0, 0.0, 9.0)}, ["empty-box"], "empty-box"),
        ({"bbox": (40.0, 10.0, 0.0, 9.0), "mask": SQUARE}, ["empty-box"], "empty-box"),
        ({"bbox": (40.0, 10.0, 9.0, 0.0), "mask": SQUARE}, ["empty-box"], "empty-box"),
        ({"mask": SQUARE}, [], ""),
        ({"bbox": (12.0, 8.0, 10.0, 10.0), "mask": SQUARE}, [], ""),  # 2 pixels are rounding
        ({"bbox": (30.0, 10.0, 9.0, 9.0), "mask": SQUARE}, ["segmentation-box-mismatch"], ""),
        ({"mask": [[15.0, 10, 15, 20, 15, 12]]}, ["segmentation-empty"], "segmentation-empty"),
        ({"mask": [[10.0, 15, 20, 15, 12, 15]]}, ["segmentation-empty"], "segmentation-empty"),
        ({"area": 1.0, "thorough": True}, [], ""),
        ({"area": 0.5, "thorough": True}, ["area-mismatch"], ""),
        ({"area": 139.0, "thorough": True}, [], ""),
        ({"area": 141.0, "thorough": True}, ["area-mismatch"], ""),
    ],
)
def test_borders_of_what_is_noted(fields: Any, kinds: list[str], left_out: str) -> None:
    assert kinds_of(**fields) == (kinds, left_out)


def test_run_lengths_are_of_their_image() -> None:
    side = 1 << 16
    for size, runs, image, said in (
        ((60, 40), 2400, (40, 60), r"for \(60, 40\) pixels \(height comes first\), the image"),
        ((40, 50), 2000, (40, 60), r"for \(40, 50\) pixels, the image has \(40, 60\)"),
        ((side, side), 5, (side, side), r"count to 2\^32"),
        ((side, side - 1), 5, (side, side - 1), "its runs cover 5 of"),
    ):
        with pytest.raises(ValueError, match=said):
            compressed({"size": [*size], "counts": [runs]}, *image)


def test_an_image_id_of_another_type_is_hinted_at(data: dict[str, Any], tmp_path: Path) -> None:
    for image_id, hinted in ((999, False), ("1", True)):
        data["annotations"][0]["image_id"] = image_id
        (found,) = [p for p in check(data, tmp_path).problems if p.kind == "unknown-image"]
        assert ("a number here and text there?" in found.message) == hinted
