"""Pre-training of the autoencoder: data, resuming, processes, what it leaves behind."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import mimdet
from mimdet.config import PicturesConfig, PretrainConfig, load_config, save_config
from mimdet.data.augment import rng_for
from mimdet.data.pictures import (
    ImageLoader,
    build_images,
    centre_square,
    draw_crop,
    held_out_images,
)
from mimdet.models.detector import build_detector
from mimdet.models.mae import patchify
from mimdet.models.weights import load_mae, load_mae_model, save_mae
from mimdet.presets import PRETRAIN_PRESETS
from mimdet.training.pretrain import build_mae, look, pretrain
from tests.small import assert_same_end, rows_of, small, small_mae


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("pretrain") / "run"
    steps = list(pretrain(small_mae(), run))
    assert [step.number for step in steps] == [1, 2, 3, 4]
    return run


def test_it_learns(tmp_path) -> None:
    cfg = small_mae(steps=40)
    cfg.training.evaluate_every_steps = 40
    losses = [step.loss for step in pretrain(cfg, tmp_path / "run")]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_a_run_leaves_weights_metrics_and_pictures(undisturbed, tmp_path) -> None:
    evaluations = [row for row in rows_of(undisturbed) if "evaluation" in row]
    assert [row["step"] for row in evaluations] == [3, 4]
    assert evaluations[-1]["evaluation"]["held_out"]["loss"] > 0
    picture = Image.open(undisturbed / "reconstructions/000004.png")
    assert picture.size == (6 * 64, 3 * 64)
    original, visible = np.asarray(picture)[:64, :64], np.asarray(picture)[64:128, :64]
    patches = (original == visible).all(2).reshape(4, 16, 4, 16).all((1, 3))
    assert patches.sum() == 4  # a quarter of 16 patches, unchanged
    # Without images that are held out there are weights, but no loss.
    cfg = small_mae(2)
    cfg.data.held_out = 0
    assert [step.number for step in pretrain(cfg, tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "mae.safetensors").exists()
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["held_out"] == {}


def test_the_detector_starts_from_it(undisturbed, tmp_path, capsys) -> None:
    mae = load_mae_model(undisturbed / "mae.safetensors")
    model = build_detector(small())
    report = load_mae(model, undisturbed / "mae.safetensors")
    assert torch.equal(model.backbone.encoder.norm.weight, mae.norm.weight)
    assert "backbone.decoder.pos_embed" in report.loaded
    cfg = small(1)
    cfg.training.init_from = str(undisturbed)
    mimdet.fit(cfg, "from-mae", runs=tmp_path)
    assert "mae.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_run_is_bit_identical(undisturbed, tmp_path, stop: int) -> None:
    for step in pretrain(small_mae(), tmp_path / "run"):
        if step.number == stop:
            break
    list(pretrain(small_mae(), tmp_path / "run"))
    assert_same_end(tmp_path / "run", undisturbed)


def test_it_goes_on_from_another_run(undisturbed, tmp_path) -> None:
    cfg = small_mae(1)
    cfg.training.init_from, cfg.training.learning_rate = str(undisturbed), 0.0
    list(pretrain(cfg, tmp_path / "run"))
    ours, theirs = (load_mae_model(p / "mae.safetensors") for p in (tmp_path / "run", undisturbed))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    cfg.mae.num_heads = 4
    with pytest.raises(ValueError, match=r"has 2 attention heads .* this autoencoder 4"):
        list(pretrain(cfg, tmp_path / "heads"))
    cfg.mae.num_heads, cfg.mae.depth = 2, 3
    with pytest.raises(ValueError, match=r"lacks the tensor 'blocks.2"):
        list(pretrain(cfg, tmp_path / "depth"))


def test_float64(undisturbed, tmp_path) -> None:
    cfg = small_mae(4)
    cfg.training.precision = "fp64"
    list(pretrain(cfg, tmp_path / "run"))
    runs = (tmp_path / "run", undisturbed)
    ends = [json.loads((run / "eval.json").read_text()) for run in runs]
    double, single = (end["held_out"]["loss"] for end in ends)
    assert double == pytest.approx(single, rel=0.05)  # other patches are drawn


def test_held_out_loss_depends_on_the_weights_alone() -> None:
    cfg = small_mae()
    _, held_out = build_images(cfg.data, 0)
    images = held_out_images(held_out, 64)
    model = build_mae(cfg.mae)
    results = [look(model, images, 0.25, torch.device("cpu"), size) for size in (2, 7)]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert model.training


@pytest.mark.parametrize("name", PRETRAIN_PRESETS)
def test_presets_are_fresh_and_stored(name: str, tmp_path) -> None:
    cfg = PRETRAIN_PRESETS[name]()
    assert cfg.preset == name
    cfg.mae.depth += 1
    assert PRETRAIN_PRESETS[name]() != cfg
    save_config(cfg, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json", PretrainConfig) == cfg


def test_mae_base_is_the_papers() -> None:
    with torch.device("meta"):
        model = build_mae(PRETRAIN_PRESETS["mae_base"]().mae)
    assert sum(p.numel() for p in model.parameters()) == 111_907_840


# ------------------------------------------------------------------ data


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(40, 30), (30, 50), (64, 64), (20, 33), (90, 31)]):
        place = tmp_path / "images" / ("a" if i % 2 else "b")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (h, w, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    (tmp_path / "images/readme.txt").write_text("no image")
    return tmp_path / "images"


def test_a_folder_is_split_and_cropped(folder) -> None:
    cfg = PicturesConfig(source="folder", folder=str(folder), held_out=2, workers=0)
    train, held_out = build_images(cfg, 0)
    assert (len(train), len(held_out)) == (3, 2)
    assert {train.image_id(i) for i in range(3)}.isdisjoint(held_out.image_id(i) for i in range(2))
    assert [tuple(x.shape) for x in held_out_images(held_out, 32)] == [(3, 32, 32)] * 2
    loader = ImageLoader(train, cfg, 32, batch_size=2, accumulate=3, seed=0)
    steps = list(loader.batches(0, 2))
    assert [len(step) for step in steps] == [3, 3]
    images = [image for batch in steps[0] for image in batch.images]
    assert {(image.shape, image.dtype) for image in images} == {((3, 32, 32), torch.uint8)}
    first_epoch = [name for batch in steps[0] for name in batch.image_ids][:3]
    assert sorted(first_epoch) == sorted(train.image_id(i) for i in range(3))


def test_crops_cover_the_shares_asked_for() -> None:
    cfg = PicturesConfig(crop_scale=(0.2, 1.0))
    rng = rng_for("geometry", 0)
    areas = []
    for _ in range(500):
        x1, y1, x2, y2 = draw_crop(cfg, 90, 120, rng)
        assert 0 <= x1 < x2 <= 120 and 0 <= y1 < y2 <= 90
        assert 0.72 < (x2 - x1) / (y2 - y1) < 1.38
        areas.append((x2 - x1) * (y2 - y1) / (90 * 120))
    assert min(areas) > 0.19 and max(areas) <= 1 and 0.4 < np.mean(areas) < 0.6
    assert centre_square(90, 120) == (15, 0, 105, 90)
    assert math.isclose(np.std(areas), 0.22, abs_tol=0.05)


def test_bad_data_names_the_field(folder) -> None:
    (folder.parent / "empty").mkdir()
    for field, value, message in (
        ("folder", "/nowhere", "no folder with image files"),
        ("folder", str(folder.parent / "empty"), "no folder with image files"),
        ("held_out", 5, "leaves no image of 5"),
        ("source", "video", "use 'folder', 'hub' or 'shapes'"),
    ):
        cfg = PicturesConfig(folder=str(folder))
        setattr(cfg, field, value)
        with pytest.raises(ValueError, match=message):
            build_images(cfg, 0)


def test_a_hub_table(tmp_path) -> None:
    rows = [{"image": Image.new("RGB", (40, 30), (i, 0, 0))} for i in range(4)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    cfg = PicturesConfig(source="hub", hub_name=str(tmp_path), held_out=1)
    train, held_out = build_images(cfg, 0)
    assert (len(train), len(held_out)) == (3, 1)
    assert train.image(2)[0, 0, 0] == 2
    cfg.hub_column = "picture"
    with pytest.raises(ValueError, match=r"no column data\.hub_column='picture'"):
        build_images(cfg, 0)


def test_two_heads_paint_plain_pixels_and_are_kept_in_the_file(tmp_path) -> None:
    torch.manual_seed(0)
    cfg = small_mae().mae
    cfg.norm_pix_loss = cfg.pixel_head = True
    mae = build_mae(cfg).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        out = mae(images)
        truth = patchify(images, 16)
        hidden = ~out.sample.mask().flatten(1)
        plain = ((out.pixels - truth) ** 2)[hidden].mean()
        normalised = mae.loss(images, out.prediction, out.sample)
        assert torch.isclose(out.loss, normalised + plain)
        painted = mae.reconstruct(images, out).painted
    assert torch.equal(patchify(painted, 16), out.pixels)  # nothing is borrowed from the truth
    mae.decoder_pixels.weight.data.add_(1.0)
    save_mae(mae, tmp_path / "two.safetensors")
    again = load_mae_model(tmp_path / "two.safetensors")
    assert torch.equal(again.decoder_pixels.weight, mae.decoder_pixels.weight)
    report = load_mae(build_detector(small()), tmp_path / "two.safetensors")
    assert "decoder_pixels.weight" in report.unused
