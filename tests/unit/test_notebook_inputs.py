"""What a notebook opens: its own pictures and models, a photo, a folder, and what is said when
something is missing."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from mimdet import notebook_setup
from mimdet.data.coco import build_dataset
from mimdet.notebook import open_detector, open_mae, open_pictures


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (30, 20), (10, 20, 30)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images in COCO format; the second has no object."""
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20), "white").save(tmp_path / "images" / name)
    box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 5], "iscrowd": 0}
    box |= {"area": 50, "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]]}
    data = {
        "images": [
            {"id": i, "file_name": name, "width": 30, "height": 20}
            for i, name in enumerate(("a.png", "b.png"), start=1)
        ],
        "categories": [{"id": 7, "name": "cell"}],
        "annotations": [box],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(data))
    return tmp_path


def test_quick_mode_opens_held_out_scenes_and_how_a_configuration_names_them() -> None:
    pictures = open_pictures(count=3)
    assert len(pictures.images) == len(pictures.targets) == 3
    assert len(pictures.categories) == 12
    again = build_dataset(pictures.data, "val")[2]
    assert torch.equal(again.image, pictures.images[2])
    assert torch.equal(again.target.boxes, pictures.targets[2].boxes)


def test_a_photo(photo: Path) -> None:
    pictures = open_pictures(str(photo))
    assert pictures.images[0].shape == (3, 20, 30)
    assert pictures.images[0][:, 0, 0].tolist() == [10, 20, 30]
    assert len(pictures.targets[0]) == 0
    assert pictures.dataset is None
    assert pictures.categories == []


def test_a_folder_and_how_a_configuration_names_it(folder: Path) -> None:
    pictures = open_pictures(folder)
    assert [len(target) for target in pictures.targets] == [1, 0]
    assert pictures.targets[0].boxes.tolist() == [[2, 3, 12, 8]]
    assert pictures.categories == ["cell"]
    assert [record.image_id for record in open_pictures(folder, count=1).records] == [1]
    for split in ("train", "val"):
        assert len(build_dataset(pictures.data, split)) > 0


@pytest.mark.parametrize("missing", ["annotations.json", "images"])
def test_a_folder_without_a_part_says_which_layout_is_meant(folder: Path, missing: str) -> None:
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"annotations\.json .* and images/"):
        open_pictures(folder)


def test_a_folder_without_images(folder: Path) -> None:
    empty = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    (folder / "annotations.json").write_text(json.dumps(empty))
    with pytest.raises(ValueError, match="no images"):
        open_pictures(folder)


def test_a_path_that_is_no_photo(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg does not exist: give a photo"):
        open_pictures("nowhere.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be read as an image"):
        open_pictures(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "opened", [notebook_setup, lambda mode: open_pictures(mode=mode), open_detector, open_mae]
)
def test_an_unknown_mode_is_refused(opened) -> None:
    with pytest.raises(ValueError, match=r"MODE='fast': use one of \['quick', 'full'\]"):
        opened("fast")


@pytest.mark.parametrize("opened", [notebook_setup, lambda mode: open_pictures(mode=mode)])
def test_full_mode_without_coco(monkeypatch: pytest.MonkeyPatch, opened) -> None:
    monkeypatch.delenv("MIMDET_COCO", raising=False)
    with pytest.raises(ValueError, match=r"set the environment variable MIMDET_COCO.*val2017"):
        opened("full")


@pytest.mark.parametrize(
    ("opened", "name", "file", "loader"),
    [
        (
            open_detector,
            "mimdet-base",
            "mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.pth",
            "training.run.load_detector",
        ),
        (
            open_mae,
            "mae-base-visualize",
            "mae_visualize_vit_base.pth",
            "models.weights.load_mae_model",
        ),
    ],
)
def test_full_mode_opens_downloaded_weights_or_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, opened, name: str, file: str, loader: str
) -> None:
    monkeypatch.setenv("MIMDET_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"mimdet download {name}.*MIMDET_WEIGHTS"):
        opened("full")
    (tmp_path / file).touch()
    load = Mock()
    monkeypatch.setattr(f"mimdet.{loader}", load)
    opened("full")
    load.assert_called_once_with(str(tmp_path / file))


def test_quick_mode_opens_the_shipped_models() -> None:
    detector, mae = open_detector(), open_mae()
    assert not detector.training
    assert not mae.training
    assert len(detector.detect([open_pictures(count=1).images[0]])) == 1
