"""Operation counts of the published sizes, built without memory."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mimdet import presets
from mimdet.models.detector import build_detector
from mimdet.models.sampling import Sampling
from tests.parity.reference import stored_json


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
@pytest.mark.parametrize(("preset", "letter"), [("mimdet_base", "b"), ("mimdet_large", "l")])
def test_operations_of_backbone_and_pyramid(
    golden: Path, preset: str, letter: str, ratio: float
) -> None:
    """As many multiply-adds as the original, exactly: nothing is computed twice or left out."""
    name = f"mimdet_vit_{letter}_800x1344_sr{ratio}"
    expected = stored_json(golden / "flops")[name]["total_GMACs"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build_detector(presets.PRESETS[preset]()).eval()
        images = torch.zeros(1, 3, 800, 1344)
        model.neck(model.backbone(images, [(800, 1344)], Sampling(ratio)))
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-9)
