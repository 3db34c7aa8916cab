"""A run is a directory: configuration, environment, metrics, checkpoints, predictions."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimdet import __version__, processes
from mimdet.config import Config, PretrainConfig, difference, load_config, save_config
from mimdet.files import read_json, write_file, write_json, write_text
from mimdet.models.checkpoint_files import read_checkpoint, read_safetensors, shipped
from mimdet.models.detector import Detector, build_detector
from mimdet.models.official import (
    describes_itself,
    detectron2_rules,
    from_detectron2,
    holds_detector,
    load_official,
    load_single_file,
)
from mimdet.models.weights import LoadReport, load_mae
from mimdet.training.checkpoints import WEIGHTS, CheckpointStore
from mimdet.training.signals import TrainingStopped
from mimdet.training.slots import load_slots, save_slots

LOCK = "lock"
"""File in the run's folder. The system drops the lock when its holder ends, however that ends."""
WAIT_SECONDS = 2.0
"""A process that only looks whether a run is in use holds the lock for a moment."""
LOOK_EVERY = 0.1

_held: set[int] = set()
"""Descriptors of the locks of this process."""


class RunInUse(ValueError):
    """Another process trains in this run."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that trains in a run; pid 0 and host "" where that cannot be read."""

    pid: int = 0
    host: str = ""

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine, which can be sent signals."""
        return self.pid > 0 and self.host == platform.node()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "another process"


@contextmanager
def alone_in(path: Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of the run directory `path`.

    Raises RunInUse, with what to do, when another process still holds it after `wait` seconds. On
    a file system without locks nothing is held and nothing is refused.
    """
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        end = time.monotonic() + wait
        while not _try_lock(descriptor):
            if time.monotonic() > end:
                raise RunInUse(
                    f"{_holder(path)} already trains in {path}: wait for it, stop it, or use "
                    "another run name"
                )
            time.sleep(LOOK_EVERY)
        _write(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}))
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def holder(path: str | Path) -> Holder | None:
    """Who trains in this run now; None when nobody does."""
    try:
        descriptor = os.open(Path(path) / LOCK, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        # Shared with others who only look.
        return None if _try_lock(descriptor, shared=True) else _holder(Path(path))
    finally:
        os.close(descriptor)


def started(pid: int) -> str:
    """What tells a process from a later one with the same number: when it started. "" = none runs.

    A process that has ended but was not waited for counts as none.
    """
    place = Path(f"/proc/{pid}/stat")
    if place.parent.parent.joinpath("self/stat").exists():
        try:  # 2 is the name, in brackets and with any character in it; 3 the state; 22 the start
            fields = place.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "" if fields[0] in "ZX" else f"{fields[19]} after boot {boot}"
    shown = subprocess.run(
        ["ps", "-o", "lstart=,stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    date, _, state = shown.rpartition(" ")
    return "" if state.startswith("Z") else date.strip()


def _holder(path: Path) -> Holder:
    with suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads((path / LOCK).read_text()))
    return Holder()


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text.encode())


def _try_lock(descriptor: int, shared: bool = False) -> bool:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the text, which others read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import errno
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def _let_go() -> None:
    """In a forked loader process: else it would keep the lock of a killed training for a while."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


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


STATUS = "status.json"
"""In the folder of a run: {"state": "training", "finished", "stopped" or "failed", "step", "total",
"error", "pid", "began": seconds since 1970}."""


def read_status(path: Path) -> dict[str, Any]:
    """The run's STATUS; empty before its first training."""
    try:
        found: dict[str, Any] = read_json(path / STATUS)
    except (FileNotFoundError, ValueError):
        return {}
    return found


@contextmanager
def noted(path: Path, total: int, step: Callable[[], int]) -> Iterator[None]:
    """Keep STATUS while the training inside goes on, and say how it ended.

    total: steps of the whole training; step: asks for the steps done. A process that is killed
    leaves "training" behind, in a run that nobody works on.
    """
    status = {"total": total, "pid": os.getpid(), "began": time.time()}

    def write(state: str, error: str = "") -> None:
        write_json(path / STATUS, {"state": state, "step": step(), "error": error, **status})

    write("training")
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, TrainingStopped):
        write("finished" if step() >= total else "stopped")
        raise
    except BaseException as error:
        write("failed", f"{type(error).__name__}: {error}")
        raise
    write("finished")
