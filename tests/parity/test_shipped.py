"""Parity that needs no further files: the numbers of the original code under tests/data."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mimdet
from mimdet.config import DetectorConfig
from mimdet.models.detector import build_roi_heads, build_rpn
from mimdet.models.official import detectron2_rules
from mimdet.models.weights import load_mae_model, translate
from tests.parity.reference import relative

DATA = Path(__file__).resolve().parents[1] / "data"
FEATURES = 1e-5


def shipped(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the numbers that go in and come out."""
    stored = load_file(DATA / f"{name}.safetensors")
    numbers = {n.removeprefix("io."): v for n, v in stored.items() if n.startswith("io.")}
    return {n: v for n, v in stored.items() if not n.startswith("io.")}, numbers


def test_less_than_two_megabytes_ship() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2e6


@pytest.mark.parametrize("kind", ["raw", "norm"])
def test_autoencoder(measured, tmp_path, kind: str) -> None:
    weights, numbers = shipped("original_mae")
    save_file(weights, tmp_path / "mae.safetensors")
    options = {"num_heads": 4, "decoder_heads": 4, "norm_pix_loss": kind == "norm"}
    model = load_mae_model(tmp_path / "mae.safetensors", **options)
    grid = (8, 8)
    sample = mimdet.select(list(-numbers["noise"]), [grid] * 3, grid, 0.25)
    with torch.inference_mode():
        out = model(numbers["imgs"], sample=sample)
        latent = model.encode(model.patch_embed(numbers["imgs"]).flatten(2).mT, sample)
    where = f"shipped autoencoder, {kind}"
    measured(where, "latent", relative(latent, numbers["latent"]), FEATURES)
    eighth = out.prediction.flatten()[::8]
    measured(where, "prediction", relative(eighth, numbers["pred_every_8th"]), FEATURES)
    measured(where, "loss", relative(out.loss, numbers[f"loss_{kind}"]), FEATURES)


@pytest.fixture(scope="module")
def heads() -> tuple[torch.nn.ModuleDict, dict[str, Tensor]]:
    """RPN and RoI heads of a small MIMDet with the original's weights."""
    weights, numbers = shipped("original_heads")
    d = DetectorConfig(num_classes=6, channels=24, box_fc_dim=48)
    parts = torch.nn.ModuleDict({"rpn": build_rpn(d), "roi_heads": build_roi_heads(d)})
    parts.load_state_dict({translate(n, detectron2_rules()): v for n, v in weights.items()})
    return parts.eval(), numbers


def test_rpn(heads, measured) -> None:
    parts, numbers = heads
    levels = ("p4", "p5", "p6")
    with torch.inference_mode():
        logits, deltas = parts["rpn"].head([numbers[level] for level in levels])
    for i, level in enumerate(levels):
        for name, ours in (("logits", logits[i]), ("deltas", deltas[i])):
            error = relative(ours, numbers[f"rpn_{name}_{level}"])
            measured("shipped RPN", f"{name} {level}", error, FEATURES)


def test_box_and_mask_head(heads, measured) -> None:
    roi_heads, numbers = heads[0]["roi_heads"], heads[1]
    with torch.inference_mode():
        logits, deltas = roi_heads.box_head(numbers["box_pooled"])
        masks = roi_heads.mask_head(numbers["mask_pooled"])
    own = masks[torch.arange(len(masks)), numbers["mask_classes"]].sigmoid()
    where = "shipped heads"
    measured(where, "box logits", relative(logits, numbers["box_cls_logits"]), FEATURES)
    measured(where, "box deltas", relative(deltas.flatten(1), numbers["box_deltas"]), FEATURES)
    measured(where, "mask probabilities", relative(own, numbers["mask_probs"][:, 0]), FEATURES)
