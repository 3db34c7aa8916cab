"""Checkpoints in the original's layout: every name, both ways, and the optimiser's groups."""

import json
from pathlib import Path

import pytest
import torch

import mimdet
from mimdet import presets
from mimdet.models.detector import build_detector
from mimdet.models.official import detectron2_rules, export_detectron2, match_preset
from mimdet.models.weights import load_mae, translate
from mimdet.training.optim import parameter_groups
from tests.parity.reference import load_original, our_name, reference

FILES = {
    "keys_mimdet_vit_b": "mimdet_base",
    "keys_mimdet_vit_l": "mimdet_large",
    "keys_mimdet_v1_vit_b": "mimdet_v1_base",
    "keys_mimdet_v1_vit_l": "mimdet_v1_large",
}


@pytest.mark.parametrize(("keys", "preset"), FILES.items())
def test_every_key_maps_to_ours_and_back(golden: Path, measured, keys: str, preset: str) -> None:
    stored = json.loads((golden / f"{keys}.json").read_text())
    official = {name: tuple(shape) for name, shape, _ in stored["state_dict"]}
    ours = {our_name(name): shape for name, shape in official.items()}
    assert len(ours) == len(official)
    back = {translate(name, detectron2_rules(), back=True): s for name, s in ours.items()}
    assert back == official

    cfg = match_preset(keys, {n: torch.empty(s, device="meta") for n, s in ours.items()})
    assert cfg.preset == preset
    with torch.device("meta"):
        model = build_detector(cfg)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    left_over = len(own.items() ^ ours.items())
    measured(keys, f"{len(official)} keys, left over on either side", left_over, 0)
    assert sum(p.numel() for p in model.parameters()) == stored["total_params"]


def full_size_mae(golden: Path, letter: str, path: Path) -> Path:
    """Meta's full file with every tensor one repeated number: all names and shapes, few bytes."""
    stored = json.loads((golden / f"keys_mae_vit_{letter}_full.json").read_text())
    value = torch.full((1,), 0.5)
    tensors = {name: value.expand(shape) for name, shape, _ in stored["state_dict"]}
    torch.save({"model": tensors}, path)
    return path


@pytest.mark.filterwarnings("ignore:.*from a non-meta parameter")
@pytest.mark.parametrize(("letter", "preset"), [("b", "mimdet_base"), ("l", "mimdet_large")])
def test_metas_full_size_files(golden: Path, measured, tmp_path, letter: str, preset: str) -> None:
    """What of Meta's files is used: encoder, decoder embedding, four of eight blocks, norm."""
    path = full_size_mae(golden, letter, tmp_path / f"mae_pretrain_vit_{letter}_full.pth")
    with torch.device("meta"):
        model = build_detector(presets.PRESETS[preset]())
    report = load_mae(model, path)
    assert len(report.loaded) == 12 * len(model.backbone.encoder.blocks) + 3 + 12 * 4 + 5
    new = {name.split(".")[0] for name in report.new if not name.startswith("backbone.")}
    assert new == {"neck", "rpn", "roi_heads"}
    inside = {".".join(n.split(".")[1:3]) for n in report.new if n.startswith("backbone.")}
    assert inside == {f"stem.stage{i}" for i in range(1, 5)} | {"decoder.fill"}
    assert {name.split(".")[0] for name in report.unused} == {
        "cls_token",
        "mask_token",
        "patch_embed",
        "decoder_blocks",
        "decoder_pred",
    }
    wrong = len([n for n in report.unused if n.startswith("decoder_blocks")]) - 12 * 4
    measured(path.stem, "decoder blocks 5-8 left out, tensors too many or few", abs(wrong), 0)


def test_a_large_file_does_not_fit_the_base_model(golden: Path, tmp_path, record_property) -> None:
    path = full_size_mae(golden, "l", tmp_path / "mae_pretrain_vit_large_full.pth")
    with torch.device("meta"):
        model = build_detector(presets.mimdet_base())
    with pytest.raises(ValueError, match=r"width 1024 with 24 blocks.*mimdet_large") as caught:
        load_mae(model, path)
    record_property("refused", ["MAE file: ViT-L into mimdet_base", str(caught.value)])


@pytest.mark.parametrize("letter", ["b", "l"])
def test_optimiser_groups(golden: Path, measured, letter: str) -> None:
    """Learning rate and weight decay of every parameter at batch 64."""
    stored = json.loads((golden / f"optimizer_groups_mimdet_vit_{letter}.json").read_text())
    expected = {
        our_name(name): (group["lr"], group["weight_decay"])
        for group in stored
        for name in group["params"]
    }
    cfg = presets.PRESETS[{"b": "mimdet_base", "l": "mimdet_large"}[letter]]()
    with torch.device("meta"):
        model = build_detector(cfg)
    groups = parameter_groups(model, cfg.training)
    ours = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert ours.keys() == expected.keys()
    assert {name: decay for name, (_, decay) in ours.items()} == {
        name: decay for name, (_, decay) in expected.items()
    }
    error = max(abs(ours[name][0] / rate - 1) for name, (rate, _) in expected.items())
    measured(f"optimiser groups vit_{letter}", f"rates of {len(ours)} parameters", error, 1e-12)
    assert list(cfg.training.betas) == stored[0]["betas"]


@pytest.mark.parametrize("model_name", ["mimdet_small", "mimdet_v1_small"])
def test_round_trip_is_exact(golden: Path, measured, tmp_path, model_name: str) -> None:
    model = load_original(golden / model_name)
    export_detectron2(model, tmp_path / "exported.pth")
    exported = torch.load(tmp_path / "exported.pth", weights_only=True)["model"]
    original = reference(golden / model_name / "model")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], value) for name, value in original.items())

    again = mimdet.load_detector(tmp_path / "exported.pth", model.config).state_dict()
    different = [n for n, v in model.state_dict().items() if not torch.equal(v, again[n])]
    measured(f"{model_name} round trip", f"tensors of {len(again)} that differ", len(different), 0)
