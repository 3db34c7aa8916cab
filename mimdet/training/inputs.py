"""What a run began with: its configuration, the files it names; what may change since; and what a
training says before its first step."""

import copy
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimdet import __version__, processes
from mimdet.config import Config, PretrainConfig, flat, load_config, set_field
from mimdet.downloads import free_space, readable
from mimdet.files import read_json
from mimdet.training.optim import Schedule

ENVIRONMENT = "environment.json"
"""In the folder of a run: what it began with. {"folder": in which the first command ran, "run": its
own folder then} and, from the first step on, `environment` and the inputs; "changes" since."""
INPUTS = {
    "data": "the data that are trained on",
    "held_out": "the data that are evaluated on",
    "weights": "the initial weights",
    "classes": "the classes",
}
"""What a run began with, by its name in ENVIRONMENT."""
PATHS = {f"data.{split}_{kind}" for split in ("train", "val") for kind in ("json", "images")}
MAY_BE_NAMES = {"training.init_from", "data.hub_name"}
PATHS |= MAY_BE_NAMES | {"data.folder"}
"""Fields that name a file or folder."""
FREE = (
    "backbone.checkpointing",
    "data.workers",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.threads",
    "training.compile",
    "training.device",
    "training.answer_minutes",
)
"""Fields that decide no result."""
FROM_DATA = ("detector.num_classes", "detector.masks")
"""Fields that follow from the data, which may not have been there when the run was made."""
MICRO = ("training.batch_size", "training.accumulate")
DIFFERS = (
    "each step has the images it had; its random draws, means of losses and BatchNorm's statistics "
    "are those of other micro-batches, so its numbers differ as with another seed"
)
"""What another MICRO of as many images a step changes."""


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


def read_environment(path: Path) -> dict[str, Any]:
    """The run's ENVIRONMENT; empty before it was begun."""
    file = path / ENVIRONMENT
    found: Any = read_json(file) if file.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no record of a run: remove it")
    return found


def check_inputs(path: Path, inputs: dict[str, Any]) -> None:
    """ValueError where a run that has a checkpoint began with other data, weights or classes.

    inputs: what they are now, as ENVIRONMENT records them: versions, hashes, names. Where there is
    a hash it alone counts, so that a file may be moved.
    """
    if not has_checkpoint(path):
        return
    known = read_environment(path)
    bare = {name: str(now).rpartition("sha256:")[2] for name, now in inputs.items() if now}
    changed = [n for n in bare if n in known and str(known[n]).rpartition("sha256:")[2] != bare[n]]
    if changed:
        lines = [f"{INPUTS[name]}: {known[name]} -> {inputs[name]}" for name in changed]
        raise ValueError(
            f"{path} began with other inputs than there are now:\n  "
            + "\n  ".join(lines)
            + "\nPut the old ones back to go on, or train the new ones under another run name."
        )


def stored_config(path: Path) -> Config | PretrainConfig:
    """The configuration of a run, of a detector or of an autoencoder.

    Relative paths in it are made absolute where they would lead elsewhere from here.
    """
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path} holds no run: there is no config.json in it")
    kind = Config if "detector" in read_json(file) else PretrainConfig
    cfg: Config | PretrainConfig = load_config(file, kind)
    values = flat(cfg)
    for name in PATHS & values.keys():
        target = path_of(values[name], path)
        is_path = target.exists() or name not in MAY_BE_NAMES
        if values[name] and is_path and target.resolve() != Path(values[name]).resolve():
            set_field(cfg, name, str(target))
    return cfg


def path_of(name: str, path: Path) -> Path:
    """Where a relative path in the configuration of the run `path` leads.

    From the folder in which it was begun or, where both were moved together, from the one that lies
    to the run now as that did then.
    """
    about = read_environment(path)
    folders = [Path(str(about.get("folder", ".")))]
    with suppress(KeyError, ValueError):  # on another drive of Windows
        folders.append(path.resolve() / os.path.relpath(about["folder"], about["run"]))
    paths = [Path(os.path.normpath(folder / name)) for folder in folders]
    return next((target for target in paths if target.exists()), paths[0])


def accepted(stored: Any, cfg: Any, path: Path) -> Any:
    """What config.json of the run `path` is to hold when it goes on with `cfg`.

    Free to change are what decides no result, the micro-batches that a step's images come in,
    where the same files lie, and before the first step what follows from the data. Raises
    ValueError with the fields that differ otherwise.
    """
    kept = copy.deepcopy(cfg)
    old, new, refused = flat(stored), flat(cfg), []
    for name in [name for name in old if old[name] != new[name]]:
        if name in FREE or (name in MICRO and step_images(stored) == step_images(cfg)):
            continue
        if name in FROM_DATA and not has_checkpoint(path):
            continue
        if name in PATHS and old[name] and Path(new[name]).exists():
            target = path_of(old[name], path)
            if target.resolve() == Path(new[name]).resolve():
                set_field(kept, name, old[name])
                continue
            if not target.exists():
                continue  # it was moved; `check_inputs` sees whether it is the same
        refused.append(f"{name}: {old[name]} -> {new[name]}")
    if refused:
        raise ValueError(
            f"{path} holds a run with another configuration:\n  "
            + "\n  ".join(refused)
            + "\nUse another run name, or the old values to resume it. A finished run is trained "
            f"further by `mimdet resume {path} --steps N`."
        )
    return kept


def step_images(cfg: Any) -> int:
    return int(cfg.training.batch_size * cfg.training.accumulate)


def has_checkpoint(path: Path, after: int = -1) -> bool:
    """Whether the run has one, of a step after this one."""
    names = [entry.name for entry in (path / "checkpoints").glob("*")]
    return any(name.isdecimal() and int(name) > after for name in names)


# ------------------------------------------------------------------------------- before it starts


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
        "work": f"{schedule.total - done:,} of {schedule.total:,} steps of {step_images(cfg)} "
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
