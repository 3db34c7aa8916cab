"""Annotations of six kinds: one toy set in all of them gives the same training batches."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mimdet import cli
from mimdet.config import DataConfig
from mimdet.data.coco import CocoDataset
from mimdet.data.formats import convert
from mimdet.data.loader import TrainLoader
from mimdet.data.splits import split_file

NAMES = ["cell", "dish"]
SIZES = [(48, 64), (64, 48), (40, 40)]  # height, width
# Of each image its objects: class, corners of an axis-parallel polygon in whole pixels.
OBJECTS = [[(0, 4, 6, 20, 30), (1, 30, 10, 60, 40)], [(1, 5, 5, 25, 45)], []]


def corners(x0: int, y0: int, x1: int, y1: int) -> list[int]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def write_images(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(len(SIZES))]


def coco(folder: Path) -> None:
    names, annotations = write_images(folder / "images"), []
    for i, things in enumerate(OBJECTS, 1):
        for label, x0, y0, x1, y1 in things:
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1}
            entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            entry |= {"segmentation": [corners(x0, y0, x1, y1)], "iscrowd": 0}
            annotations.append(entry)
    images = [
        {"id": i, "file_name": name, "height": h, "width": w}
        for i, (name, (h, w)) in enumerate(zip(names, SIZES, strict=True), 1)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))


def voc(folder: Path) -> None:
    names = write_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name, (h, w), things in zip(names, SIZES, OBJECTS, strict=True):
        objects = "".join(
            f"<object><name>{NAMES[label]}</name><pose>Left</pose><bndbox><xmin>{x0}</xmin>"
            f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, x0, y0, x1, y1 in things
        )
        size = f"<size><width>{w}</width><height>{h}</height></size>"
        text = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        (folder / "Annotations" / name).with_suffix(".xml").write_text(text)


def yolo(folder: Path, segments: bool = True) -> None:
    names = write_images(folder / "images" / "train")
    (folder / "labels" / "train").mkdir(parents=True)
    (folder / "data.yaml").write_text("train: images/train\nnames: {0: cell, 1: dish}\n")
    for name, (h, w), things in zip(names, SIZES, OBJECTS, strict=True):
        lines = []
        for label, x0, y0, x1, y1 in things:
            flat: list[float] = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
            flat = corners(x0, y0, x1, y1) if segments else flat  # type: ignore[assignment]
            shares = [f"{value / (h if i % 2 else w):.6f}" for i, value in enumerate(flat)]
            lines.append(" ".join([str(label), *shares]))
        text = folder / "labels" / "train" / name
        text.with_suffix(".txt").write_text("\n".join(lines))


def labelme(folder: Path) -> None:
    for name, (h, w), things in zip(write_images(folder), SIZES, OBJECTS, strict=True):
        shapes = [
            {"label": NAMES[label], "points": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}
            for label, x0, y0, x1, y1 in things
        ]
        about = {"imagePath": name, "imageHeight": h, "imageWidth": w, "shapes": shapes}
        (folder / name).with_suffix(".json").write_text(json.dumps(about))


def bitmap(i: int, rank: int) -> np.ndarray:
    _, x0, y0, x1, y1 = OBJECTS[i][rank]
    mask = np.zeros(SIZES[i], bool)
    mask[y0:y1, x0:x1] = True
    return mask


def masks(folder: Path) -> None:
    (folder / "masks").mkdir(parents=True)
    for i, name in enumerate(write_images(folder / "images")):
        ids = np.zeros(SIZES[i], np.uint8)
        for rank in range(len(OBJECTS[i])):
            ids[bitmap(i, rank)] = 3 * rank + 1
        Image.fromarray(ids).save(folder / "masks" / name)


def stage1(folder: Path) -> None:
    """As in DSB2018: a folder an image, a PNG an object."""
    for i, name in enumerate(write_images(folder / "all")):
        place = folder / f"scene{i}"
        (place / "images").mkdir(parents=True)
        (place / "masks").mkdir()
        (folder / "all" / name).rename(place / "images" / f"scene{i}.png")
        for rank in range(len(OBJECTS[i])):
            Image.fromarray(bitmap(i, rank)).save(place / "masks" / f"{rank}.png")
        if not OBJECTS[i]:
            Image.fromarray(np.zeros(SIZES[i], bool)).save(place / "masks" / "none.png")


def table(folder: Path) -> None:
    names = write_images(folder / "images")
    objects = [
        {
            "bbox": [[x0, y0, x1 - x0, y1 - y0] for _, x0, y0, x1, y1 in things],
            "category": [label for label, *_ in things],
            "segmentation": [[corners(*box)] for _, *box in things],
        }
        for things in OBJECTS
    ]
    kind: Any = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.ClassLabel(names=NAMES)),
        "segmentation": datasets.List(datasets.List(datasets.List(datasets.Value("float32")))),
    }
    features = datasets.Features({"image": datasets.Image(), "objects": kind})
    rows = {"image": [str(folder / "images" / name) for name in names], "objects": objects}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "table"))


def batches(json_path: Path, images: Path, mask: bool) -> Any:
    dataset = CocoDataset(json_path, images, skip_empty=True, masks=mask)
    cfg = DataConfig(augment="multiscale", short_sides=(32, 40), workers=0)
    steps = TrainLoader(dataset, cfg, batch_size=2, accumulate=1, seed=3).batches(0, 2)
    return dataset, [batch for step in steps for batch in step]


@pytest.mark.parametrize("write", [voc, yolo, labelme, masks, stage1, table])
def test_the_same_set_gives_the_same_batches(write, tmp_path, capsys):
    coco(tmp_path / "coco")
    write(tmp_path / "other")
    source = tmp_path / "other" / ("table" if write is table else "")
    options = ["--bbox-format", "xywh"] if write is table else []
    out = tmp_path / "set.json"
    cli.main(["convert", str(source), str(out), *options])
    printed = capsys.readouterr().out
    has_masks, one_class = write is not voc, write in (masks, stage1)
    assert f"3 images, 1 of them without objects; 3 objects, {3 * has_masks} with" in printed
    assert ("`pose`: 3" in printed) == (write is voc)
    folder = Path(printed.partition("image folder: ")[2].splitlines()[0])
    cli.main(["check-data", str(out), str(folder)])  # exits with 1 for an error
    _, expected = batches(tmp_path / "coco" / "set.json", tmp_path / "coco" / "images", has_masks)
    dataset, found = batches(out, folder, has_masks)
    assert dataset.categories == (["object"] if one_class else NAMES)
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        for x, y in zip(a.targets, b.targets, strict=True):
            torch.testing.assert_close(x.boxes, y.boxes, atol=1e-3, rtol=0)
            assert one_class or torch.equal(x.labels, y.labels)
            if has_masks:  # 0 or 255: a cell that the outline halves may fall to either side
                differ = (x.masks.bitmaps.int() - y.masks.bitmaps.int()).abs() > 127
                assert differ.float().mean() < 0.02


@pytest.mark.parametrize(
    ("write", "file", "old", "new", "said"),
    [
        (voc, "Annotations/0.xml", "<xmax>20</xmax>", "", "object 0: bndbox needs xmin"),
        (voc, "Annotations/0.xml", "<xmax>20<", "<xmax>2<", "object 0: xmax or ymax is below"),
        (voc, "Annotations/0.xml", "<width>64", "<width>640", "is for 640 x 48 pixels"),
        (voc, "Annotations/0.xml", "</annotation>", "", "0.xml is not xml"),
        (yolo, "labels/train/0.txt", "0 0.0", "7 0.0", "line 1: class 7; there are \\[0, 1\\]"),
        (yolo, "labels/train/0.txt", "0 0.0", "0 40.0", "line 1: YOLO's numbers are shares"),
        (yolo, "labels/train/0.txt", "0 0.062500 ", "0 ", "line 1: 7 numbers; a box has 4"),
        (yolo, "data.yaml", "train: images/train", "train: images/none", "holds no images"),
        (yolo, "data.yaml", "names:", "kpt_shape: [2, 3]\nnames:", "is of key points"),
        (labelme, "0.json", '"label": "cell"', '"label": ""', "shapes\\[0\\].label is wrong"),
        (labelme, "0.json", '"imageHeight": 48', '"imageHeight": 96', "is for 64 x 96 pixels"),
        (labelme, "0.json", "0.png", "9.png", None),  # its stem finds the image
    ],
)
def test_what_cannot_be_right_is_named(write, file, old, new, said, tmp_path):
    write(tmp_path / "set")
    path = tmp_path / "set" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    if said is None:
        assert convert(tmp_path / "set", tmp_path / "out.json").images == 3
        return
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        convert(tmp_path / "set", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_pixels_of_pascal_count_from_one(tmp_path):
    """Box 1..64 x 1..48 is the whole image of 64 x 48; an object that is hard becomes a crowd."""
    voc(tmp_path)
    path = tmp_path / "Annotations" / "0.xml"
    source = "<source><database>The VOC2007 Database</database></source>"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox>"
    item = f"<object><name>cell</name><difficult>1</difficult>{box}</object>"
    path.write_text(f"<annotation>{source}{item}</annotation>")
    report = convert(tmp_path, tmp_path / "out.json")
    first = json.loads((tmp_path / "out.json").read_text())["annotations"][0]
    assert first["bbox"] == [0, 0, 64, 48] and first["iscrowd"] == 1
    assert "difficult objects, now crowds (left out of training): 1" in str(report)


def test_yolo_boxes_and_groups_of_labelme(tmp_path):
    yolo(tmp_path / "yolo", segments=False)
    report = convert(tmp_path / "yolo", tmp_path / "yolo.json")
    assert (report.masks, dict(report.classes)) == (0, {"cell": 1, "dish": 2})
    labelme(tmp_path / "me")
    path = tmp_path / "me" / "0.json"
    about = json.loads(path.read_text())
    part = {"label": "cell", "group_id": 5, "points": [[0, 0], [4, 0], [0, 4]]}
    about["shapes"] = [part, part | {"points": [[10, 10], [14, 10], [10, 14]]}]
    about["shapes"] += [{"label": "dish", "shape_type": "line", "points": [[0, 0], [9, 9]]}]
    path.write_text(json.dumps(about))
    report = convert(tmp_path / "me", tmp_path / "me.json")
    found = json.loads((tmp_path / "me.json").read_text())["annotations"]
    assert found[0]["bbox"] == [0, 0, 14, 14] and len(found[0]["segmentation"]) == 2
    assert "shapes that enclose nothing (line): 1" in str(report)


@pytest.mark.parametrize("write", [voc, yolo, labelme])
def test_training_names_the_command(write, tmp_path):
    write(tmp_path / "set")
    for path in [tmp_path / "set", next(tmp_path.rglob("*.xml"), None)]:
        if path:
            with pytest.raises(ValueError, match=r"mimdet convert .*set"):
                CocoDataset(path, tmp_path)
            words = ["train", "tiny", str(tmp_path / "run"), "--source", "coco", "--train-json"]
            with pytest.raises(SystemExit, match=r"mimdet convert .*set"):
                cli.main([*words, str(path), "--train-images", str(tmp_path)])


def frames(folder: Path, videos: int = 10, each: int = 3) -> Path:
    """Videos of frames, all of a video with one class; the last two have a class of their own."""
    images, annotations = [], []
    for video in range(videos):
        for frame in range(each):
            number = len(images) + 1
            name = f"v{video}_{frame}.png"
            images.append({"id": number, "file_name": name, "width": 8, "height": 8})
            entry = {"id": number, "image_id": number, "category_id": 1 + (video > videos - 3)}
            annotations.append(entry | {"bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "all.json"
    path.write_text(json.dumps(content))
    return path


def test_split_keeps_groups_whole_and_classes_in_proportion(tmp_path, capsys):
    """Of ten videos a fifth is two: one with the rare class, which two have."""
    path, parts = frames(tmp_path), {}
    words = ["split", str(path), str(tmp_path / "two"), "--by-name", "^(v[0-9]+)_"]
    cli.main(words)
    said = capsys.readouterr().out.split()
    assert said[2:5] == ["images", "24", "6"] and said[5:8] == ["groups", "8", "2"]
    for part in ("train", "val"):
        content = json.loads((tmp_path / "two" / f"{part}.json").read_text())
        parts[part] = {image["file_name"][:2] for image in content["images"]}
        assert len(content["annotations"]) == len(content["images"])
    assert not parts["train"] & parts["val"]
    assert len(parts["val"] & {"v8", "v9"}) == 1
    before = (tmp_path / "two" / "val.json").read_text()
    cli.main(words)
    assert (tmp_path / "two" / "val.json").read_text() == before  # the seed decides
    with pytest.raises(SystemExit, match="no field 'patient'"):
        cli.main([*words[:3], "--by-field", "patient"])
    with pytest.raises(SystemExit, match=r"would have no image; 1 group"):
        cli.main([*words[:3], "--by-name", "v"])


def test_split_by_image_is_stratified(tmp_path):
    split_file(frames(tmp_path, each=10), tmp_path, 0.3)
    content = json.loads((tmp_path / "val.json").read_text())
    labels = [entry["category_id"] for entry in content["annotations"]]
    assert (labels.count(1), labels.count(2)) == (24, 6)  # of 80 and 20


def test_an_image_in_both_sets_is_named_with_both_files(tmp_path, capsys):
    coco(tmp_path / "a")
    coco(tmp_path / "b")
    rng = np.random.default_rng(1)
    other = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    other.save(tmp_path / "b" / "images" / "2.png")
    with Image.open(tmp_path / "a" / "images" / "1.png") as image:
        grey = np.asarray(image).astype(int) + 1  # another file, the same picture
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(tmp_path / "b" / "images" / "1.png")
    here, there = ([str(tmp_path / s / "set.json"), str(tmp_path / s / "images")] for s in "ab")
    with pytest.raises(SystemExit):
        cli.main(["check-data", *here, "--against", there[0], "--against-images", there[1]])
    said = capsys.readouterr().out
    same = f"0.png has the same bytes as {tmp_path / 'b' / 'images' / '0.png'}"
    assert "error in-both-sets (1)" in said and same in said
    assert "warning nearly-in-both-sets (1)" in said and "b/images/1.png" in said
