"""A run is a directory: configuration, environment, metrics, checkpoints, predictions."""

import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimdet import __version__, processes
from mimdet.config import Config, difference, load_config, save_config
from mimdet.files import write_file, write_json, write_text
from mimdet.models.checkpoint_files import read_checkpoint, read_safetensors, shipped
from mimdet.models.detector import Detector, build_detector
from mimdet.models.names import detectron2_rules
from mimdet.models.official import from_detectron2, holds_detector, load_official
from mimdet.models.single_file import describes_itself, load_single_file
from mimdet.models.weights import LoadReport, load_mae
from mimdet.pretrain_config import PretrainConfig
from mimdet.training.cell_code import load_slots, save_slots
from mimdet.training.checkpoints import WEIGHTS, CheckpointStore
from mimdet.training.lock import RunInUse, alone_in

MAE_FILE = "mae.safetensors"
"""What `mimdet pretrain` leaves in its run for others to read."""

CONTENTS = {
    "config.json": "every number of the run; another configuration is refused here",
    "metrics.jsonl": "a line a step (losses, gradient norm, rate, times), a line an evaluation",
    "checkpoints": "weights and optimiser state of the last two steps saved, and of the best",
    "eval.json": "metrics of the last evaluation",
    "predictions.json": "its detections in COCO's results format",
    "evaluation.json": "metrics at several sample ratios, from `mimdet evaluate`",
    "categories.json": "class names, so that the folder alone is enough to predict",
    "slots": "code of parts that were written in a notebook",
    "environment.json": "versions, machine, seed, fingerprint of the data",
    "log.txt": "what a job printed that was started from a notebook",
    "job.json": "its process, so that it can be found again",
    "status.json": "how the last training ended",
    "lock": "held while a process trains here: a second one is refused",
}
"""What a detector's run holds, by name."""


class Run:
    """The directory of one training. Same configuration: resumed. Another one: an error."""

    def __init__(
        self, path: str | Path, cfg: Config | PretrainConfig, *, locked: bool = False
    ) -> None:
        """locked: this process already holds the run's lock (`alone_in`) while it trains here."""
        self.path = Path(path)
        self.locked = locked
        self.cfg = cfg
        self.store = CheckpointStore(self.path / "checkpoints", cfg.training.keep_checkpoints)
        self.metrics_path = self.path / "metrics.jsonl"
        existing = self.path / "config.json"
        if existing.exists():
            changed = difference(load_config(existing, type(cfg)), cfg)
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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other trainings out of this run. Raises RunInUse, in every process, if one is in."""
        with ExitStack() as stack:
            refused = ""
            if processes.rank() == 0 and not self.locked:
                try:
                    stack.enter_context(alone_in(self.path))
                except RunInUse as error:
                    refused = str(error)
            refused = processes.from_first(refused)
            if refused:
                raise RunInUse(refused)
            yield

    def begun(self) -> bool:
        """Whether a training has started here."""
        return (self.path / "environment.json").exists()

    def record_environment(self, data: str) -> None:
        """Versions, machine, seed and data fingerprint."""
        write_json(self.path / "environment.json", environment(self.cfg, data))

    def record_detector(self, model: Detector) -> None:
        """Class names, and the code of parts that were written in a notebook."""
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


def environment(cfg: Config | PretrainConfig, data: str) -> dict[str, Any]:
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


def initialise(
    model: Detector, source: str | Path, decoder: Literal["pretrained", "random"] = "pretrained"
) -> None:
    """Starting weights for a new run, from whatever `source` is; says what was taken.

    source: a masked autoencoder (`mimdet.load_mae`), a released detector, a weights file, a
    checkpoint folder or a run. Of a detector every tensor of equal name and shape is taken, so that
    another class count or another norm is no obstacle.
    """
    path = Path(source)
    if (path / MAE_FILE).exists():  # a run of `mimdet pretrain`
        path = path / MAE_FILE
    if path.is_dir():
        place = CheckpointStore(path / "checkpoints").pointed("last") or path
        if not (place / WEIGHTS).exists():
            raise FileNotFoundError(f"{source} is a folder without a checkpoint of a run")
        warm_start(model, read_checkpoint(place / WEIGHTS).tensors, str(source))
        return
    file = read_checkpoint(path if path.exists() else source)
    if holds_detector(file):
        d = model.config.detector
        rules = detectron2_rules(d.box_convs, d.rpn_convs, model.config.backbone.kind)
        tensors = from_detectron2(file, rules)
        warm_start(model, tensors, file.name)
    else:
        load_mae(model, path if path.exists() else source, decoder=decoder)


def warm_start(model: Detector, weights: dict[str, Tensor], source: str) -> None:
    """Take every tensor of equal name and shape; say which ones stay new."""
    own = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < len(own) / 2:
        raise ValueError(
            f"{source} fits only {len(fitting)} of {len(own)} tensors of this model: "
            "use the preset and the sizes it was trained with"
        )
    model.load_state_dict(fitting, strict=False)
    new = [name for name in own if name not in fitting]
    unused = [name for name in weights if name not in fitting]
    print(LoadReport(f"warm start from {source}", list(fitting), new, unused))
    for name in new:
        print(f"  new: {name}")


def load_detector(
    source: str | Path,
    cfg: Config | None = None,
    *,
    checkpoint: str | int = "last",
    trust_code: bool = False,
    device: str = "cpu",
) -> Detector:
    """The detector of a run, or of a released file, in evaluation mode.

    source: a run directory; the name of shipped weights ("tiny"); or a weights file: one that
    `mimdet.save_detector` wrote describes itself, a released one is recognised by its names and
    shapes (`mimdet.models.official`), any other needs `cfg`. checkpoint: of a run, `last`, `best`
    or a step number. A run whose sampler or stem was written in a notebook holds that code under
    `slots/`; it is executed only with trust_code=True, because code from others can do anything.
    """
    path = Path(source)
    if path.is_file() or str(source) in shipped():
        file = read_checkpoint(source)
        if cfg is None and describes_itself(file):
            return load_single_file(file).to(device)
        return load_official(source, cfg).to(device)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} is neither a run (there is no config.json in it) nor a weights file"
        )
    if cfg is not None:
        raise ValueError(f"{path} is a run and has its own configuration: leave cfg out")
    cfg = load_config(path / "config.json")
    slots = load_slots(path / "slots", trust_code)
    model = build_detector(cfg, **slots)
    store = CheckpointStore(path / "checkpoints")
    checkpoint = str(checkpoint)
    place = store.pointed(checkpoint)
    if place is None and checkpoint.isdecimal():
        place = store.folder / f"{int(checkpoint):06d}"
    if place is None or not place.exists():
        raise FileNotFoundError(
            f"{path} has no checkpoint {checkpoint!r}; it has steps {store.steps()}, "
            "and the names 'last' and (after an evaluation) 'best'"
        )
    model.load_state_dict(read_safetensors(place / WEIGHTS)[0])
    categories = path / "categories.json"
    if categories.exists():
        model.categories = json.loads(categories.read_text())
    return model.eval().to(device)
