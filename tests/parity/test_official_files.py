"""Checkpoints in the original's layout: every name, both ways, the optimiser's groups, and the
operations of the published sizes."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mimdet
from mimdet import presets
from mimdet.models.detector import build_detector
from mimdet.models.official import detectron2_rules, export_detectron2, match_preset
from mimdet.models.sampling import Sampling
from mimdet.models.weights import load_mae, translate
from tests.parity.reference import (
    load_original,
    optimiser_groups,
    our_name,
    reference,
    same_number,
    stored_json,
)

FILES = {
    "keys_mimdet_vit_b": "mimdet_base",
    "keys_mimdet_vit_l": "mimdet_large",
    "keys_mimdet_v1_vit_b": "mimdet_v1_base",
    "keys_mimdet_v1_vit_l": "mimdet_v1_large",
    "keys_benchmarking_vit_b": "benchmarking_vit_base",
}


@pytest.mark.parametrize(("keys", "preset"), FILES.items())
def test_every_key_maps_to_ours_and_back(golden: Path, measured, keys: str, preset: str) -> None:
    """Names, shapes, types, what is frozen and every norm's epsilon, at the published sizes."""
    kind = presets.PRESETS[preset]().backbone.kind
    stored = stored_json(golden / keys)
    official = {name: tuple(shape) for name, shape, _ in stored["state_dict"]}
    ours = {our_name(name, kind): shape for name, shape in official.items()}
    assert len(ours) == len(official)
    rules = detectron2_rules(kind=kind)
    assert {translate(name, rules, back=True): s for name, s in ours.items()} == official

    cfg = match_preset(keys, {n: torch.empty(s, device="meta") for n, s in ours.items()})
    assert cfg.preset == preset
    with torch.device("meta"):
        model = build_detector(cfg)
    state, parameters = model.state_dict(), dict(model.named_parameters())
    own = {name: tuple(value.shape) for name, value in state.items()}
    left_over = len(own.items() ^ ours.items())
    measured(keys, f"{len(official)} keys, left over on either side", left_over, 0)
    kinds = {our_name(name, kind): dtype for name, _, dtype in stored["state_dict"]}
    assert {name: str(value.dtype) for name, value in state.items()} == kinds
    assert sum(p.numel() for p in parameters.values()) == stored["total_params"]
    frozen = {our_name(name, kind) for name in stored["frozen_params"]}
    assert {name for name, p in parameters.items() if not p.requires_grad} == frozen
    norms = stored["module_eps"].items()
    epsilons = {our_name(f"{name}.", kind)[:-1]: eps for name, (_, eps) in norms}
    modules = dict(model.named_modules())
    assert len(epsilons) > 40
    assert {name: modules[name].eps for name in epsilons} == epsilons


def full_size_mae(golden: Path, letter: str, path: Path) -> Path:
    """Meta's full file with every tensor one repeated number: all names and shapes."""
    stored = stored_json(golden / f"keys_mae_vit_{letter}_full")["state_dict"]
    tensors = {name: same_number(shape) for name, shape, _ in stored}
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
    unused = {"cls_token", "mask_token", "patch_embed", "decoder_blocks", "decoder_pred"}
    assert {name.split(".")[0] for name in report.unused} == unused
    wrong = len([n for n in report.unused if n.startswith("decoder_blocks")]) - 12 * 4
    measured(path.stem, "decoder blocks 5-8 left out, tensors too many or few", abs(wrong), 0)


def test_a_large_file_does_not_fit_the_base_model(golden: Path, tmp_path, record_property) -> None:
    path = full_size_mae(golden, "l", tmp_path / "mae_pretrain_vit_large_full.pth")
    with torch.device("meta"):
        model = build_detector(presets.mimdet_base())
    with pytest.raises(ValueError, match=r"197, 1024.*mimdet_large") as caught:
        load_mae(model, path)
    record_property("refused", ["MAE file: ViT-L into mimdet_base", str(caught.value)])


@pytest.mark.parametrize(("letter", "preset"), [("b", "mimdet_base"), ("l", "mimdet_large")])
def test_optimiser_groups(golden: Path, measured, letter: str, preset: str) -> None:
    """Learning rate and weight decay of every parameter at batch 64."""
    ours, expected = optimiser_groups(golden, f"mimdet_vit_{letter}", preset)
    assert {n: decay for n, (_, decay) in ours.items()} == {
        n: decay for n, (_, decay) in expected.items()
    }
    error = max(abs(ours[name][0] / rate - 1) for name, (rate, _) in expected.items())
    measured(f"optimiser groups vit_{letter}", f"rates of {len(ours)} parameters", error, 1e-12)


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


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(("preset", "letter"), [("mimdet_base", "b"), ("mimdet_large", "l")])
def test_operations_of_backbone_and_pyramid(golden: Path, preset, letter, ratio) -> None:
    """As many multiply-adds as the original, exactly: nothing is computed twice or left out."""
    name = f"mimdet_vit_{letter}_800x1344_sr{ratio}"
    expected = stored_json(golden / "flops")[name]["total_GMACs"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build_detector(presets.PRESETS[preset]()).eval()
        images = torch.zeros(1, 3, 800, 1344)
        model.neck(model.backbone(images, [(800, 1344)], Sampling(ratio)))
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-9)
