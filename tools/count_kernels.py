"""Kernels and host synchronisations of a training step, as a GPU would see them.

    python tools/count_kernels.py [PRESET] [--images 1 4 16] [--out FILE.json]

A dispatch mode counts what reaches the device: operations that are not mere views are kernels, and
those whose result's size or value Python has to know stop until the device has answered. Weights
are random and images drawn scenes, so the number of proposals is that of a first step. By part of
the step: `forward` is stem to neck, `backward` includes no host code of ours.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mimdet
from mimdet.data.shapes import ShapesCOCO
from mimdet.files import write_json

WAITS = {
    "aten::nonzero",
    "aten::_local_scalar_dense",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::bincount",
    "aten::equal",
    "torchvision::nms",
}
"""Operations that wait for the device. Indexing with a mask waits as well."""


class Counts(TorchDispatchMode):
    """Counts by the part that is running; `parts` are modules or methods that are wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.part = "other"

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().rpartition(".")[0] or function.name()
        made = function(*args, **(kwargs or {}))
        if not function.is_view and name not in ("aten::empty", "aten::detach"):
            self.kernels[self.part] += 1
        masks = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or masks:
            self.waits[self.part] += 1
        return made

    def around(self, owner: Any, method: str, part: str) -> None:
        """What `owner.method` runs is counted as `part`."""
        wrapped = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.part = self.part, part
            try:
                return wrapped(*args, **kwargs)
            finally:
                self.part = before

        setattr(owner, method, counted)


def count(preset: str, images: int) -> dict[str, dict[str, int]]:
    """Part -> {"kernels", "waits"} of one step of `images` scenes."""
    torch.manual_seed(0)
    cfg = mimdet.presets.PRESETS[preset]()
    cfg.detector.num_classes = 12
    model = mimdet.build_detector(cfg).train()
    scenes = [ShapesCOCO("shapes-v1-medium", size=256)[i] for i in range(images)]
    counts = Counts()
    counts.around(model, "features", "forward")
    counts.around(model.neck, "forward", "forward")
    counts.around(model.rpn, "losses", "RPN losses")
    counts.around(model.rpn, "propose", "proposals")
    counts.around(model.roi_heads, "sample", "RoI sampling")
    counts.around(model.roi_heads, "box_losses", "box losses")
    if model.roi_heads.mask_head is not None:
        counts.around(model.roi_heads, "mask_loss", "masks")
    with counts:
        losses = model([s.image for s in scenes], [s.target for s in scenes])
        total = sum(losses.values())
        counts.part = "backward"
        total.backward()
    parts = sorted(counts.kernels, key=lambda part: -counts.kernels[part])
    return {part: {"kernels": counts.kernels[part], "waits": counts.waits[part]} for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", default="tiny")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {str(images): count(options.preset, images) for images in options.images}
    for images, parts in found.items():
        for name, own in parts.items():
            print(
                f"{images:>3} images  {name:14} {own['kernels']:6} kernels {own['waits']:5} waits"
            )
        kernels, waits = (sum(own[key] for own in parts.values()) for key in ("kernels", "waits"))
        print(f"{images:>3} images  {'all':14} {kernels:6} kernels {waits:5} waits\n")
    if options.out:
        command = f"python tools/count_kernels.py {options.preset}"
        write_json(options.out, {"command": command, "torch": torch.__version__, "steps": found})


if __name__ == "__main__":
    main()
