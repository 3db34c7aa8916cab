"""Weights of others and the shipped ones: what loads, what is refused, and what is said."""

import argparse
import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import mimdet
from mimdet.cli import main
from mimdet.config import Config
from mimdet.data.shapes import ShapesCOCO
from mimdet.files import SHIPPED
from mimdet.models.checkpoint_files import read_checkpoint, read_safetensors, shipped
from mimdet.models.detector import build_detector
from mimdet.models.mae import MAE
from mimdet.models.official import coco_classes, export_detectron2, load_weights
from mimdet.models.weights import load_mae, load_mae_model, save_mae
from mimdet.presets import PRESETS
from mimdet.training.train import fit
from tests.small import small

DATA = Path(__file__).resolve().parents[1] / "data"
CARDS = json.loads((SHIPPED / "cards.json").read_text())
ENCODER = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")


def fitting_mae(cfg: Config, extra_decoder_blocks: int = 2) -> MAE:
    """An autoencoder whose halves have the sizes of the configuration's."""
    b = cfg.backbone
    depth = b.decoder_depth + extra_decoder_blocks
    sizes = (b.embed_dim, b.depth, b.num_heads, b.decoder_dim, depth, b.decoder_heads)
    return MAE(64, 16, *sizes)


@pytest.fixture
def cfg() -> Config:
    return small()


@pytest.fixture
def mae_tensors(cfg) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in fitting_mae(cfg).state_dict().items()}


def write(tensors: dict[str, Tensor], path: Path) -> Path:
    torch.save({"model": tensors, "args": argparse.Namespace(lr=0.1), "epoch": 1}, path)
    return path


# ------------------------------------------------------------------ what loads


def test_meta_file_starts_encoder_and_decoder(cfg, mae_tensors, tmp_path, capsys) -> None:
    """And Meta's files hold an argparse.Namespace beside the weights: it is no obstacle."""
    model = build_detector(cfg)
    report = load_mae(model, write(mae_tensors, tmp_path / "full.pth"))
    state = model.backbone.state_dict()
    for ours, theirs in (
        ("encoder.blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("decoder.embed.weight", "decoder_embed.weight"),
        ("decoder.norm.bias", "decoder_norm.bias"),
    ):
        assert torch.equal(state[ours], mae_tensors[theirs])
    assert "backbone.encoder.pos_embed" in report.loaded
    assert "backbone.stem.stage1.0.weight" in report.new
    assert "decoder_blocks.1.norm1.weight" in report.unused and not report.missing
    assert sorted([*report.loaded, *report.new]) == sorted(model.state_dict())
    assert {*report.unused} <= mae_tensors.keys()
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "full.pth"
    assert said.count("\n") == 5 and "decoder_pred 2" in said


def test_a_patch_stem_and_a_mask_token_are_loaded_too(cfg, mae_tensors, tmp_path, capsys) -> None:
    cfg.backbone.stem, cfg.backbone.decoder_fill = "patch", "mask_token"
    model = build_detector(cfg)
    report = load_mae(model, write(mae_tensors, tmp_path / "full.pth"))
    assert torch.equal(model.backbone.stem.patchify.weight, mae_tensors["patch_embed.proj.weight"])
    assert torch.equal(model.backbone.decoder.fill.token, mae_tensors["mask_token"])
    assert "backbone.stem.patchify.bias" in report.loaded
    half = {name: value.half() for name, value in mae_tensors.items()}
    model = build_detector(cfg)
    load_mae(model, write(half, tmp_path / "half.pth"))
    assert model.backbone.encoder.norm.weight.dtype == torch.float32
    assert "float16 converted to float32" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["tiny_benchmarking_vit", "tiny_vitdet"])
def test_plain_vit_baselines_take_the_encoder(preset, tmp_path) -> None:
    model = build_detector(PRESETS[preset]())
    b = model.config.backbone
    original = MAE(64, 16, b.embed_dim, b.depth, b.num_heads, 32, 2, 2)
    report = load_mae(model, write(original.state_dict(), tmp_path / "full.pth"))
    encoder = model.backbone.encoder
    assert torch.equal(encoder.blocks[1].mlp.fc2.weight, original.blocks[1].mlp.fc2.weight)
    new = {name for name in report.new if name.startswith("backbone.encoder.")}
    assert all("rel" in name or name.endswith("pos_embed") for name in new)
    patches = [name for name in report.loaded if name.endswith(("patchify.weight", "proj.weight"))]
    assert len(patches) == 1 + b.depth  # the patch embedding, and one projection a block
    assert {name.split("_")[0] for name in report.unused} >= {"cls", "mask", "decoder"}


def test_encoder_only_with_a_random_decoder(cfg, mae_tensors, tmp_path) -> None:
    encoder = {n: v for n, v in mae_tensors.items() if n.startswith(ENCODER)}
    model = build_detector(cfg)
    report = load_mae(model.backbone, write(encoder, tmp_path / "encoder.pth"), decoder="random")
    assert {name.split(".")[0] for name in report.loaded} == {"encoder"}
    assert "decoder.embed.weight" in report.new
    full = write(mae_tensors, tmp_path / "full.pth")  # asked for, a random one stays random
    before = model.backbone.decoder.embed.weight.clone()
    load_mae(model, full, decoder="random")
    assert torch.equal(model.backbone.decoder.embed.weight, before)


def test_timm_names_are_metas_encoder(cfg, tmp_path) -> None:
    b = cfg.backbone
    sizes = {"embed_dim": b.embed_dim, "depth": b.depth, "num_heads": b.num_heads}
    vit = VisionTransformer(img_size=64, num_classes=0, **sizes)
    save_file(vit.state_dict(), tmp_path / "timm.safetensors")
    model = build_detector(cfg)
    with pytest.raises(ValueError, match="encoder only"):
        load_mae(model, tmp_path / "timm.safetensors")
    load_mae(model, tmp_path / "timm.safetensors", decoder="random")
    ours = model.backbone.encoder.blocks[1]
    assert torch.equal(ours.mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


def test_hub_mae_computes_what_transformers_computed(tmp_path) -> None:
    """A tiny random ViTMAEForPreTraining, saved by transformers 4.57 with its input and output."""
    stored = load_file(DATA / "hub_vit_mae.safetensors")
    io = {name: stored.pop(name) for name in list(stored) if name.startswith("io.")}
    save_file(stored, tmp_path / "model.safetensors")
    model = load_mae_model(tmp_path / "model.safetensors", num_heads=2, decoder_heads=2)
    grid = (4, 4)
    sample = mimdet.select(list(-io["io.noise"]), [grid, grid], grid, 0.25)
    with torch.inference_mode():
        out = model(io["io.images"], sample=sample)
    torch.testing.assert_close(out.prediction, io["io.prediction"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out.loss, io["io.loss"][0])


def test_sizes_of_an_autoencoder_follow_from_its_file(cfg, tmp_path) -> None:
    original = fitting_mae(cfg)
    save_mae(original, tmp_path / "mae.safetensors")
    again = load_mae_model(tmp_path / "mae.safetensors")
    images = torch.randn(2, 3, 64, 64)
    sample = original(images).sample
    ours, theirs = again(images, sample=sample), original.eval()(images, sample=sample)
    assert torch.equal(ours.prediction, theirs.prediction)
    save_mae(original, tmp_path / "mae_visualize_x.pth")
    with pytest.raises(ValueError, match="num_heads="):
        load_mae_model(tmp_path / "mae_visualize_x.pth")
    visualize = load_mae_model(tmp_path / "mae_visualize_x.pth", num_heads=2, decoder_heads=2)
    assert not visualize.norm_pix_loss


def test_a_detector_goes_to_detectron2_and_back(cfg, tmp_path) -> None:
    model, plain = build_detector(cfg), copy.deepcopy(cfg)
    export_detectron2(model, tmp_path / "detectron2.pth")
    again = mimdet.load_detector(tmp_path / "detectron2.pth", cfg)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    cfg.backbone.stem = "patch"
    with pytest.raises(ValueError, match=r"no counterpart of 'backbone\.stem\.patchify"):
        export_detectron2(build_detector(cfg), tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
    # Constants of detectron2 are ignored, classes are named.
    tensors = official(plain, tmp_path / "good.pth") | {"pixel_mean": torch.ones(3, 1, 1)}
    load_weights(write(tensors, tmp_path / "old.pth"), plain)
    names = coco_classes(80)[0]
    assert (names[0], names[11], names[79]) == ("person", "stop sign", "toothbrush")
    assert coco_classes(2) == (["class 1", "class 2"], [1, 2])


@pytest.mark.parametrize("half", [False, True])
def test_a_detector_in_one_file(cfg, tmp_path, half: bool) -> None:
    model = build_detector(cfg)
    model.categories = ["cat"] * cfg.detector.num_classes
    mimdet.save_detector(model, tmp_path / "one.safetensors", half=half)
    again = mimdet.load_detector(tmp_path / "one.safetensors")
    assert again.config == model.config and again.categories == model.categories
    for name, value in model.state_dict().items():
        ours = again.state_dict()[name]
        assert ours.dtype == value.dtype
        expected = value.half().to(value.dtype) if half and value.is_floating_point() else value
        assert torch.equal(ours, expected), name
    model.config.data.source = "mine:scenes"  # belongs to the run: predicting needs no data set
    mimdet.save_detector(model, tmp_path / "two.safetensors")
    assert mimdet.load_detector(tmp_path / "two.safetensors").config.data.source == "coco"
    model.config.backbone.stem = "mine:Stem"
    with pytest.raises(ValueError, match=r"stem=mine:Stem.*share the run's directory"):
        mimdet.save_detector(model, tmp_path / "three.safetensors")
    model.slots, model.config.backbone.stem = {"sampler": len}, "conv"
    with pytest.raises(ValueError, match="share the run's directory"):
        mimdet.save_detector(model, tmp_path / "three.safetensors")


# ------------------------------------------------------------------ what is refused


Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]


def only(keeps: Callable[[str], bool]) -> Change:
    return lambda tensors: {name: value for name, value in tensors.items() if keeps(name)}


def each(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: {name: change(value) for name, value in tensors.items()}


BAD_MAE: dict[str, tuple[Change, str]] = {
    "encoder only": (only(lambda n: n.startswith(ENCODER)), 'full file.*decoder="random"'),
    "one tensor missing": (
        only(lambda n: n != "blocks.0.norm1.bias"),
        "lacks 1 tensors, first 'blocks.0.norm1.bias'",
    ),
    "one tensor extra": (lambda t: t | {"head.weight": t["norm.bias"]}, "'head.weight'"),
    "renamed": (
        lambda t: {n.replace("blocks", "layers"): v for n, v in t.items()},
        "no masked autoencoder: it lacks",
    ),
    "another width": (
        lambda t: MAE(64, 16, 64, 2, 2, 32, 3, 2).state_dict(),
        r"shape \(1, 17, 64\), our encoder.pos_embed has .* use the preset of the file's size",
    ),
    "another depth": (
        only(lambda n: not n.startswith("blocks.1.")),
        "lacks 12 tensors, first 'blocks.1.norm1.weight': it has fewer blocks",
    ),
    "no row of a class token": (
        lambda t: t | {"pos_embed": t["pos_embed"][:, 1:]},
        r"pos_embed has shape \(1, 16, 32\), not .*a row for the class token",
    ),
    "no square": (lambda t: t | {"pos_embed": torch.zeros(1, 13, 32)}, r"shape \(1, 13, 32\)"),
    "a scalar": (lambda t: t | {"pos_embed": torch.ones(())}, r"pos_embed has shape \(\)"),
    "integers": (each(Tensor.int), "int32, not floating point"),
    "NaN": (lambda t: t | {"norm.bias": t["norm.bias"] * torch.nan}, "norm.bias holds NaN"),
    "no tensors": (lambda t: {}, "holds no tensors"),
}


@pytest.mark.parametrize("fault", BAD_MAE)
def test_bad_mae_files(cfg, mae_tensors, tmp_path, record_property, fault: str) -> None:
    change, message = BAD_MAE[fault]
    model = build_detector(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_mae(model, write(change(mae_tensors), tmp_path / "bad.pth"))
    assert "bad.pth" in str(caught.value)
    record_property("refused", [f"MAE file: {fault}", str(caught.value)])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_missing_files_name_the_remedy_and_tied_weights_are_no_fault(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for source, said in (
        ("facebook/vit-mae-none", "mimdet download facebook/vit-mae-none"),
        ("timm/vit_none_patch16_224.mae", "mimdet download timm/vit_none"),
        ("runs/none.pth", "lists public weights"),
        (tmp_path / "none.pth", "lists public weights"),
    ):
        with pytest.raises(FileNotFoundError, match=said):
            read_checkpoint(source)
    whole = torch.arange(12.0)
    torch.save({"a": whole, "b": whole.view(3, 4), "c": whole[2:4]}, tmp_path / "a.pth")
    tensors = read_checkpoint(tmp_path / "a.pth").tensors
    assert torch.equal(tensors["b"].flatten(), whole) and tensors["c"].tolist() == [2, 3]


def official(cfg: Config, path: Path) -> dict[str, Tensor]:
    export_detectron2(build_detector(cfg), path)
    return torch.load(path, weights_only=True)["model"]


BAD_DETECTORS: dict[str, tuple[Change, str]] = {
    "one tensor missing": (
        only(lambda n: n != "backbone.fpn_output3.weight"),
        "lacks the tensor 'neck.pyramid.layer_blocks.1.0.weight'",
    ),
    "one tensor extra": (
        lambda t: t | {"roi_heads.box_head.fc2.weight": torch.ones(1)},
        "none of the published models has a tensor 'roi_heads.box_head.fc2.weight'",
    ),
    "other class count": (
        lambda t: t | {"roi_heads.box_predictor.cls_score.bias": torch.ones(99)},
        r"shape \(99,\), this model's has \(\d+,\): class count",
    ),
    "an autoencoder": (lambda t: fitting_mae(small()).state_dict(), "not a detector: load_mae"),
}


@pytest.mark.parametrize("fault", BAD_DETECTORS)
def test_bad_detector_files(cfg, tmp_path, record_property, fault: str) -> None:
    change, message = BAD_DETECTORS[fault]
    path = write(change(official(cfg, tmp_path / "good.pth")), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(path, cfg)
    record_property("refused", [f"detector: {fault}", str(caught.value)])


def test_unknown_detectors_need_a_configuration(cfg, tmp_path, record_property) -> None:
    cfg.detector.rpn_convs = 2
    cfg.detector.box_convs = 4
    official(cfg, tmp_path / "mine.pth")
    message = r"none of the published models: closest is mimdet_\w+, but \d+ tensors differ.*cfg="
    with pytest.raises(ValueError, match=message) as caught:
        mimdet.load_detector(tmp_path / "mine.pth")
    record_property("refused", ["detector of no known preset", str(caught.value)])
    with pytest.raises(ValueError, match="not an autoencoder: use load_detector"):
        load_mae(build_detector(cfg), tmp_path / "mine.pth")
    load_weights(tmp_path / "mine.pth", cfg)


def test_commands_take_released_files(tmp_path, monkeypatch, capsys) -> None:
    """export, predict and evaluate: the file stands where the run stands."""

    def published() -> Config:
        """Small, but with the published models' numbers of convolutions."""
        cfg = small(1)
        cfg.preset = "mimdet_base"
        cfg.detector.box_convs, cfg.detector.rpn_convs = 4, 2
        cfg.training.init_from = "random"
        return cfg

    monkeypatch.setitem(PRESETS, "mimdet_base", published)
    fit(published(), "run", runs=tmp_path)
    main(["export", str(tmp_path / "run"), str(tmp_path / "m.pth")])
    Image.new("RGB", (80, 64)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    main(["predict", "m.pth", "a.png", "--out", "p"])
    main(["evaluate", "m.pth", "--limit", "2"])
    assert (tmp_path / "p/annotations.json").exists() and (tmp_path / "m/evaluation.json").exists()
    said = capsys.readouterr().out
    assert "m.pth as mimdet_base" in said and "box AP" in said


# ------------------------------------------------------------------ what comes with the package


def test_files_are_small_and_those_of_the_cards(capsys) -> None:
    files = sorted(SHIPPED.glob("*.safetensors"))
    assert {path.stem for path in files} == set(shipped()) == set(CARDS)
    assert sum(path.stat().st_size for path in files) < 16e6
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest == CARDS[path.stem]["sha256"]
        assert digest in (SHIPPED / "README.md").read_text()
    model = mimdet.build_detector(mimdet.presets.tiny())
    report = mimdet.load_mae(model, "tiny_mae")
    assert not report.missing and len(report.loaded) > 60
    assert "tiny_mae" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "trained_with", "worth"), [("tiny", 1, 0.1), ("tiny_half", 0.5, 0.07)]
)
def test_ap_is_that_of_the_card_and_falls_with_the_tokens(
    name: str, trained_with: float, worth: float
) -> None:
    """On other machines sums are rounded otherwise, so a few detections near a threshold differ."""
    model = mimdet.load_detector(name)
    scenes = ShapesCOCO("shapes-v1-medium", 128, 200, "val")
    result = mimdet.evaluate(model, scenes)
    assert 100 * result.box["AP"] == pytest.approx(CARDS[name]["box_ap"], abs=0.5)
    assert 100 * result.mask["AP"] == pytest.approx(CARDS[name]["mask_ap"], abs=0.5)
    as_trained, one_token = (
        mimdet.evaluate(model, scenes, sample_ratio=ratio).box for ratio in (trained_with, 1e-6)
    )
    lost = {size: as_trained[size] - one_token[size] for size in ("AP", "AP_large")}
    assert lost["AP_large"] > 0.14 and lost["AP"] > worth  # the encoder is used
    # What follows the encoder of `tiny_half` has never seen an image without gaps.
    assert (result.box["AP"] < as_trained["AP"] - 0.02) == (name == "tiny_half")


def test_on_a_real_picture_little_is_left_of_one_token() -> None:
    model, tiles = mimdet.load_detector("nuclei"), mimdet.Nuclei("val")
    every, one = (mimdet.evaluate(model, tiles, sample_ratio=ratio) for ratio in (1.0, 1e-6))
    card = CARDS["nuclei"]  # of 49 nuclei, so rounding of sums counts for more
    assert 100 * every.box["AP"] == pytest.approx(card["box_ap"], abs=2)
    assert 100 * every.mask["AP"] == pytest.approx(card["mask_ap"], abs=2)
    assert one.box["AP"] < every.box["AP"] - 0.4


@pytest.mark.parametrize("name", ["tiny", "tiny_half"])
def test_the_encoder_tells_tokens_apart(name: str) -> None:
    """In a training that goes wrong it gives every token the same output; the detector then lives
    on the stem's tokens at places that were not sampled, and falls at ratio 1."""
    model = mimdet.load_detector(name)
    image = ShapesCOCO("shapes-v1-medium", 128, 1, "val")[0].image
    with mimdet.record(model, "backbone.encoder") as seen:
        mimdet.predict(model, image, sample_ratio=1.0)
    outputs = seen["backbone.encoder"][0]  # (L, D)
    assert outputs.std(dim=0).mean() > 0.2


def test_a_file_of_weights_that_names_code_is_refused(cfg, tmp_path) -> None:
    """Its configuration is data: what it names is looked up, never imported."""
    file = tmp_path / "named.safetensors"
    mimdet.save_detector(build_detector(cfg), file)
    tensors, metadata = read_safetensors(file)
    config = json.loads(metadata["config"])
    config["backbone"]["stem"] = "os:_exit"
    save_file(tensors, file, metadata | {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=r"named\.safetensors names code .*stem=os:_exit"):
        mimdet.load_detector(file)
