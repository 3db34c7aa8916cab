"""The cells of a notebook: the first one, checks, the live figure, and what they open."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import mimdet
from mimdet import check, notebook, notebook_setup
from mimdet.data.coco import build_dataset
from mimdet.files import SHIPPED
from mimdet.notebook import open_detector, open_mae, open_pictures, watch
from mimdet.training.trainer import Step
from mimdet.viz import new_figure
from mimdet.viz.style import NotebookFigure
from tests.small import write_coco
from tools import rehearsal


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The setup cell changes the process; the next test must not notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------- the first cell


def test_quick_mode_says_what_it_is_and_trains(capsys) -> None:
    cfg = notebook_setup("quick", seed=3, minutes={"quick": 1.5, "full": 9})
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["mode", "device", "versions", "time", "data"]
    assert lines["mode"] == "quick: preset tiny, seed 3"
    assert lines["time"] == "about 1.5 min"
    assert lines["data"] == "shapes-v1-easy, 128 px, drawn on the fly: no files"
    assert f"torch {torch.__version__}" in lines["versions"]
    assert cfg.training.seed == 3

    data = mimdet.build_dataset(cfg.data, "train")
    losses = mimdet.build_detector(cfg).train()([data[0].image], [data[0].target])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert cfg.detector.num_classes == len(data.categories)
    assert cfg.data.test_short_side == data.image_size(0)[0]  # seen as drawn, not enlarged


def test_setup_repeats_every_random_number_and_steps_override_the_modes_own() -> None:
    def drawn(seed: int) -> tuple[float, float, float]:
        notebook_setup("quick", seed=seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = drawn(1)
    assert drawn(1) == first
    assert all(a != b for a, b in zip(drawn(2), first, strict=True))
    assert notebook_setup("quick", steps=7).training.steps == 7
    assert notebook_setup("quick").training.steps == notebook.quick_config().training.steps > 7


def test_full_mode_takes_coco_from_the_variable(tmp_path, monkeypatch, capsys) -> None:
    for place in notebook.COCO_LAYOUT.values():
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    monkeypatch.setenv("MIMDET_COCO", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/downloads.*mae-base-full"):
        notebook_setup("full")  # a recipe that starts from an autoencoder has one
    (tmp_path.parent / "downloads").mkdir()
    beside = tmp_path.parent / "downloads" / "mae_pretrain_vit_base_full.pth"
    beside.touch()
    cfg = notebook_setup("full", minutes={"quick": 1})
    assert cfg.training.init_from == str(beside)
    assert (cfg.preset, cfg.data.source) == ("mimdet_base", "coco")
    assert cfg.data.train_json == str(tmp_path / "annotations" / "instances_train2017.json")
    assert cfg.data.val_images == str(tmp_path / "val2017")
    told = capsys.readouterr().out
    assert cfg.data.train_json in told
    assert "not measured" in told  # a time that nobody measured is not made up
    assert "a checkpoint takes 1.5 GB" in told

    (tmp_path / "val2017").rmdir()
    with pytest.raises(FileNotFoundError, match=r"val2017 is missing: MIMDET_COCO="):
        notebook_setup("full")


def test_full_mode_takes_changes_from_the_variable(monkeypatch, capsys) -> None:
    changes = "training.batch_size=2 data.short_sides=96,128 training.init_from=random"
    monkeypatch.setenv("MIMDET_FULL", changes)
    cfg = notebook.full_recipe()
    assert (cfg.training.batch_size, cfg.data.short_sides) == (2, (96, 128))
    assert cfg.training.init_from == "random"
    check("it learned", True, trained=True)
    monkeypatch.setenv("MIMDET_FULL", f"rehearsal {changes}")
    assert notebook.full_recipe() == cfg
    check("it learned", False, trained=True)
    said = capsys.readouterr().out.splitlines()
    assert said == ["✓ it learned", "- it learned (skipped: the weights are not trained)"]
    with pytest.raises(AssertionError):
        check("it adds up", False)
    for wrong, told in (("training.bach=2", "no field"), ("training.steps=many", "int")):
        monkeypatch.setenv("MIMDET_FULL", wrong)
        with pytest.raises(ValueError, match=told):
            notebook.full_recipe()


@pytest.mark.parametrize(
    ("wanted", "cores", "load", "threads"),
    [
        ("3", 16, 0.0, 3),  # said by the user
        ("", 2, 0.0, 1),
        ("", 6, 0.0, 3),
        ("", 16, 9.0, 1),  # others are at work
        ("many", 2, 0.0, 1),
        ("0", 16, 0.0, 4),
    ],
)
def test_threads(monkeypatch, wanted: str, cores: int, load: float, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    monkeypatch.setattr(notebook, "usable_cores", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load), raising=False)
    assert notebook.sensible_threads() == threads


def test_check_prints_a_tick_or_fails_with_the_text(capsys) -> None:
    check("rows sum to 1", torch.ones(()) == 1, "they are probabilities")
    check("kept", np.True_)
    assert capsys.readouterr().out == "✓ rows sum to 1: they are probabilities\n✓ kept\n"
    for condition in (False, torch.tensor(False), np.False_, []):
        with pytest.raises(AssertionError, match="✗ rows sum to 1: they are probabilities"):
            check("rows sum to 1", condition, "they are probabilities")
    assert capsys.readouterr().out == ""


def test_in_a_notebook_a_failed_check_shows_its_numbers_and_goes_on(capsys, monkeypatch) -> None:
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    monkeypatch.setitem(globals(), "last", 0.71234)
    check("it learned", last < 1 / 2, "of the first steps")  # noqa: F821
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["✗ it learned: of the first steps", "  last < 1 / 2", "  last = 0.7123"]
    assert said[3].endswith("The lesson goes on.")
    monkeypatch.setenv(notebook.STRICT, "1")
    with pytest.raises(AssertionError, match="it learned"):
        check("it learned", last < 1 / 2)  # noqa: F821


@pytest.mark.parametrize(
    ("answer", "right", "mark"),
    [(..., 120, "·"), (120, 120, "✓"), (119, 120, "✗"), (0.0099, 0.01, "✓"), (0.02, 0.01, "✗")]
    + [(7, lambda n: n % 2, "✓"), (8, lambda n: n % 2, "✗"), (..., lambda n: n % 2, "·")]
    + [("box", "box", "✓"), ("stem", "box", "✗"), (True, 1, "✗"), ({1, 2}, {2, 1}, "✓")],
)
def test_an_answer_is_judged(capsys, answer, right, mark: str) -> None:
    mimdet.judge(3, answer, right)
    assert capsys.readouterr().out.startswith(f"{mark} exercise 3: ")


def test_what_is_wrong_with_an_input_is_one_line_in_a_notebook() -> None:
    for wrong in (lambda: notebook.open_pictures("nowhere.jpg"), lambda: notebook_setup("fast")):
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            wrong()
        (line,) = caught.value._render_traceback_()
        assert line == f"{caught.type.__name__}: {caught.value}"


# ------------------------------------------------------------------------------- the live figure


def steps(count: int) -> Iterator[Step]:
    """Steps with a falling loss; the last one ends with an evaluation."""
    for number in range(1, count + 1):
        loss = 1 / number
        step = Step(number, count, {"loss_mask": loss}, loss, 0.0, 0.0, 1, 0.1, 0.0)
        if number == count:
            step.evaluation = {"box": {"AP": 0.25}}
        yield step


@pytest.fixture
def shown(monkeypatch) -> list[list[str]]:
    """A notebook is pretended; the alt texts of every drawing are noted, a list for each output."""
    outputs: list[list[str]] = []

    class Handle(list):
        update = lambda self, figure: self.append(figure.alt_text)  # noqa: E731

    def display(figure: NotebookFigure, display_id: bool) -> Handle:
        outputs.append(Handle([figure.alt_text]))
        return outputs[-1]

    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    monkeypatch.setattr(pytest.importorskip("IPython.display"), "display", display)
    return outputs


def test_watch_redraws_the_same_outputs_and_never_twice_the_same(shown, monkeypatch) -> None:
    assert list(watch(steps(0), every=0)) == shown == []
    seconds = iter(range(0, 1000, 10))  # every look at the clock is 10 s after the last
    monkeypatch.setattr(notebook, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    extra = new_figure(1, 1)
    extra.alt_text = "detections"
    list(watch(steps(4), lambda: extra, every=5))
    losses, detections = shown
    # A drawing takes 10 s here, so the next one waits for 90 s: one, and the last state.
    assert [text.rpartition(" at step ")[2].rstrip(".") for text in losses] == ["1", "4"]
    assert "0.25 at step 4" in losses[1] and "box AP 25.0 at step 4" in losses[1]
    assert detections == ["detections"] * 2


def test_watch_draws_after_an_interruption(shown) -> None:
    def interrupted() -> Iterator[Step]:
        yield from steps(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(watch(interrupted(), every=1e9))
    ((alt_text,),) = shown
    assert "at step 3" in alt_text


def test_watch_closes_the_training_and_outside_a_notebook_only_passes_steps_on(capsys) -> None:
    saved = []

    def training() -> Iterator[Step]:
        try:
            yield from steps(9)
        finally:
            saved.append(True)

    kept = training()  # a second reference: without closing, it would stay suspended
    for step in watch(kept):
        if step.number == 2:
            break
    assert saved == [True]
    assert not notebook.in_notebook()
    assert [step.number for step in watch(steps(5), lambda: 1 / 0, every=0)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------- what it opens


def test_quick_mode_opens_held_out_scenes_and_the_shipped_models() -> None:
    pictures = open_pictures(count=3)
    assert len(pictures.images) == len(pictures.targets) == 3
    assert len(pictures.categories) == 12
    again = build_dataset(pictures.data, "val")[2]  # how a configuration names them
    assert torch.equal(again.image, pictures.images[2])
    assert torch.equal(again.target.boxes, pictures.targets[2].boxes)
    detector, mae = open_detector(), open_mae()
    assert not detector.training and not mae.training
    assert len(detector.detect(pictures.images[:1])) == 1


def test_a_folder_and_how_a_configuration_names_it_or_a_photo(tmp_path) -> None:
    write_coco(tmp_path, [[[2, 3, 10, 5]], []], size=(30, 20))
    pictures = open_pictures(tmp_path)
    assert [len(target) for target in pictures.targets] == [1, 0]
    assert pictures.targets[0].boxes.tolist() == [[2, 3, 12, 8]]
    assert pictures.categories == ["cell"]
    assert [record.image_id for record in open_pictures(tmp_path, count=1).records] == [1]
    for split in ("train", "val"):
        assert len(build_dataset(pictures.data, split)) > 0
    photo = tmp_path / "photo.png"
    Image.new("RGB", (30, 20), (10, 20, 30)).save(photo)
    pictures = open_pictures(str(photo))
    assert pictures.images[0].shape == (3, 20, 30)
    assert pictures.images[0][:, 0, 0].tolist() == [10, 20, 30]
    assert len(pictures.targets[0]) == 0
    assert pictures.dataset is None and pictures.categories == []


def test_a_folder_as_coco_unpacks_and_one_variable_for_all_notebooks(tmp_path, monkeypatch) -> None:
    rehearsal.write_coco(tmp_path, "val", 4)
    pictures = open_pictures(tmp_path)
    assert [len(target) > 0 for target in pictures.targets] == [True, True, True, False]
    assert len(pictures.categories) == 80 and pictures.data.train_json == pictures.data.val_json
    assert notebook.own_path() == ""
    monkeypatch.setenv("MIMDET_PICTURES", str(tmp_path))
    assert notebook.own_path() == str(tmp_path) and notebook.own_path("mine.jpg") == "mine.jpg"


def test_the_real_picture_and_its_detector(tmp_path, monkeypatch) -> None:
    pictures = open_pictures("nuclei")
    assert pictures.categories == ["nucleus"] and len(pictures.records) == 3
    assert pictures.data.train_json != pictures.data.val_json
    assert len(build_dataset(pictures.data, "train")) == 6
    assert open_detector("quick", "nuclei").categories == ["nucleus"]
    assert len(open_detector("quick", tmp_path).categories) == 12
    (tmp_path / "nuclei").mkdir()  # a folder of that name is one's own when it is written so
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nuclei must hold annotations\.json"):
        open_pictures("./nuclei")
    shutil.copytree(SHIPPED / "nuclei", "mine")
    assert len(open_pictures("mine").records) == 3
    Path("mine/train.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"or train\.json, val\.json and images/"):
        open_pictures("mine")


def test_what_cannot_be_opened(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg does not exist: give a photo"):
        open_pictures("nowhere.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be read as an image"):
        open_pictures(tmp_path / "notes.txt")
    write_coco(tmp_path, [])
    with pytest.raises(ValueError, match="no images"):
        open_pictures(tmp_path)
    for missing in ("annotations.json", "images"):
        (tmp_path / missing).rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match=r"annotations\.json .* and images/"):
            open_pictures(tmp_path)
        (tmp_path / "elsewhere").rename(tmp_path / missing)


def opened_pictures(mode: str) -> notebook.Pictures:
    return open_pictures(mode=mode)


@pytest.mark.parametrize("opened", [notebook_setup, opened_pictures, open_detector, open_mae])
def test_an_unknown_mode_is_refused(opened) -> None:
    with pytest.raises(ValueError, match=r"MODE='fast': use one of \['quick', 'full'\]"):
        opened("fast")


@pytest.mark.parametrize("opened", [notebook_setup, opened_pictures])
def test_full_mode_without_coco(monkeypatch, opened) -> None:
    monkeypatch.delenv("MIMDET_COCO", raising=False)
    with pytest.raises(ValueError, match=r"set the environment variable MIMDET_COCO.*val2017"):
        opened("full")


BASE = "mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.pth"
MAE = "mae_visualize_vit_base.pth"


@pytest.mark.parametrize(
    ("opened", "name", "file", "loader"),
    [
        (open_detector, "mimdet-base", BASE, "training.run.load_detector"),
        (open_mae, "mae-base-visualize", MAE, "models.weights.load_mae_model"),
    ],
)
def test_full_mode_opens_downloaded_weights(monkeypatch, tmp_path, opened, name, file, loader):
    """Or says how to get them."""
    monkeypatch.setenv("MIMDET_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"mimdet download {name}.*MIMDET_WEIGHTS"):
        opened("full")
    (tmp_path / file).touch()
    load = Mock()
    monkeypatch.setattr(f"mimdet.{loader}", load)
    monkeypatch.setattr(notebook, "pick_device", lambda name: torch.device("meta"))
    opened("full")
    detector = opened is open_detector  # is used much: on the GPU where there is one
    more = ((None,), {"device": "meta"}) if detector else ((), {})
    load.assert_called_once_with(str(tmp_path / file), *more[0], **more[1])
