"""`mimdet start`: the choices by hand, and from a folder of pictures to a run."""

import json

import numpy as np
import pytest

import mimdet
from mimdet import cli
from mimdet.config import load_config
from mimdet.data.coco import CocoDataset
from mimdet.training import proposal as module
from mimdet.training.proposal import Proposal, choose_length, choose_size, find_files, sizes_of
from mimdet.viz import show_sizes
from tests.unit.test_formats import coco, frames, voc


def test_steps_by_hand():
    """12 passes over 200 images at 4 a step are 600 steps. Of 10 minutes five evaluations of 10 s
    leave 550 s: enough for steps of 0.5 s, for 275 of 2 s, and not for 50 of 20 s, each five times
    evaluated."""
    fewest = "the fewest that teach anything, more than 10 minutes"
    for step, steps, said in (
        (0.5, 600, "enough for so many"),
        (20.0, 50, fewest),
        (2.0, 275, "600 would be better"),
    ):
        cfg, reasons = mimdet.presets.tiny(), {}
        choose_length(cfg, reasons, 200, 10, step, 10.0)
        assert cfg.training.steps == steps and said in reasons["training.steps"]
        assert cfg.training.evaluate_every_steps == steps // 5
        made = Proposal(cfg, reasons, [], np.ones(1), step, 10.0, 5, 3.0, 0, 0)
        assert made.seconds == 3 + steps * step + 50
    assert "--minutes 21" in reasons["training.steps"]  # 600 x 2 s and 50 s


def test_size_by_hand(tmp_path):
    """Objects of a 25th of images of 400 pixels are 20 pixels large at 500, which is 512 here."""
    path = frames(tmp_path)
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["width"] = image["height"] = 400
        (tmp_path / image["file_name"]).touch()
    path.write_text(json.dumps(content))
    cfg, reasons = mimdet.presets.tiny(), {}
    choose_size(cfg, reasons, np.full(100, 0.04), CocoDataset(path, tmp_path))
    assert cfg.data.test_short_side == 512 and cfg.data.short_sides == (448, 512, 576)
    assert cfg.detector.anchor_sizes == (24, 48, 96, 192, 384)  # objects of 20.48
    assert "(stored: 16, in pictures of 400)" in reasons["data.test_short_side"]


def test_sizes_of_objects_by_hand(tmp_path):
    """Boxes of 4 x 4 in images of 8 x 8, of 2 x 8 in one of 8 x 32, and a crowd that counts for
    nothing: all are half of the short side."""
    path = frames(tmp_path, 1, 3)
    content = json.loads(path.read_text())
    content["images"][1]["width"], content["annotations"][1]["bbox"] = 32, [0, 0, 8, 2]
    crowd = {"id": 9, "bbox": [0, 0, 8, 8], "area": 64, "iscrowd": 1}
    content["annotations"].append(content["annotations"][0] | crowd)
    for image in content["images"]:
        (tmp_path / image["file_name"]).touch()
    path.write_text(json.dumps(content))
    shares, most = sizes_of(CocoDataset(path, tmp_path))
    assert shares.tolist() == [0.5, 0.5, 0.5] and most == 1


def test_from_a_folder_to_a_run(tmp_path, monkeypatch, capsys):
    """VOC xml of three images, one empty: converted, split, proposed, written, trained on a yes."""
    monkeypatch.setattr(module, "MEASURED", 2)
    monkeypatch.setattr(module, "SIDES", (64, 64))
    monkeypatch.setattr(module, "STEPS_AT_LEAST", 2)
    monkeypatch.setattr(module, "EPOCHS", 1)
    voc(tmp_path / "mine")
    run = tmp_path / "run"
    cli.main(["start", str(tmp_path / "mine"), str(run)])
    said = capsys.readouterr().out
    for words in ("converted into", "split by image", "time    about", "not trained yet"):
        assert words in said
    cfg = load_config(run / "config.json")
    assert not cfg.detector.masks and "detector.masks = False: there are boxes only" in said
    assert cfg.training.init_from == "tiny" and cfg.training.steps == 2
    reasons = json.loads((run / "proposal.json").read_text())["reasons"]
    assert reasons.keys() > {"preset", "data.test_short_side", "training.steps", "data.flips"}
    with pytest.raises(SystemExit, match="holds a run already"):
        cli.main(["start", str(tmp_path / "mine"), str(run)])
    cli.main(["start", str(tmp_path / "mine"), str(tmp_path / "other"), "--yes"])
    assert "warm start from tiny" in (said := capsys.readouterr().out)
    assert f"done: {tmp_path / 'other'}" in said and (tmp_path / "other" / "eval.json").exists()


def test_what_is_found_in_a_folder(tmp_path):
    coco(tmp_path / "mine")
    (tmp_path / "mine" / "set.json").rename(tmp_path / "mine" / "train_set.json")
    found = find_files(tmp_path / "mine", tmp_path / "work")  # one file: split
    assert (
        found.train_json == tmp_path / "work" / "train.json" and "split by image" in found.notes[0]
    )
    text = (tmp_path / "mine" / "train_set.json").read_text()
    (tmp_path / "mine" / "val.json").write_text(text)
    found = find_files(tmp_path / "mine", tmp_path / "work")
    assert found.val_json.name == "val.json" and found.val_images == tmp_path / "mine" / "images"
    notes = module.checked_files(found)  # every image is in both
    assert any(note.startswith("in-both-sets (3)") for note in notes)
    content = json.loads(text)
    content["annotations"][0]["category_id"] = 7
    (tmp_path / "mine" / "val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"val.json: annotations.0.*unknown-category"):
        module.checked_files(found)
    with pytest.raises(ValueError, match="holds no COCO json"):
        find_files(tmp_path / "mine" / "images", tmp_path / "work")


def test_one_object_without_a_mask_is_named(tmp_path):
    """It costs all the masks, so that the reason must say which one it is."""
    coco(tmp_path)
    path = tmp_path / "set.json"
    files = module.Files(path, tmp_path / "images", path, tmp_path / "images", [])
    assert module.complete_masks(files) == ""
    content = json.loads(path.read_text())
    del content["annotations"][1]["segmentation"]
    path.write_text(json.dumps(content))
    said = module.complete_masks(files)
    assert said.startswith("boxes alone are learned") and "annotation" in said
    assert "set.json" in said and "in all: 1)" in said


def test_figure_of_sizes():
    fig = show_sizes(np.array([8.0, 12.0, 40.0, 100.0]), (12, 24, 48, 96, 192))
    assert "median 26, 50% below a token's 16" in fig.alt_text
