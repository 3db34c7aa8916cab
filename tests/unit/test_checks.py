"""check-data: every kind of fault, planted into a clean data set, is found where it was planted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mimdet.data.checks import KINDS, Report, check_dataset

WIDTH, HEIGHT, IMAGES = 64, 48, 6


def write_clean_set(folder: Path) -> dict[str, Any]:
    """Six noise images, two objects each: image 11 has a crowd (run lengths as a list), image 12 a
    compressed mask, all other masks are polygons. Object 2i and 2i + 1 of image i: ids 101 + index.
    """
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(IMAGES):
        name = f"scene{i}.png"
        noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
        images.append({"id": 11 + i, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for x, y, w, h in ((4 + i, 6, 20, 16), (34, 20 + i, 24, 18)):
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {
                    "id": 101 + len(annotations),
                    "image_id": 11 + i,
                    "category_id": (1, 3)[len(annotations) % 2],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": corners,
                }
            )
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


# ---- planted faults ------------------------------------------------------------------------------

GONE = object()
"""As the value of a field: it is taken out."""
AT = {"annotations": 4, "images": 2, "categories": 1}
"""The entry of each section that is spoilt."""
SIZE = [HEIGHT, WIDTH]

FIELDS: list[tuple[Any, ...]] = [
    # (kind, section, fields that are set, further kinds that rightly follow)
    ("bad-field", "annotations", {"image_id": GONE}),
    ("bad-field", "annotations", {"image_id": [13]}),
    ("bad-field", "annotations", {"category_id": GONE}),
    ("bad-field", "annotations", {"category_id": "1"}),
    ("bad-field", "annotations", {"category_id": 1.7}),
    ("bad-field", "annotations", {"id": 105.5}),
    ("bad-field", "annotations", {"iscrowd": "false"}),
    ("bad-field", "annotations", {"area": "320"}),
    ("bad-field", "annotations", {"bbox": GONE}),
    ("bad-field", "annotations", {"bbox": None}),
    ("bad-field", "annotations", {"bbox": ["1", "2", "3", "4"]}),
    ("bad-field", "annotations", {"bbox": [1, 2, 3]}),
    ("bad-field", "annotations", {"bbox": [1, 2, float("nan"), 4]}),
    ("bad-field", "annotations", {"bbox": [1, 2, float("inf"), 4]}),
    ("bad-field", "annotations", {"bbox": [1, 2, 10**400, 4]}),
    ("bad-field", "images", {"width": GONE}),
    ("bad-field", "images", {"width": "64"}),
    ("bad-field", "images", {"height": 0}),
    ("bad-field", "images", {"file_name": ["scene2.png"]}),
    ("bad-field", "categories", {"id": True}, "unknown-category"),
    ("bad-field", "categories", {"name": 7}),
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
    ("image-size-wrong", "images", {"width": HEIGHT, "height": WIDTH}),
    ("empty-box", "annotations", {"bbox": [6, 6, 0, 16]}),
    ("empty-box", "annotations", {"bbox": [26, 6, -20, 16]}),
    ("box-outside", "annotations", {"bbox": [106, 6, 20, 16]}, "segmentation-box-mismatch"),
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
    ("polygon-too-short", "annotations", {"segmentation": [[6, 6, 26, 22]]}),
    ("segmentation-empty", "annotations", {"segmentation": [[6, 6, 26, 6, 6, 6]]}),
    ("segmentation-empty", "annotations", {"segmentation": {"size": SIZE, "counts": [3072]}}),
    (
        "segmentation-box-mismatch",
        "annotations",
        {"segmentation": [[36, 6, 56, 6, 56, 22, 36, 22]]},
    ),
]


@pytest.mark.parametrize(
    ("kind", "section", "fields", "also"),
    [pytest.param(*row[:3], set(row[3:]), id=f"{row[0]}-{row[2]!s:.40}") for row in FIELDS],
)
def test_a_spoilt_field_is_found_and_named(
    kind: str, section: str, fields: dict[str, Any], also: set[str], tmp_path: Path
) -> None:
    data = write_clean_set(tmp_path)
    entry = data[section][AT[section]]
    entry |= fields
    for key in [key for key, value in fields.items() if value is GONE]:
        del entry[key]
    report = check(data, tmp_path)
    assert set(report.by_kind()) == {kind, *also}
    (problem,) = report.by_kind()[kind]
    assert problem.where.startswith(f"{section}[{AT[section]}]")
    assert report.ok == all(KINDS[found].severity == "warning" for found in report.by_kind())
    assert f"{kind} (1)\n    {problem.where}: {problem.message}" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["problems"]


def test_a_place_names_annotation_image_and_file(tmp_path: Path) -> None:
    data = write_clean_set(tmp_path)
    data["annotations"][4]["area"] = -1
    data["images"][5]["height"] = 7.5
    first, second = check(data, tmp_path).problems
    assert first.where == "images[5], image 16 'scene5.png'"
    assert "Expected `int`, got `float` - at `$.height`" in first.message
    assert second.where == "annotations[4], annotation 105, image 13 'scene2.png'"


def every_annotation(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., None]:
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


def floating(data: dict[str, Any], folder: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(folder / "scene2.tif")
    data["images"][2]["file_name"] = "scene2.tif"


def cut_off(data: dict[str, Any], folder: Path) -> None:
    runs = data["annotations"][3]["segmentation"]
    runs["counts"] = runs["counts"][:-3]


MISMATCH = "segmentation-box-mismatch"
FAULTS: list[tuple[Any, ...]] = [
    # (kind, place, change of the content, which may be another one, or of the files, more kinds)
    ("not-coco", "", lambda data, folder: data["annotations"]),
    ("not-coco", "", lambda data, folder: 3),
    ("not-coco", "", lambda data, folder: data.pop("annotations") and None),
    ("empty-section", "", lambda data, folder: data | {"categories": []}, "unknown-category"),
    ("bad-field", "annotations[12]", lambda data, folder: data["annotations"].append("text")),
    ("bad-field", "images[6]", lambda data, folder: data["images"].append([1])),
    ("bad-field", "categories[2]", lambda data, folder: data["categories"].append(None)),
    (
        "duplicate-category-id",
        "categories[2]",
        lambda data, folder: data["categories"].append({"id": 3, "name": "spot"}),
    ),
    (
        "duplicate-category-name",
        "",
        lambda data, folder: data["categories"][1].update(name="cell"),
    ),
    (
        "category-unused",
        "",
        lambda data, folder: data["categories"].append({"id": 4, "name": "spot"}),
    ),
    (
        "duplicate-annotation",
        "annotations[12], annotation 113",
        lambda data, folder: data["annotations"].append(data["annotations"][4] | {"id": 113}),
    ),
    (
        "file-name-leaves-folder",
        "images[2]",
        lambda data, folder: data["images"][2].update(file_name=f"../{folder.name}/scene2.png"),
    ),
    (
        "image-unreadable",
        "images[2]",
        lambda data, folder: (folder / "scene2.png").write_text("<html>404</html>") and None,
    ),
    ("image-rotated", "images[2]", rotated),
    ("image-float", "images[2], image 13 'scene2.tif'", floating),
    (
        "image-16-bit",
        "images[2]",
        lambda data, folder: Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(
            folder / "scene2.png"
        ),
    ),
    (
        "duplicate-image-content",
        "images[3]",
        lambda data, folder: (
            (folder / "scene3.png").write_bytes((folder / "scene2.png").read_bytes()) and None
        ),
    ),
    (
        "mostly-empty-images",
        "",
        lambda data, folder: data.update(annotations=data["annotations"][:4]),
    ),
    ("bad-segmentation", "annotations[3], annotation 104", cut_off),
    ("boxes-look-xyxy", "", every_annotation(xyxy), MISMATCH, "box-exceeds-image"),
    ("boxes-look-normalised", "", every_annotation(normalised), MISMATCH),
    (
        "mostly-crowds",
        "",
        every_annotation(lambda a: {"iscrowd": 1, "segmentation": rle_of(a["bbox"], True)}),
    ),
]


@pytest.mark.parametrize(
    ("kind", "place", "plant", "also"),
    [pytest.param(*row[:3], set(row[3:]), id=row[0]) for row in FAULTS],
)
def test_other_faults_are_found_and_named(
    kind: str, place: str, plant: Callable[..., Any], also: set[str], tmp_path: Path
) -> None:
    data = write_clean_set(tmp_path)
    changed = plant(data, tmp_path)
    report = check(data if changed is None else changed, tmp_path)
    assert set(report.by_kind()) == {kind, *also}
    (problem,) = report.by_kind()[kind]
    assert problem.where.startswith(place) and problem.file == str(tmp_path / "set.json")
    assert report.ok == all(KINDS[found].severity == "warning" for found in report.by_kind())


def test_every_kind_is_planted() -> None:
    planted = {row[0] for row in (*FIELDS, *FAULTS)}
    assert set(KINDS) - planted == {"json-unreadable", "folder-missing"}  # tested by themselves


def test_missing_folder_is_one_finding(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(json.dumps(write_clean_set(tmp_path)))
    (problem,) = check_dataset(tmp_path / "set.json", tmp_path / "images").problems
    assert problem.kind == "folder-missing"
    assert str(tmp_path / "images") in problem.message


# ---- clean sets ----------------------------------------------------------------------------------


def test_clean_set_has_no_problem(tmp_path: Path) -> None:
    report = check(write_clean_set(tmp_path), tmp_path)
    assert report.problems == []
    assert report.ok
    assert report.table().endswith("0 errors, 0 warnings")


def test_boxes_only_and_unusual_ids_are_clean(tmp_path: Path) -> None:
    data = write_clean_set(tmp_path)
    for image in data["images"]:
        image["id"] = f"scan/{image['id']}"
    for annotation in data["annotations"]:
        annotation["image_id"] = f"scan/{annotation['image_id']}"
        annotation["id"] += 10**12
        del annotation["segmentation"]
    assert check(data, tmp_path).problems == []


def test_summary_by_hand(tmp_path: Path) -> None:
    data = write_clean_set(tmp_path)
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 16]
    data["annotations"][0]["area"] = 1024  # no longer small; its mask covers 320
    summary = check(data, tmp_path).summary
    assert summary["images"] == 6
    assert summary["empty_images"] == 1
    assert summary["annotations"] == 10
    assert summary["crowds"] == 1
    assert summary["with_masks"] == 10
    assert summary["class_histogram"] == {"cell": 5, "nucleus": 4}  # the crowd is not counted
    assert summary["instances_per_image"] == {"min": 0, "25%": 2, "50%": 2, "75%": 2, "max": 2}
    assert summary["image_width"]["max"] == WIDTH
    assert summary["image_height"]["min"] == HEIGHT
    assert summary["size_share"] == pytest.approx({"small": 8 / 9, "medium": 1 / 9, "large": 0})


def test_without_decoding_only_headers_are_read(tmp_path: Path) -> None:
    data = write_clean_set(tmp_path)
    path = tmp_path / "scene2.png"
    path.write_bytes(path.read_bytes()[:-2000])
    assert check(data, tmp_path, decode=False).ok
    assert not check(data, tmp_path, decode=True).ok


def test_one_pixel_beyond_the_border_is_tolerated(tmp_path: Path) -> None:
    data = write_clean_set(tmp_path)
    data["annotations"][5] |= {"bbox": [34, 30, 31, 18], "area": 558}  # to x = 65 of 64
    data["annotations"][5]["segmentation"] = [[34, 30, 65, 30, 65, 48, 34, 48]]
    assert check(data, tmp_path).problems == []


def test_missing_image_is_looked_for_elsewhere(tmp_path: Path) -> None:
    data = write_clean_set(tmp_path)
    (tmp_path / "part1").mkdir()
    (tmp_path / "scene2.png").rename(tmp_path / "part1" / "scene2.png")
    (problem,) = check(data, tmp_path).problems
    assert "part1/scene2.png" in problem.message


def test_table_shows_a_few_examples_of_many(tmp_path: Path) -> None:
    data = write_clean_set(tmp_path)
    for annotation in data["annotations"]:
        annotation["category_id"] = 77
    table = check(data, tmp_path).table(examples=2)
    assert "error unknown-category (12)" in table
    assert "... and 10 more" in table
    assert "annotation 102" in table
    assert "annotation 103" not in table
