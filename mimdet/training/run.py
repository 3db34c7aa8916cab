"""A run is a directory: configuration, environment, metrics, checkpoints, predictions."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimdet import __version__
from mimdet.config import Config, difference, load_config, save_config
from mimdet.files import write_file, write_json, write_text
from mimdet.models.detector import Detector, build_detector
from mimdet.training.cell_code import load_slots, save_slots
from mimdet.training.checkpoints import WEIGHTS, CheckpointStore, read_weights


class Run:
    """The directory of one training. Same configuration: resumed. Another one: an error."""

    def __init__(self, path: str | Path, cfg: Config) -> None:
        self.path = Path(path)
        self.cfg = cfg
        self.store = CheckpointStore(self.path / "checkpoints", cfg.training.keep_checkpoints)
        self.metrics_path = self.path / "metrics.jsonl"
        existing = self.path / "config.json"
        if existing.exists():
            changed = difference(load_config(existing), cfg)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another configuration:\n  "
                    + "\n  ".join(changed)
                    + "\nUse another run name, or the old values to resume it."
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run: use another run name")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(existing, lambda partial: save_config(cfg, partial))

    def record_environment(self, model: Detector, data: str) -> None:
        """Versions, machine, seed, data fingerprint, and code of slots written in a notebook."""
        write_json(self.path / "environment.json", environment(self.cfg, data))
        write_json(self.path / "categories.json", model.categories)
        save_slots(self.path / "slots", model.slots)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl: one per step and one per evaluation."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break  # the last line of a process that was killed while writing it
        return rows

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be done again."""
        kept = [json.dumps(row) for row in self.metrics() if row["step"] <= step]
        write_text(self.metrics_path, "".join(line + "\n" for line in kept))


def environment(cfg: Config, data: str) -> dict[str, Any]:
    import timm
    import torchvision

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "mimdet": __version__,
        "git": git_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
        "seed": cfg.training.seed,
        "data": data,
    }


def git_state() -> str | None:
    """Commit of the library's checkout, with a + when it has changes; None outside git."""
    root = Path(__file__).parent
    try:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def read_run_weights(source: str | Path) -> dict[str, Tensor]:
    """Weights of a run's newest checkpoint, of a checkpoint folder, or of a safetensors file."""
    path = Path(source)
    if path.is_file():
        return read_weights(path)
    place = CheckpointStore(path / "checkpoints").pointed("last") or path
    if not (place / WEIGHTS).exists():
        raise FileNotFoundError(f"{source} is neither a run, nor a checkpoint, nor a weights file")
    return read_weights(place / WEIGHTS)


def warm_start(model: Detector, source: str) -> None:
    """Take every tensor of equal name and shape; say which ones stay new."""
    weights = read_run_weights(source)
    own = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < len(own) / 2:
        raise ValueError(
            f"{source} fits only {len(fitting)} of {len(own)} tensors of this model: "
            "use the preset and the sizes it was trained with"
        )
    model.load_state_dict(fitting, strict=False)
    new = sorted(set(own) - set(fitting))
    print(f"warm start from {source}: {len(fitting)} tensors loaded, {len(new)} stay new")
    for name in new:
        print(f"  new: {name}")


def load_detector(
    source: str | Path, *, checkpoint: str = "last", trust_code: bool = False, device: str = "cpu"
) -> Detector:
    """The detector of a run, in evaluation mode.

    source: a run directory; checkpoint: `last`, `best` or a step number. A run whose sampler or
    stem was written in a notebook holds that code under `slots/`; it is executed only with
    trust_code=True, because code from others can do anything.
    """
    path = Path(source)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is not a run: there is no config.json in it")
    cfg = load_config(path / "config.json")
    slots = load_slots(path / "slots", trust_code)
    model = build_detector(cfg, **slots)
    store = CheckpointStore(path / "checkpoints")
    place = store.pointed(checkpoint)
    if place is None and checkpoint.isdecimal():
        place = store.folder / f"{int(checkpoint):06d}"
    if place is None or not place.exists():
        raise FileNotFoundError(
            f"{path} has no checkpoint {checkpoint!r}; it has steps {store.steps()}, "
            "and the names 'last' and (after an evaluation) 'best'"
        )
    model.load_state_dict(read_weights(place / WEIGHTS))
    categories = path / "categories.json"
    if categories.exists():
        model.categories = json.loads(categories.read_text())
    return model.eval().to(device)
