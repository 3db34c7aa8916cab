"""Choose the reference numbers that ship in tests/data, so that anyone can run parity tests.

    MIMDET_GOLDEN=... python tools/parity_subset.py

The full set (40 MB) does not ship. These two files hold: a whole small autoencoder with its input,
masks, losses and prediction; and of a small detector the RPN and the RoI heads, with pooled
features and coarse pyramid levels as input, and their outputs. Together with
hub_vit_mae.safetensors less than 2 MB.
"""

import os
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
MASKS = 4  # mask features are large
LEVELS = ("p4", "p5", "p6")


def mae_subset(golden: Path) -> dict[str, Tensor]:
    weights = load_file(golden / "mae_small/mae_model.safetensors")
    stored = load_file(golden / "mae_small/mae_io.safetensors")
    numbers = {name: stored[name] for name in ("imgs", "noise", "loss_raw", "loss_norm", "latent")}
    numbers["pred_every_8th"] = stored["pred"].flatten()[::8].clone()
    return weights | {f"io.{name}": value for name, value in numbers.items()}


def heads_subset(golden: Path) -> dict[str, Tensor]:
    folder = golden / "mimdet_v1_small"
    weights = load_file(folder / "model.safetensors")
    stored = load_file(folder / "eval_sr1.safetensors")
    kept = {
        name: value
        for name, value in weights.items()
        if name.startswith(("proposal_generator.", "roi_heads."))
    }
    numbers = {"box_pooled": stored["box_pooled"], "mask_pooled": stored["mask_pooled"][:MASKS]}
    rois = len(stored["box_pooled"])
    numbers |= {name: stored[name][:rois] for name in ("box_cls_logits", "box_deltas")}
    numbers["mask_probs"] = stored["det_raw_mask_probs_0"][:MASKS]
    numbers["mask_classes"] = stored["det_raw_classes_0"][:MASKS]
    for level in LEVELS:
        names = (level, f"rpn_logits_{level}", f"rpn_deltas_{level}")
        numbers |= {name: stored[name] for name in names}
    return kept | {f"io.{name}": value.contiguous() for name, value in numbers.items()}


def main() -> None:
    if "MIMDET_GOLDEN" not in os.environ:
        sys.exit("MIMDET_GOLDEN is not set: it names the folder of all reference tensors")
    golden = Path(os.environ["MIMDET_GOLDEN"])
    for name, tensors in (("mae", mae_subset(golden)), ("heads", heads_subset(golden))):
        path = ROOT / f"tests/data/original_{name}.safetensors"
        save_file(tensors, path)
        print(f"{path.relative_to(ROOT)}: {len(tensors)} tensors, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
