"""Can a backbone carry what is far away? `python tools/measure_transport.py [--start tiny]`.

On `shapes-v2-context` a lit object's class is the colour of a lamp far from it. The backbone of
`tiny` learns nothing but that: the mean of c4 in an object's box, normalised, and one linear layer
of three outputs, trained with true boxes. No neck, no head, no other loss. Prints the accuracy on
held-out scenes (a guess: a third) and the effective rank of c4's tokens while it learns.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.ops import roi_align

from mimdet import presets
from mimdet.data.scenes import LAMPS, LIT
from mimdet.data.shapes import ShapesCOCO
from mimdet.experiments.results import hardware_text
from mimdet.files import write_json
from mimdet.models.backbones import build_backbone
from mimdet.training.run import load_detector

BATCH, RATE, WARMUP, HELD_OUT = 4, 1e-3, 50, 96


class Lamp(nn.Module):
    """The backbone of `tiny`, and what tells the lamp's colour from its c4."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_backbone(presets.tiny().backbone)
        channels = presets.tiny().backbone.decoder_dim
        self.tell = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, len(LAMPS)))

    def forward(self, images: Tensor, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """-> (N, 3) logits of all boxes, (B, C, h, w) c4."""
        sizes = [tuple(images.shape[-2:])] * len(images)
        c4 = self.backbone(images, sizes)["c4"]
        stride = images.shape[-1] / c4.shape[-1]
        return self.tell(roi_align(c4, boxes, 1, 1 / stride, 2, True).flatten(1)), c4


def lit_objects(data: ShapesCOCO, numbers: range) -> tuple[Tensor, list[Tensor], Tensor]:
    """(B, 3, H, W) images around 0, the lit objects' boxes of each, (N,) the lamps' colours."""
    images, boxes, colours = [], [], []
    for record in map(data.__getitem__, numbers):
        # The first classes are every lit outline under every lamp, the lamps in turn.
        lit = record.target.labels < len(LIT) * len(LAMPS)
        images.append((record.image / 255 - 0.45) / 0.23)
        boxes.append(record.target.boxes[lit])
        colours.append(record.target.labels[lit] % len(LAMPS))
    return torch.stack(images), boxes, torch.cat(colours)


@torch.no_grad()
def measured(model: Lamp, data: ShapesCOCO) -> dict[str, float]:
    model.eval()
    right, tokens = [], []
    for start in range(0, HELD_OUT, 16):
        images, boxes, colours = lit_objects(data, range(start, start + 16))
        logits, c4 = model(images, boxes)
        right.append(logits.argmax(1) == colours)
        tokens.append(c4.flatten(2).transpose(1, 2).flatten(0, 1))
    model.train()
    shares = torch.linalg.eigvalsh(torch.cov(torch.cat(tokens).double().T)).clamp(min=1e-12)
    shares = shares / shares.sum()
    rank = float(torch.exp(-(shares * shares.log()).sum()))
    return {"accuracy": float(torch.cat(right).float().mean()), "rank_c4": rank}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help=f"of {BATCH} scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", default="", help="a detector's run whose backbone it begins with"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = Lamp()
    if options.start:
        model.backbone.load_state_dict(load_detector(options.start).backbone.state_dict())
    train = ShapesCOCO("shapes-v2-context", length=1 << 30, seed=options.seed)
    held_out = ShapesCOCO("shapes-v2-context", length=HELD_OUT, split="val")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    rows: list[dict[str, Any]] = []
    for step in range(options.steps + 1):
        if step % 50 == 0:
            rows.append({"step": step, "scenes": step * BATCH, **measured(model, held_out)})
            print(*(f"{name} {value:.3g}" for name, value in rows[-1].items()), flush=True)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        images, boxes, colours = lit_objects(train, range(step * BATCH, (step + 1) * BATCH))
        loss = cross_entropy(model(images, boxes)[0], colours)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if options.out:
        command = "python tools/measure_transport.py" + f" --start {options.start}" * bool(
            options.start
        )
        about = {"command": command, "steps": options.steps, "data": train.version}
        about |= {"hardware": hardware_text([]), "seed": options.seed, "rate": RATE}
        about["start"] = options.start or "random weights"
        write_json(options.out, about | {"rows": rows})


if __name__ == "__main__":
    main()
