"""Parameter groups, frozen parts, learning rates and the schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mimdet.config import TrainingConfig

# Learnt tables of positions, absolute and relative: never decayed.
POSITIONS = ("pos_embed", "relative_position_bias_table")


def scaled_rate(cfg: TrainingConfig) -> float:
    """The stem's learning rate for this configuration's images a step.

    rate = learning_rate * (batch / reference_batch) ^ exponent. The paper's two configurations
    (batch 64 at 8e-5, batch 16 at 4e-5) follow the square root.
    """
    share = cfg.step_images / cfg.reference_batch
    return cfg.learning_rate * share**cfg.learning_rate_exponent


def parameter_groups(model: nn.Module, cfg: TrainingConfig) -> list[dict[str, Any]]:
    """Three learning rates: stem = rate, encoder = rate / m, everything else = rate * m.

    Weight decay leaves out one-dimensional parameters and learnt positions; `decay_biases` brings
    the biases of linear layers and convolutions back. Frozen parameters are in no group. Each group
    carries the names of its parameters and its base rate.
    """
    rate = scaled_rate(cfg)
    rates = {
        "stem": rate,
        "encoder": rate / cfg.rate_multiplier,
        "rest": rate * cfg.rate_multiplier,
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decay = part_of(name), is_decayed(model, name, cfg.decay_biases)
        new = {"part": part, "params": [], "names": [], "lr": rates[part], "base_lr": rates[part]}
        new["weight_decay"] = cfg.weight_decay if decay else 0.0
        group = groups.setdefault((part, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def frozen_parts(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The parts of a model that `training.freeze` names, by their full names.

    A name is that of a part of the model, such as `neck`, or of its backbone, such as `encoder`.
    ValueError for one that is not there, and where nothing would be left to train.
    """
    known, parts = dict(model.named_modules()), {}
    for name in names:
        own = name if name in known else f"backbone.{name}"
        if not name or own not in known:
            short = [part.removeprefix("backbone.") for part in known]
            there = ", ".join(part for part in short if part and "." not in part)
            raise ValueError(f"training.freeze: there is no part {name!r}; there are {there}")
        parts[own] = known[own]
    still = {parameter for part in parts.values() for parameter in part.parameters()}
    if parts and still.issuperset(p for p in model.parameters() if p.requires_grad):
        raise ValueError("training.freeze names every part: there is nothing left to train")
    return parts


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Keep these parts as they are: no gradients, and batch norms use and keep their statistics."""
    for part in frozen_parts(model, names).values():
        part.requires_grad_(False)
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def part_of(name: str) -> str:
    """The learning-rate group of a parameter, by its name in the detector.

    A baseline's pre-trained part is called encoder (ViTs) or stages (Swin, ResNet).
    """
    if name.startswith("backbone.stem."):
        return "stem"
    if name.startswith(("backbone.encoder.", "backbone.stages.")):
        return "encoder"
    return "rest"


def is_decayed(model: nn.Module, name: str, biases: bool) -> bool:
    """Whether weight decay applies to a parameter; `biases`: also to those beside a matrix."""
    owner, _, own_name = name.rpartition(".")
    if own_name in POSITIONS:
        return False
    if biases and own_name == "bias":
        return getattr(model.get_submodule(owner), "weight", model.get_parameter(name)).ndim > 1
    return model.get_parameter(name).ndim > 1


def build_optimizer(model: nn.Module, cfg: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, as in the paper, or timm's Muon.

    AdamW is fused on GPUs and CPUs, where it takes a sixth of the time of a loop. Muon's rates are
    scaled so that an update is as large as AdamW's (Liu et al. 2025); what is no matrix it leaves
    to NAdamW.
    """
    groups = parameter_groups(model, cfg)
    if cfg.optimizer == "muon":
        from timm.optim import Muon

        return Muon(groups, nesterov=True, adjust_lr_fn="match_rms_adamw", betas=cfg.betas)
    fused = {p.device.type for p in model.parameters()} <= {"cuda", "cpu"}
    return torch.optim.AdamW(groups, betas=cfg.betas, fused=fused)


def rate_factor(step: int, total: int, warmup: int, cfg: TrainingConfig) -> float:
    """Share of the base rate used in optimiser step `step` (0-based) of `total`.

    Linear warm-up from 0 over `warmup` steps, times the schedule: `multistep` divides by ten at
    each milestone (a share of the training), `cosine` falls to 0 at the end.
    """
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if cfg.schedule == "multistep":
        return ramp * 0.1 ** sum(step >= round(milestone * total) for milestone in cfg.milestones)
    return ramp * 0.5 * (1 + math.cos(math.pi * step / max(1, total)))


class Schedule:
    """Which step of a training does what; steps are numbered from 1, images are those of an epoch.

    The one place where the number of steps of a run is computed.
    """

    def __init__(self, cfg: TrainingConfig, images: int) -> None:
        self.cfg, self.images = cfg, images
        self.epoch = images / cfg.step_images
        """In steps."""
        self.total = cfg.steps or max(1, round(cfg.epochs * self.epoch))
        self.warmup = cfg.warmup_steps or round(cfg.warmup_epochs * self.epoch)
        every = round(cfg.evaluate_every * self.epoch)
        if cfg.evaluate_every:  # a tenth of the epoch of a small folder is no step
            every = max(1, every, min(round(self.epoch), self.total // 10))
        self.evaluate_every = cfg.evaluate_every_steps or every
        """0: at the end only."""
        self.checkpoint_every = cfg.checkpoint_every_steps or max(
            1, min(round(self.epoch), math.ceil(self.total / 10))
        )

    def factor(self, step: int) -> float:
        """Share of the base rates that the step uses."""
        return rate_factor(step - 1, self.total, self.warmup, self.cfg)

    def evaluates(self, step: int) -> bool:
        """Whether the step ends with an evaluation."""
        regular = self.evaluate_every > 0 and step > 0 and step % self.evaluate_every == 0
        return regular or step == self.total
