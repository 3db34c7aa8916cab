"""check-data: every kind of fault, planted into a clean data set, is found where it was planted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Fault(NamedTuple):
    kind: str
    plant: Callable[[dict[str, Any], Path], Any]
    """Changes the content (or returns another one) and the files."""
    places: list[str]
    """What `where` of each finding must contain, in order."""
    also: tuple[str, ...] = ()
    """Further kinds that rightly follow from the same fault."""


FAULTS: list[Any] = []


def fault(kind: str, *places: str, also: tuple[str, ...] = (), name: str = "") -> Any:
    def keep(plant: Callable[[dict[str, Any], Path], Any]) -> None:
        label = f"{kind}-{name}" if name else kind
        FAULTS.append(pytest.param(Fault(kind, plant, list(places), also), id=label))

    return keep


def set_field(section: str, index: int, **fields: Any) -> Callable[[dict[str, Any], Path], None]:
    return lambda data, folder: data[section][index].update(fields)


def drop_field(section: str, index: int, key: str) -> Callable[[dict[str, Any], Path], None]:
    def plant(data: dict[str, Any], folder: Path) -> None:
        del data[section][index][key]

    return plant


A3 = "annotations[4], annotation 105, image 13 'scene2.png'"
"""The annotation that most faults are planted into, as a finding names it."""
I3 = "images[2], image 13 'scene2.png'"

fault("not-coco", "set.json")(lambda data, folder: data["annotations"])
fault("not-coco", "set.json", name="a-number")(lambda data, folder: 3)
fault("not-coco", "set.json", name="no-annotations")(
    lambda data, folder: data.pop("annotations") and None
)
fault("empty-section", "set.json", also=("unknown-category",))(
    lambda data, folder: data | {"categories": []}
)
for section, junk in {"annotations": "text", "images": [1], "categories": None}.items():
    count = {"annotations": 12, "images": IMAGES, "categories": 2}[section]
    fault("bad-field", f"{section}[{count}]", name=f"{section}-entry")(
        lambda data, folder, section=section, junk=junk: data[section].append(junk)
    )
for key in ("image_id", "category_id", "bbox"):
    fault("bad-field", "annotations[4], annotation 105", name=f"no-{key}")(
        drop_field("annotations", 4, key)
    )
for key, value in {
    "category_id": "1",
    "iscrowd": "no",
    "area": "320",
    "image_id": [13],
    "id": 105.5,
}.items():
    fault("bad-field", "annotations[4]", name=key)(set_field("annotations", 4, **{key: value}))
fault("bad-field", "annotations[4]", name="category-1.7")(
    set_field("annotations", 4, category_id=1.7)
)
fault("annotation-id", "annotations[4], image 13 'scene2.png'", name="none")(
    drop_field("annotations", 4, "id")
)
for key in ("width", "file_name"):
    fault("bad-field", "images[2], image 13", name=f"image-without-{key}")(
        drop_field("images", 2, key)
    )
for name, field in {
    "width": {"width": "64"},
    "height": {"height": 0},
    "file-name": {"file_name": ["scene2.png"]},
}.items():
    fault("bad-field", "images[2], image 13", name=name)(set_field("images", 2, **field))
for key, value in {"id": True, "name": 7}.items():
    fault("bad-field", "categories[1]", also=("unknown-category",) * (key == "id"), name=key)(
        set_field("categories", 1, **{key: value})
    )
fault("duplicate-image-id", "images[2], image 12 'scene2.png'", also=("unknown-image",))(
    set_field("images", 2, id=12)
)
fault("duplicate-annotation-id", "annotations[4], annotation 101")(
    set_field("annotations", 4, id=101)
)
fault("annotation-id", "annotations[4], annotation 0")(set_field("annotations", 4, id=0))
fault("duplicate-category-id", "categories[2]")(
    lambda data, folder: data["categories"].append({"id": 3, "name": "spot"})
)
fault("duplicate-category-name", "set.json")(set_field("categories", 1, name="cell"))
fault("unknown-image", "annotations[4], annotation 105, image 99")(
    set_field("annotations", 4, image_id=99)
)
fault("unknown-image", "annotations[4], annotation 105, image '13'", name="text")(
    set_field("annotations", 4, image_id="13")
)
fault("unknown-category", A3)(set_field("annotations", 4, category_id=2))
fault("category-unused", "set.json")(
    lambda data, folder: data["categories"].append({"id": 4, "name": "spot"})
)

fault("duplicate-file-name", "images[3], image 14 'scene2.png'")(
    set_field("images", 3, file_name="scene2.png")
)
fault("image-missing", "images[2], image 13 'absent.png'")(
    set_field("images", 2, file_name="absent.png")
)
fault("image-missing", "images[2], image 13", name="nul")(
    set_field("images", 2, file_name="a\0b.png")
)
fault("image-missing", "images[2], image 13", name="long")(
    set_field("images", 2, file_name="a" * 5000)
)
fault("image-size-wrong", I3)(set_field("images", 2, width=WIDTH + 1))
fault("image-size-wrong", I3, name="swapped")(set_field("images", 2, width=HEIGHT, height=WIDTH))


@fault("file-name-leaves-folder", "images[2], image 13")
def _(data: dict[str, Any], folder: Path) -> None:
    data["images"][2]["file_name"] = f"../{folder.name}/scene2.png"


@fault("image-unreadable", I3, name="truncated")
def _(data: dict[str, Any], folder: Path) -> None:
    path = folder / "scene2.png"
    path.write_bytes(path.read_bytes()[:-2000])


@fault("image-unreadable", I3, name="no-image")
def _(data: dict[str, Any], folder: Path) -> None:
    (folder / "scene2.png").write_text("<html>404</html>")


@fault("image-rotated", I3)
def _(data: dict[str, Any], folder: Path) -> None:
    with Image.open(folder / "scene2.png") as image:
        tags = image.getexif()
        tags[274] = 6
        image.save(folder / "scene2.png", exif=tags)


@fault("image-16-bit", I3)
def _(data: dict[str, Any], folder: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(folder / "scene2.png")


@fault("image-float", "images[2], image 13 'scene2.tif'")
def _(data: dict[str, Any], folder: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(folder / "scene2.tif")
    data["images"][2]["file_name"] = "scene2.tif"


@fault("duplicate-image-content", "images[3], image 14 'scene3.png'")
def _(data: dict[str, Any], folder: Path) -> None:
    (folder / "scene3.png").write_bytes((folder / "scene2.png").read_bytes())


@fault("mostly-empty-images", "set.json")
def _(data: dict[str, Any], folder: Path) -> None:
    data["annotations"] = data["annotations"][:4]


for label, box in {
    "text": ["1", "2", "3", "4"],
    "three": [1, 2, 3],
    "nan": [1, 2, float("nan"), 4],
    "infinite": [1, 2, float("inf"), 4],
    "huge": [1, 2, 10**400, 4],
    "none": None,
}.items():
    fault("bad-field", "annotations[4], annotation 105", name=f"box-{label}")(
        set_field("annotations", 4, bbox=box)
    )
fault("empty-box", A3, name="zero")(set_field("annotations", 4, bbox=[6, 6, 0, 16]))
fault("empty-box", A3, name="negative")(set_field("annotations", 4, bbox=[26, 6, -20, 16]))
fault("box-outside", A3, also=("segmentation-box-mismatch",))(
    set_field("annotations", 4, bbox=[106, 6, 20, 16])
)
fault("box-exceeds-image", A3)(
    set_field(
        "annotations", 4, bbox=[-1.5, 6, 20, 16], segmentation=[[-1.5, 6, 18, 6, 18, 22, -1.5, 22]]
    )
)
fault("duplicate-annotation", "annotations[12], annotation 113, image 13 'scene2.png'")(
    lambda data, folder: data["annotations"].append(data["annotations"][4] | {"id": 113})
)
fault("area-missing", A3)(drop_field("annotations", 4, "area"))
fault("bad-area", A3)(set_field("annotations", 4, area=0))
fault("area-mismatch", A3)(set_field("annotations", 4, area=3200))
fault("area-mismatch", "annotations[3], annotation 104", name="runs")(
    set_field("annotations", 3, area=1)
)
fault("iscrowd-missing", A3)(drop_field("annotations", 4, "iscrowd"))


@fault("boxes-look-xyxy", "set.json", also=("segmentation-box-mismatch", "box-exceeds-image"))
def _(data: dict[str, Any], folder: Path) -> None:
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]


@fault("boxes-look-normalised", "set.json", also=("segmentation-box-mismatch",))
def _(data: dict[str, Any], folder: Path) -> None:
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


fault("segmentation-missing", A3)(drop_field("annotations", 4, "segmentation"))
fault("segmentation-missing", A3, name="empty-list")(set_field("annotations", 4, segmentation=[]))
for label, segmentation in {
    "text": "polygon",
    "flat-list": [6, 6, 26, 6, 26, 22],
    "nan": [[6, 6, 26, 6, 26, float("nan")]],
    "text-inside": [[6, 6, 26, 6, 26, "22"]],
    "no-size": {"counts": [1]},
}.items():
    fault("bad-segmentation", A3, name=label)(
        set_field("annotations", 4, segmentation=segmentation)
    )
fault("polygon-too-short", A3)(set_field("annotations", 4, segmentation=[[6, 6, 26, 22]]))
fault("bad-segmentation", A3, name="odd-length")(
    set_field("annotations", 4, segmentation=[[6, 6, 26, 6, 26, 22, 6]])
)
fault("segmentation-empty", A3)(set_field("annotations", 4, segmentation=[[6, 6, 26, 6, 6, 6]]))
fault("segmentation-empty", A3, name="runs")(
    set_field("annotations", 4, segmentation={"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]})
)
fault("segmentation-box-mismatch", A3)(
    set_field("annotations", 4, segmentation=[[36, 6, 56, 6, 56, 22, 36, 22]])
)
fault("bad-segmentation", A3, name="size")(
    set_field("annotations", 4, segmentation={"size": [WIDTH, HEIGHT], "counts": [0, 3072]})
)
for label, counts in {
    "characters": "éé",
    "unfinished": "ooo",
    "endless": "o" * 100_000,
    "negative": [5, -5, 3072],
    "float": [0.5, 3071.5],
    "none": None,
}.items():
    fault("bad-segmentation", A3, name=f"runs-{label}")(
        set_field("annotations", 4, segmentation={"size": [HEIGHT, WIDTH], "counts": counts})
    )
fault("bad-segmentation", A3, name="too-few-runs")(
    set_field("annotations", 4, segmentation={"size": [HEIGHT, WIDTH], "counts": [100, 50, 100]})
)
fault("bad-segmentation", "annotations[3], annotation 104", name="cut-off")(
    lambda data, folder: data["annotations"][3]["segmentation"].update(
        counts=data["annotations"][3]["segmentation"]["counts"][:-3]
    )
)


@fault("mostly-crowds", "set.json")
def _(data: dict[str, Any], folder: Path) -> None:
    for annotation in data["annotations"]:
        annotation |= {"iscrowd": 1, "segmentation": rle_of(annotation["bbox"], True)}


fault("crowd-with-polygon", A3)(set_field("annotations", 4, iscrowd=1))


@pytest.mark.parametrize("planted", FAULTS)
def test_planted_fault_is_found_and_named(planted: Fault, tmp_path: Path) -> None:
    data = write_clean_set(tmp_path)
    changed = planted.plant(data, tmp_path)
    report = check(data if changed is None else changed, tmp_path)
    groups = report.by_kind()
    assert set(groups) == {planted.kind, *planted.also}
    found = groups[planted.kind]
    assert len(found) == len(planted.places)
    for problem, place in zip(found, planted.places, strict=True):
        assert place in f"{problem.file} {problem.where}"
    severities = {KINDS[kind].severity for kind in groups}
    assert report.ok == ("error" not in severities)
    assert f"{planted.kind} ({len(found)})" in report.table()
    json.dumps(report.to_dict())


def test_every_kind_is_planted() -> None:
    planted = {parameters.values[0].kind for parameters in FAULTS}
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
