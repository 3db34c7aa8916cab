"""The weights a training begins with, of an autoencoder or a detector: what is kept or new."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimdet.config import TrainingConfig
from mimdet.data.loader import MicroBatch
from mimdet.models.checkpoint_files import CheckpointFile, read_checkpoint
from mimdet.models.detector import Detector, read_categories
from mimdet.models.official import coco_classes, detectron2_rules, from_detectron2
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.weights import LoadReport, load_mae, read_mae
from mimdet.training.checkpoints import weights_of
from mimdet.training.optim import frozen_parts

SCORES = "roi_heads.box_head.cls_score"
CLASS_ROWS = {
    SCORES: 1,
    "roi_heads.box_head.bbox_pred": 4,
    "roi_heads.mask_head.predictor.mask_fcn_logits": 1,
    "c4_classes.linear": 1,
}
"""Layers of a detector with so many rows for each class, label after label. SCORES has one more at
its end, for the background."""
C4_WARMUP = 50
"""Steps in which `teach_c4`'s rate rises."""


def initialise(
    model: Detector, source: str | Path, decoder: Literal["pretrained", "random"] = "pretrained"
) -> LoadReport:
    """Starting weights for a new run, from whatever `source` is; says what was taken.

    source: a masked autoencoder (`mimdet.load_mae`), a released detector, a weights file, a
    checkpoint folder or a run. Of a detector every tensor of equal name and shape is taken, so that
    another norm is no obstacle, and of other classes what belongs to those that both know by name.
    """
    weights = weights_of(source)
    file = read_checkpoint(weights)
    if not file.is_detector:
        return load_mae(model, weights, decoder=decoder)
    d = model.config.detector
    rules = detectron2_rules(d.box_convs, d.rpn_convs, model.config.backbone.kind)
    tensors = from_detectron2(file, rules)
    classes = classes_of(file, tensors, Path(source))
    return warm_start(model, tensors, str(source), classes)


def classes_of(file: CheckpointFile, tensors: dict[str, Tensor], source: Path) -> list[str]:
    """The classes of a detector's weights, in the order of its labels; [] where nothing says so."""
    count = len(tensors[f"{SCORES}.bias"]) - 1 if f"{SCORES}.bias" in tensors else 0
    beside = [folder / "categories.json" for folder in (source, *source.parents[:2])]
    named = [path for path in beside if source.is_dir() and path.exists()]  # a run, a checkpoint
    if "categories" in file.metadata:
        names = [one.name for one in read_categories(file.metadata["categories"])]
    elif named:
        names = [one.name for one in read_categories(named[0].read_bytes())]
    else:
        names = coco_classes(count)[0] if count == 80 else []
    return names if len(names) == count else []


def warm_start(
    model: Detector, weights: dict[str, Tensor], source: str, classes: Sequence[str] = ()
) -> LoadReport:
    """Take every tensor of equal name and shape; report those that keep their initial values.

    classes: those of `weights`. Where the model has others, the layers in CLASS_ROWS are new, but
    for the rows of classes of the same name.
    """
    own, known, notes = model.state_dict(), {}, []
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < len(own) / 2:
        raise ValueError(
            f"{source} fits only {len(fitting)} of {len(own)} tensors of this model: "
            "use the preset and the sizes it was trained with"
        )
    if classes and model.categories and list(classes) != model.categories:
        known = known_rows(model, weights, classes)
        fitting = {k: v for k, v in fitting.items() if k.rpartition(".")[0] not in CLASS_ROWS}
        both = [name for name in model.categories if name in classes]
        more = [name for name in model.categories if name not in classes]
        notes = [f"classes kept, by name: {', '.join(both) or 'none'}"]
        notes += [f"classes new: {', '.join(more)}"] if more else []
        fitting |= {} if more else known
    model.load_state_dict(fitting | known, strict=False)
    new = [name for name in own if name not in fitting]
    unused = [name for name in weights if name not in fitting | known]
    report = LoadReport(f"warm start from {source}", list(fitting), new, unused, notes=notes)
    print(report)
    for name in new:
        print(f"  new: {name}" + (", but for the classes kept" if name in known else ""))
    return report


def known_rows(
    model: Detector, weights: dict[str, Tensor], classes: Sequence[str]
) -> dict[str, Tensor]:
    """The model's layers in CLASS_ROWS with the rows of classes that `weights` know by name, and
    of the background; none where there is no such class."""
    own, found = model.state_dict(), {}
    pairs = [(i, classes.index(n)) for i, n in enumerate(model.categories) if n in classes]
    for layer, rows in CLASS_ROWS.items() if pairs else ():
        background = [(len(model.categories), len(classes))] if layer == SCORES else []
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in own and name in weights and own[name].shape[1:] == weights[name].shape[1:]:
                value = own[name].clone()
                for here, there in pairs + background:
                    theirs = weights[name][rows * there : rows * (there + 1)]
                    value[rows * here : rows * (here + 1)] = theirs
                found[name] = value
    return found


def check_frozen(model: Detector, cfg: TrainingConfig, report: LoadReport) -> None:
    """ValueError where a part that is to stay as it begins did not get all its weights."""
    parts = frozen_parts(model, cfg.freeze)
    inside = tuple(f"{part}." for part in parts)
    random = [name for name in report.new if name.startswith(inside)]
    if random:
        raise ValueError(
            f"training.freeze: {report.source} holds nothing for {len(random)} tensors of what is "
            f"to stay as it begins, first {random[0]}: leave that part out"
        )
    if cfg.align_stem and {"backbone", "backbone.stem"} & parts.keys():
        raise ValueError("training.align_stem teaches the stem that training.freeze keeps")
    if cfg.c4_first and any(part.partition(".")[0] == "backbone" for part in parts):
        raise ValueError("training.c4_first teaches the backbone that training.freeze keeps")


def align_stem(
    model: Detector, source: str | Path, batches: Sequence[MicroBatch], rate: float = 2e-3
) -> list[float]:
    """Fit the stem's tokens to those of an autoencoder's patch embedding, from images alone.

    The encoder then begins with tokens like those that it was trained on. source: the autoencoder.
    -> relative error, squared error / variance, of every batch. ValueError for a backbone without
    a stem, or a file without a patch embedding of the stem's width.
    """
    if not batches:
        return []
    stem, tensors = getattr(model.backbone, "stem", None), read_mae(weights_of(source)).tensors
    weight, bias = (tensors.get(f"patch_embed.proj.{name}") for name in ("weight", "bias"))
    width = model.config.backbone.embed_dim
    if stem is None or weight is None or bias is None or len(weight) != width:
        raise ValueError(
            f"training.align_stem={len(batches)} fits the stem of a MIMDet to the patch embedding "
            f"of {source}: this is a {model.config.backbone.kind}, or the file holds none of width "
            f"{width}"
        )
    own = next(stem.parameters())
    weight, bias = weight.to(own), bias.to(own)
    optimizer = torch.optim.AdamW(stem.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    errors = []
    for batch in batches:
        images = pad_and_normalise(batch.images, stem).tensors
        wanted = F.conv2d(images, weight, bias, stride=weight.shape[-1])
        loss = F.mse_loss(stem(images).tokens, wanted) / wanted.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(float(loss.detach()))
    print(f"the stem's tokens are those of {source} to {100 * errors[-1]:.0f} %")
    return errors


def teach_c4(
    model: Detector, batches: Iterable[MicroBatch], count: int, rate: float = 3e-4
) -> list[float]:
    """Train the backbone by the loss on c4 alone (`detector.c4_loss`), a step for each of `count`
    batches, in this process alone.

    What is far away is learnt in a few hundred such steps, and hardly beside the losses of boxes
    and masks (docs/measurements.md). -> the loss of every step.
    """
    from tqdm import tqdm

    assert model.c4_classes is not None  # check_start
    learning = nn.ModuleList([model.backbone, model.c4_classes])
    optimizer = torch.optim.AdamW(learning.parameters(), rate, (0.9, 0.98), weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / C4_WARMUP, total_iters=C4_WARMUP)
    losses = []
    for batch in tqdm(batches, "c4 alone", count, unit="step", file=sys.stdout, mininterval=1):
        images = model.batch(batch.images)
        targets = [target.to(images.tensors.device) for target in batch.targets]
        loss = model.c4_classes.loss(model.features(images)["c4"], targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        losses.append(float(loss.detach()))
    print(f"c4 alone: a loss of {losses[0]:.2f} before, {losses[-1]:.2f} after {count} steps")
    return losses
