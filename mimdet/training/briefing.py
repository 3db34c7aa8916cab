"""What a training says before its first step, and what its run records of the machine."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimdet import __version__, processes
from mimdet.config import Config, PretrainConfig
from mimdet.downloads import free_space, readable
from mimdet.training.optim import Schedule


def environment(cfg: Config | PretrainConfig) -> dict[str, Any]:
    """Versions, machine, seed, and the batch_size from which the images of each step follow."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "mimdet": __version__,
        "git": git_state(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
        "platform": platform.platform(),
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
        "seed": cfg.training.seed,
        "batch_size": cfg.training.batch_size,
    }


def git_state() -> str | None:
    """Commit of the library's checkout, with a + when it has changes; None outside git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    try:
        return subprocess.check_output(
            [*words, "--dirty=+"], text=True, stderr=subprocess.DEVNULL, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def default_processes(cfg: Config | PretrainConfig) -> int:
    """One per GPU, as far as they can share a step's micro-batches; one on a CPU."""
    gpus = torch.cuda.device_count() if cfg.training.device in ("auto", "cuda") else 0
    shared = [n for n in range(1, gpus + 1) if cfg.training.accumulate % n == 0]
    return max(shared, default=1)


def briefing(
    cfg: Config | PretrainConfig, path: Path, schedule: Schedule, done: int, model: nn.Module
) -> str:
    """Where and how a training runs, what it needs, how it is stopped and watched; a line each.

    done: steps so far.
    """
    t, world = cfg.training, processes.world()
    tensors = model.state_dict().values()
    size, device = sum(value.nbytes for value in tensors), next(iter(tensors)).device
    precision = t.precision.replace("auto", "bf16" if device.type == "cuda" else "fp32")
    kept = t.keep_checkpoints + 2  # the best one, and the one that is being written
    every = schedule.evaluate_every or schedule.total
    still = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen = f"{', '.join(t.freeze)} and fixed tables: {still:,} numbers stay as they begin"
    lines = {
        "device": f"{_place(cfg, path, device)}, {precision}",
        "work": f"{schedule.total - done:,} of {schedule.total:,} steps of {t.step_images} "
        f"images = {t.batch_size} x {t.accumulate} micro-batches, by {world} process(es): "
        f"{schedule.total / schedule.epoch:.3g} epochs of {schedule.images:,} images",
        **({"images": _sizes(cfg, every)} if isinstance(cfg, Config) else {}),
        **({"frozen": frozen} if t.freeze else {}),
        "memory": f"{readable(4 * size)} a process, and the images': after 20 steps, with the time",
        "disk": f"{readable(3 * size)} a checkpoint, every {schedule.checkpoint_every:,} steps; at "
        f"most {kept} at a time: {readable(3 * size * kept)} of {readable(free_space(path))} free",
        "stop": "Ctrl-C, SIGTERM or closing the terminal (unless in tmux or under nohup) saves; "
        f"`mimdet resume {path}` goes on",
        "watch": f"{path / 'metrics.jsonl'}; in a notebook Job.attach({str(path)!r})",
    }
    return "\n".join(f"{name:<7} {text}" for name, text in lines.items())


def _sizes(cfg: Config, every: int) -> str:
    """What images are resized to in training and evaluation, and how often that is."""
    d = cfg.data
    sides = d.short_sides if d.augment in ("paper", "multiscale") else (d.test_short_side,)
    words = f"short side {' to '.join(map(str, dict.fromkeys((min(sides), max(sides)))))}"
    words = f"{d.lsj_size} x {d.lsj_size}" if d.augment == "lsj" else words
    return (
        f"{words} pixels, in evaluation {d.test_short_side}, the long side at most {d.max_side}; "
        f"evaluated every {every:,} steps"
    )


def _place(cfg: Config | PretrainConfig, path: Path, device: torch.device) -> str:
    """The device and, where GPUs stay idle, why and what to do."""
    if device.type != "cuda":
        return f"{device.type}, {torch.get_num_threads()} thread(s) a process"
    gpu, count = torch.cuda.get_device_properties(device), torch.cuda.device_count()
    used, fitting = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), default_processes(cfg)
    text = f"{gpu.name}, {readable(gpu.total_memory)}; {used} of {count} GPUs"
    if used < fitting:
        text += f" (for {fitting}: torchrun --nproc-per-node {fitting} -m mimdet resume {path})"
    if fitting < count:
        text += (
            f" ({fitting} share {cfg.training.accumulate} micro-batches equally, {count} cannot: "
        )
        text += f"in a new run make training.accumulate a multiple of {count})"
    return text
