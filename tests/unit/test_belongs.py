"""What a number belongs to: weights to their configuration, results to weights, data and draw."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from safetensors.torch import save_file

import mimdet
from mimdet.analysis.evaluate import belonging, evaluate
from mimdet.cli import main
from mimdet.config import AT_USE, WHILE_TRAINING, Config, flat, set_field, to_dict
from mimdet.models.checkpoint_files import read_safetensors
from mimdet.models.detector import build_detector
from mimdet.models.mae import MAE
from mimdet.models.official import export_detectron2
from mimdet.models.weights import load_mae, load_mae_model, save_mae
from mimdet.presets import PRETRAIN_PRESETS
from mimdet.training.pretrain import pretrain
from mimdet.training.train import fit, resume
from tests.small import small, write_coco

OTHER = {
    "backbone.num_heads": 4,
    "backbone.decoder_heads": 1,
    "backbone.keep": "padded",
    "backbone.sampler": "grid",
    "backbone.position_grid": 51,
    "backbone.window_size": 8,
    "detector.canvas": 96,
    "detector.anchor_sizes": [8, 16, 32, 64, 129],
    "detector.anchor_ratios": [0.5, 1.0, 2.5],
    "detector.canonical_size": 60.0,
    "detector.norm": "GN",
}
"""Fields that say what the weights compute, most of them without a tensor of another shape."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("belongs")
    fit(small(2), "run", runs=folder)
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def edit(run: Path, **fields: Any) -> None:
    cfg = json.loads((run / "config.json").read_text())
    for name, value in fields.items():
        section, _, field = name.partition(".")
        cfg[section][field] = value
    (run / "config.json").write_text(json.dumps(cfg))


# ------------------------------------------------------------------ weights and configuration


def test_every_field_of_a_model_is_refused_said_or_of_training_only() -> None:
    own = {name for name in flat(Config()) if name.startswith(("backbone.", "detector."))}
    assert own >= {name for name in (*WHILE_TRAINING, *AT_USE) if name[:3] in ("bac", "det")}
    assert {*OTHER} <= own - {*WHILE_TRAINING, *AT_USE}


@pytest.mark.parametrize("field", OTHER)
def test_a_run_whose_configuration_was_edited_is_refused(run, field: str) -> None:
    before = flat(mimdet.load_detector(run).config)[field]
    edit(run, **{field: OTHER[field]})
    with pytest.raises(ValueError, match=rf"configuration.*\n  {field}: ") as caught:
        mimdet.load_detector(run)
    for value in (before, OTHER[field]):
        assert str(value)[1:-1] in str(caught.value)
    edit(run, **{field: before})
    mimdet.load_detector(run)


def test_what_may_be_chosen_anew_is_said(run) -> None:
    edit(run, **{"detector.score_threshold": 0.3, "data.test_short_side": 96})
    with pytest.warns(UserWarning, match=r"score_threshold: 0.05 -> 0.3\n  data.test_short_side"):
        assert mimdet.load_detector(run).roi_heads.score_threshold == 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(run, **{"detector.score_threshold": 0.05, "data.test_short_side": 64})
        edit(run, **{"backbone.drop_path": 0.0, "detector.rois_per_image": 7})
        mimdet.load_detector(run)


def test_other_ways_in_are_guarded_too(run, tmp_path) -> None:
    """A weights file with cfg=, a file that describes itself, and a training that goes on."""
    weights = run / "checkpoints/000002/model.safetensors"
    cfg = mimdet.load_detector(run).config
    cfg.backbone.num_heads = 4
    with pytest.raises(ValueError, match="num_heads: 2 -> 4"):
        mimdet.load_detector(weights, cfg=cfg)
    mimdet.save_detector(mimdet.load_detector(run), tmp_path / "one.safetensors")
    tensors, metadata = read_safetensors(tmp_path / "one.safetensors")
    save_file(tensors, weights, metadata | {"config": json.dumps(to_dict(cfg))})
    with pytest.raises(ValueError, match="num_heads: 2 -> 4"):
        mimdet.load_detector(weights)
    save_file(tensors, weights, metadata)
    edit(run, **{"backbone.num_heads": 4})
    with pytest.raises(ValueError, match="num_heads: 2 -> 4"):
        list(resume(run))


def test_heads_of_an_autoencoder(tmp_path) -> None:
    cfg = small()
    b = cfg.backbone
    save_mae(MAE(64, 16, b.embed_dim, b.depth, 4, b.decoder_dim, 2, 2), tmp_path / "m.safetensors")
    model = build_detector(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"4 attention heads in its encoder.* 2: set backbone"):
        load_mae(model, tmp_path / "m.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="num_heads=4, not 2"):
        load_mae_model(tmp_path / "m.safetensors", num_heads=2)


def test_a_pretraining_goes_on_with_its_own_numbers(tmp_path) -> None:
    cfg = PRETRAIN_PRESETS["tiny_mae"]()
    cfg.training.steps, cfg.training.batch_size, cfg.training.accumulate = 2, 2, 1
    cfg.data.held_out, cfg.data.workers, cfg.mae.image_size = 1, 0, 32
    for name, value in (("shapes_size", 64), ("shapes_train", 10)):
        set_field(cfg, f"data.{name}", value)
    for _ in pretrain(cfg, tmp_path / "mae"):
        break
    edit(tmp_path / "mae", **{"mae.num_heads": 1})
    with pytest.raises(ValueError, match=r"mae.num_heads: \d -> 1"):
        list(resume(tmp_path / "mae"))


# ------------------------------------------------------------------ ids of categories and images


@pytest.fixture
def animals(tmp_path) -> Path:
    """Four images under images/, in annotations.json with ids that no counting gives."""
    file = write_coco(tmp_path, [[[5, 6, 30, 20]]] * 4, size=(64, 48))
    content, ids = json.loads(file.read_text()), (397133, 37777, 252219, 87038)
    for i, (image, thing) in enumerate(zip(content["images"], content["annotations"], strict=True)):
        image["id"], thing["image_id"], thing["category_id"] = ids[i], ids[i], (18, 3)[i % 2]
    content["categories"] = [{"id": 18, "name": "cat"}, {"id": 3, "name": "dog"}]
    file.write_text(json.dumps(content))
    return tmp_path


def on_animals(folder: Path) -> Config:
    cfg = small(2)
    cfg.data.source = "coco"
    cfg.data.train_json = cfg.data.val_json = str(folder / "annotations.json")
    cfg.data.train_images = cfg.data.val_images = str(folder / "images")
    return cfg


def test_predictions_have_the_ids_of_the_annotation_file(animals, monkeypatch) -> None:
    monkeypatch.chdir(animals)
    fit(on_animals(animals), "run", runs=animals)
    words = ["--annotations", "annotations.json", "--out", "found"]
    main(["predict", "run", "images/1.png", "images/2.png", *words])
    main(["export", "run", "one.safetensors"])
    assert mimdet.load_detector("one.safetensors").category_ids == [3, 18]
    found = json.loads(Path("found/predictions.json").read_text())
    evaluated = json.loads(Path("run/predictions.json").read_text())
    for number in (397133, 37777):
        ours, theirs = (
            [entry["category_id"] for entry in results if entry["image_id"] == number]
            for results in (found, evaluated)
        )
        assert ours and sorted(ours) == sorted(theirs)
    assert {entry["image_id"] for entry in found} == {397133, 37777}
    truth = COCO("annotations.json")
    assert len(truth.loadRes(found).anns) == len(found)
    # Without stored ids labels count from one.
    model = mimdet.load_detector("tiny")
    assert model.category_ids == list(range(1, len(model.categories) + 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(run, animals, value: float) -> None:
    """However they come in, of a parameter or of a norm's statistics."""
    name = "neck.pyramid.inner_blocks.2.1.running_var"
    model = mimdet.load_detector(run)
    model.get_buffer(name)[1] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        mimdet.predict(model, animals / "images/1.png")
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite"):
        mimdet.evaluate(model, mimdet.ShapesCOCO(size=64, length=2, split="val"))
    mimdet.save_detector(model, run / "one.safetensors")
    export_detectron2(model, run / "one.pth")
    save_file(model.state_dict(), run / "checkpoints/000002/model.safetensors")
    files = {"one.safetensors": name, "one.pth": "fpn_lateral4.norm.running_var"}
    for source, tensor in ({"": name} | files).items():
        with pytest.raises(ValueError, match=f"{tensor} holds NaN or infinite"):
            mimdet.load_detector(run / source)
    cfg = small(4)
    cfg.training.init_from = str(run / "one.pth")
    with pytest.raises(ValueError, match="holds NaN or infinite"):
        fit(cfg, "next", runs=run)


# ------------------------------------------------------------------ results


def test_results_name_what_they_belong_to(run, monkeypatch) -> None:
    """As the training left them, and of the last draw of an evaluation at other ratios."""
    of_training = json.loads((run / "eval.json").read_text())
    main(["evaluate", str(run), "--ratios", "1", "0.5", "--draws", "2"])
    now = json.loads((run / "eval.json").read_text())
    model = mimdet.load_detector(run)
    held_out = mimdet.ShapesCOCO("shapes-v1-medium", 64, 3, "val")
    for found, ratio, seed in ((of_training, 1.0, 0), (now, 0.5, 1)):
        about = belonging(model, held_out, ratio, seed=seed)
        assert {name: found[name] for name in about} == about and about["step"] == 2
    digest = hashlib.sha256((run / "predictions.json").read_bytes()).hexdigest()
    assert now["predictions"] == digest != of_training["predictions"]
    rows = json.loads((run / "evaluation.json").read_text())["ratios"]
    assert now["box"] == rows[1]["metrics"][1]["box"]
    assert [row["about"]["sample_ratio"] for row in rows] == [1.0, 0.5]
    model.roi_heads.box_head.cls_score.bias.data[0] += 1
    assert belonging(model, held_out, 1.0)["weights"] != now["weights"]
    model.config.detector.score_threshold = 0.1
    assert belonging(model, held_out, 1.0)["config"] != now["config"]


def test_an_interrupted_evaluation_leaves_what_it_found(run, monkeypatch) -> None:
    """In the middle of the last ratio: both files are the old ones. Between them: refused."""
    files = [run / name for name in ("eval.json", "predictions.json")]
    before = [file.read_bytes() for file in files]
    passes = []

    def interrupted(*arguments: Any, **others: Any) -> Any:
        passes.append(others["sample_ratio"])
        if len(passes) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments, **others)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mimdet.analysis.evaluate.evaluate", interrupted)
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), "--ratios", "1", "0.5"])
    assert passes == [1.0, 0.5] and before == [file.read_bytes() for file in files]
    main(["errors", str(run)])
    with monkeypatch.context() as patch:
        patch.setattr("mimdet.analysis.evaluate.write_json", stop)
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), "--ratios", "0.5"])
    with pytest.raises(SystemExit, match=r"is not what .*eval.json was measured on"):
        main(["errors", str(run)])
    main(["evaluate", str(run), "--ratios", "0.5", "--draws", "1"])
    main(["errors", str(run)])


def test_errors_says_what_it_reads_and_refuses_other_data(run, capsys) -> None:
    main(["evaluate", str(run), "--ratios", "0.5", "--draws", "2"])
    main(["errors", str(run)])
    assert "predictions.json: step 2, sample ratio 0.5, draw 1" in capsys.readouterr().out
    edit(run, **{"data.shapes_level": "shapes-v1-hard"})
    with pytest.raises(SystemExit, match=r"made on .*medium.* the data of the run are .*hard"):
        main(["errors", str(run)])
    edit(run, **{"data.shapes_level": "shapes-v1-medium"})
    (run / "eval.json").unlink()
    main(["errors", str(run)])
    assert "of another tool" in capsys.readouterr().out


def test_reuse_says_why_it_measures_again(run, capsys) -> None:
    main(["evaluate", str(run), "--reuse"])
    assert "measured" not in capsys.readouterr().out
    edit(run, **{"detector.score_threshold": 0.06})
    with pytest.warns(UserWarning, match="score_threshold"):
        main(["evaluate", str(run), "--reuse"])
    said = "ratio 1 is measured: the training's last evaluation has another config"
    assert said in capsys.readouterr().out
