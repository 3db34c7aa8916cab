"""`mimdet predict` on folders, lists and patterns; what it writes, and who can read that."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2

import mimdet
from mimdet import cli
from mimdet.analysis.outlines import coco_annotations, mask_outlines
from mimdet.data.coco import CocoDataset, named_images
from mimdet.images import find_images
from mimdet.structures import Detections, as_rle, paste, rle_to_bitmap
from tests.small import small_detector, write_coco


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A detector of one class, `cell`, that is sure of nothing."""
    model = small_detector()
    model.categories, model.category_ids = ["cell", *map(str, range(11))], [7, *range(20, 31)]
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    mimdet.save_detector(model, file)
    return str(file)


@pytest.fixture
def photos(tmp_path) -> Path:
    """photos/1.png and photos/more/1.jpg, the second turned by its EXIF tag, beside other files."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "more/1.jpg", exif=exif)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_folders_patterns_and_lists(photos, monkeypatch):
    both = [photos / "1.png", photos / "more/1.jpg"]
    assert find_images([str(photos)]) == both
    assert find_images([str(photos / "**/*.jpg"), str(photos)]) == both[::-1]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, both[::-1]))))
    assert find_images(["-", str(photos / "1.png")]) == both[::-1]
    empty = photos / "empty"
    empty.mkdir()
    for word, said in ((empty, "holds no image file"), (photos / "2.png", "is no file, folder or")):
        with pytest.raises(FileNotFoundError, match=said):
            find_images([str(word)])


def test_a_folder_becomes_one_file_that_annotation_tools_read(weights, photos, tmp_path, capsys):
    """pycocotools, torchvision and this kit."""
    out = tmp_path / "found"
    cli.main(["predict", weights, str(photos), "--out", str(out), "--score", "0.05"])
    said = capsys.readouterr().out
    file = out / "annotations.json"
    truth = COCO(str(file))
    assert "2 images, " in said and f"a second: {len(truth.anns)} objects" in said
    assert [(i["file_name"], i["width"], i["height"]) for i in truth.dataset["images"]] == [
        ("1.png", 64, 48),
        ("more/1.jpg", 48, 64),  # upright
    ]
    assert truth.loadCats([7])[0]["name"] == "cell" and len(truth.anns) > 2
    for entry in truth.anns.values():
        assert abs(truth.annToMask(entry).sum() - entry["area"]) < 0.1 * entry["area"] + 12
    assert sorted(path.name for path in out.iterdir()) == ["annotations.json", "pictures.jpg"]
    assert Image.open(out / "pictures.jpg").width > 1400
    plain = CocoDetection(str(photos), str(file))
    theirs = wrap_dataset_for_transforms_v2(plain, target_keys=("boxes", "masks"))
    assert len(theirs[0][1]["masks"]) == len(truth.getAnnIds([1]))
    faults = mimdet.check_dataset(file, photos).by_kind()  # masks of an untrained detector
    assert faults.keys() <= {"segmentation-box-mismatch", "category-unused"}
    assert len(CocoDataset(file, photos)) == 2


def test_with_annotations_the_ids_are_theirs(weights, tmp_path, capsys):
    file = write_coco(tmp_path, [[[5, 6, 30, 20]]] * 2)
    content = json.loads(file.read_text())
    for image, thing in zip(content["images"], content["annotations"], strict=True):
        image["id"] = thing["image_id"] = 100 * image["id"]
    file.write_text(json.dumps(content))
    Image.new("RGB", (64, 64)).save(tmp_path / "images/other.png")
    out = ["--out", str(tmp_path / "found"), "--annotations", str(file)]
    cli.main(["predict", weights, str(tmp_path / "images"), *out])
    assert f"left out: 1 images that {file} does not name" in capsys.readouterr().out
    found = json.loads((tmp_path / "found/predictions.json").read_text())
    assert {entry["image_id"] for entry in found} == {100, 200}
    assert {entry["category_id"] for entry in found} == {7}  # the file knows one class
    assert len(COCO(str(file)).loadRes(found).anns) == len(found)
    Image.new("RGB", (64, 60)).save(tmp_path / "images/2.png")
    with pytest.raises(SystemExit, match=r"2.png is no image of \(64, 64\) pixels, as annotated"):
        cli.main(["predict", weights, str(tmp_path / "images"), *out])


def test_a_single_image_has_all_its_detections_by_name(weights, photos, tmp_path):
    out = tmp_path / "found"
    cli.main(["predict", weights, str(photos / "more/1.jpg"), "--out", str(out), "--score", "1"])
    found = json.loads((out / "1.json").read_text())
    assert not COCO(str(out / "annotations.json")).anns  # none is sure
    assert {r["category_id"] for r in found if r["category"] == "cell"} == {7}
    assert len(found) > 10 and {tuple(r["segmentation"]["size"]) for r in found} == {(64, 48)}


def test_files_are_found_by_the_longest_name_that_is_known(tmp_path):
    file = write_coco(tmp_path, [[]] * 2)
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = "b/1.png"
    file.write_text(json.dumps(content))
    dataset = CocoDataset(file, None)
    a, b, c = (Path(f"{folder}/1.png") for folder in ("a", "x/b", "c"))
    assert named_images(dataset, [a, b, Path("2.png")]) == {a: 0, b: 1}
    with pytest.raises(ValueError, match=r"a/1.png and c/1.png are both '1.png' of"):
        named_images(dataset, [a, c])
    with pytest.raises(ValueError, match="names none of these images"):
        named_images(dataset, [Path("3.png")])


def test_nothing_found_and_what_cannot_be_read_are_sentences(weights, photos, tmp_path, capsys):
    (photos / "0.png").write_bytes(b"no image")
    words = ["predict", weights, str(photos), "--out", str(tmp_path / "found"), "--score", "1"]
    with pytest.raises(
        SystemExit, match=r"1 of 3 images are left out, first: .*0.png can"
    ) as ended:
        cli.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().out
    assert "2 images, " in said and ": 0 objects; " in said
    assert "nothing reaches the score 1; the surest has 0." in said
    assert json.loads((tmp_path / "found/annotations.json").read_text())["annotations"] == []


def test_a_score_for_each_class(weights, photos, tmp_path):
    """`cell` from 0, the others never; and what is said where there is no such file."""
    file = tmp_path / "thresholds.json"
    best = {"cell": {"score": 0.0}} | {str(number): {"score": 1.0} for number in range(11)}
    file.write_text(json.dumps(best))
    words = ["predict", weights, str(photos / "1.png"), "--out", str(tmp_path / "found")]
    cli.main([*words, "--thresholds", str(file)])
    found = json.loads((tmp_path / "found/annotations.json").read_text())["annotations"]
    assert found and {entry["category_id"] for entry in found} == {7}
    with pytest.raises(SystemExit, match=r"thresholds.json: `mimdet errors .* makes it"):
        cli.main([*words, "--thresholds", "best"])


def test_outlines_are_the_border_of_the_mask():
    """A box of 28 x 56 pixels whose cells are a pixel wide and two high; a disc with a hole."""
    y, x = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    away = (x**2 + y**2).sqrt()
    cells = torch.stack([torch.ones(28, 28), (away < 12).float(), torch.zeros(28, 28)])
    boxes = torch.tensor([[10.0, 20.0, 38.0, 76.0]] * 3)
    square, disc, empty = mask_outlines(cells, boxes, (100, 100))
    assert empty == [[10, 20, 38, 20, 38, 76, 10, 76]]
    assert square[0][::2] and min(square[0][::2]) == 10 and max(square[0][1::2]) == 76
    for outline, mask in zip((square, disc), paste(cells, boxes, 100, 100), strict=False):
        own = rle_to_bitmap(as_rle(outline, 100, 100))
        union, both = (own | mask.numpy()).sum(), (own & mask.numpy()).sum()
        assert both > 0.95 * union
    cells[1][away < 5] = 0
    assert mask_outlines(cells, boxes, (100, 100))[1] == disc  # without its hole
    found = Detections(boxes[:1], torch.ones(1), torch.zeros(1).long(), (50, 50), cells[:1])
    (entry,) = coco_annotations(found, 3, [7], first=5)
    assert (entry["id"], entry["image_id"], entry["category_id"], entry["iscrowd"]) == (5, 3, 7, 0)
    assert entry["area"] == pytest.approx(28 * 30, abs=3) and max(entry["segmentation"][0]) == 50
    found.mask_probabilities = None
    assert coco_annotations(found, 3, [7])[0]["segmentation"] == []
