"""The published sizes, built without memory: names, shapes, epsilons and operation counts."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mimdet import presets
from mimdet.models.detector import build_detector
from mimdet.models.sampling import Sampling
from tests.parity.reference import our_name


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("mimdet_base", "keys_mimdet_vit_b"),
        ("mimdet_large", "keys_mimdet_vit_l"),
        ("mimdet_v1_large", "keys_mimdet_v1_vit_l"),
    ],
)
def test_full_size_checkpoints_have_our_names_and_shapes(
    golden: Path, preset: str, keys: str
) -> None:
    stored = json.loads((golden / f"{keys}.json").read_text())
    official = {our_name(name): shape for name, shape, _ in stored["state_dict"]}
    with torch.device("meta"):
        model = build_detector(presets.PRESETS[preset]())
    assert official == {name: list(value.shape) for name, value in model.state_dict().items()}
    epsilons = {our_name(f"{name}.")[:-1]: eps for name, (_, eps) in stored["module_eps"].items()}
    modules = dict(model.named_modules())
    assert len(epsilons) > 40
    assert {name: modules[name].eps for name in epsilons} == epsilons


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(("preset", "letter"), [("mimdet_base", "b"), ("mimdet_large", "l")])
def test_operations_of_backbone_and_pyramid(
    golden: Path, preset: str, letter: str, ratio: float
) -> None:
    """As many multiply-adds as the original, exactly: nothing is computed twice or left out."""
    stored = json.loads((golden / "flops.json").read_text())
    expected = stored[f"mimdet_vit_{letter}_800x1344_sr{ratio}"]["total_GMACs"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build_detector(presets.PRESETS[preset]()).eval()
        images = torch.zeros(1, 3, 800, 1344)
        model.neck(model.backbone(images, [(800, 1344)], Sampling(ratio)))
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-9)
