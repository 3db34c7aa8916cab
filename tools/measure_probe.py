"""What can an encoder of `tiny_mae`'s size tell, untaught, taught to paint, and taught classes?

    python tools/measure_probe.py [RUN ...] [--level shapes-v1-medium] [--steps 800] [--save FILE]

The linear probe of notebook 01, section 7, on the tokens of `tiny_mae`, of random weights, of each
RUN of `mimdet pretrain tiny_mae`, and of the same encoder after it was taught what the probe asks:
from random weights, on new scenes, with a linear layer on the mean token inside each object's mask.
No encoder of its size that was taught less can be expected to tell more. Written to
notebooks/results/probe.json, a part a level; with --steps 0 nothing is taught. --save: where the
taught encoder goes, as an autoencoder's file that `--init-from` takes.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Muon
from torch import Tensor, nn

import mimdet
from mimdet.analysis.reliance import features_of, linear_probe, tokens_inside, untrained
from mimdet.config import PretrainConfig, load_config
from mimdet.experiments.results import hardware_text
from mimdet.files import read_json, write_json
from mimdet.models.mae import MAE
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.sampling import Sample
from mimdet.structures import Crops
from mimdet.training.pretrain import load_model

RESULT = Path(__file__).resolve().parents[1] / "notebooks/results/probe.json"
SCENES, BATCH, RATE, WARMUP = (400, 200), 16, 4e-3, 40


def object_logits(mae: MAE, head: nn.Linear, data: mimdet.ShapesCOCO, first: int) -> Any:
    """Logits (N, classes) and labels (N,) of the objects in BATCH scenes, each a mean token."""
    records = [data[first + i] for i in range(BATCH)]
    resize = features_of(mae, "encoder").resize
    batch = pad_and_normalise([resize(record.image) for record in records], mae).tensors
    patches = mae.patch_embed(batch)  # (B, D, h, w)
    grid = (patches.shape[2], patches.shape[3])
    sample = Sample([torch.arange(grid[0] * grid[1])] * BATCH, grid)
    tokens = mae.encode(patches.flatten(2).transpose(1, 2), sample)[:, 1:]  # (B, L, D)
    means = []
    for record, own in zip(records, tokens.float(), strict=True):
        masks, scale = record.target.masks, batch.shape[3] / record.image.shape[2]
        inside = tokens_inside(Crops(masks.boxes * scale, masks.bitmaps), grid, mae.patch_size)
        means.append((inside / inside.sum(1, keepdim=True)) @ own)
    return head(torch.cat(means)), torch.cat([record.target.labels for record in records])


def taught(shape: MAE, data: mimdet.ShapesCOCO, steps: int) -> MAE:
    """An autoencoder of this shape whose encoder has learnt classes; its decoder is random."""
    mae = untrained(shape).train()
    head = nn.Linear(mae.pos_embed.shape[2], len(data.categories))
    learning = [*mae.patch_embed.parameters(), *mae.blocks.parameters(), *mae.norm.parameters()]
    learning += [mae.cls_token, *head.parameters()]
    fit = Muon(learning, RATE, nesterov=True, adjust_lr_fn="match_rms_adamw", weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(fit, 1 / WARMUP, total_iters=WARMUP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(fit, steps - WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(fit, [warmup, cosine], [WARMUP])
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels = object_logits(mae, head, data, SCENES[0] + step * BATCH)
        loss: Tensor = F.cross_entropy(logits.float(), labels)
        fit.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        fit.step()
        schedule.step()
        if step % 50 == 49:
            right = float((logits.argmax(1) == labels).float().mean())
            print(f"step {step + 1}: loss {loss.detach():.3f}, {right:.0%} of a batch", flush=True)
    return mae.eval()


def about(run: str) -> str:
    cfg = load_config(Path(run) / "config.json", PretrainConfig)
    t, ratio = cfg.training, cfg.mae.sample_ratio
    what = f"{t.steps} steps of {t.batch_size * t.accumulate} by {t.optimizer}, {100 * ratio:g} %"
    return f"painting {cfg.data.shapes_level}, {what} seen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--level", default="shapes-v1-medium")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shipped = mimdet.load_mae_model("tiny_mae")
    known = mimdet.ShapesCOCO(options.level, length=SCENES[0])
    unseen = mimdet.ShapesCOCO(options.level, length=SCENES[1], split="val")
    rows: list[dict[str, Any]] = []

    def probe(what: str, mae: MAE, place: str = "encoder", **more: Any) -> None:
        right = linear_probe(features_of(mae, place), known, unseen)
        rows.append({"what": what, "right": round(100 * right, 1), **more})
        print(rows[-1], flush=True)

    probe("random weights, patch embedding alone", untrained(shipped), "patch_embed")
    probe("random weights", untrained(shipped))
    probe("painting: `tiny_mae`", shipped)
    for run in options.runs:
        painter = load_model(run)
        assert isinstance(painter, MAE), f"{run} is no run of `mimdet pretrain`"
        probe(about(run), painter)
    if options.steps:
        start = time.process_time()
        lessons = mimdet.ShapesCOCO(options.level, length=SCENES[0] + BATCH * options.steps)
        best = taught(shipped, lessons, options.steps)
        seconds = round(time.process_time() - start)
        what = f"taught the classes of {BATCH * options.steps:,} scenes"
        probe(what, best, steps=options.steps, cpu_seconds=seconds)
        if options.save:
            mimdet.save_mae(best, options.save)
    result = read_json(RESULT) if RESULT.exists() else {"levels": {}}
    result["command"] = "python tools/measure_probe.py [--level LEVEL] [RUN ...]"
    result["levels"][unseen.version] = {"hardware": hardware_text([]), "rows": rows}
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
