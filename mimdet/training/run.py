"""A run is the directory of one training:

    config.json       every number of the run; another configuration is refused here
    metrics.jsonl     a line a step (losses, gradient norm, rate, times), a line an evaluation
    checkpoints       weights and optimiser state of the last two steps saved, and of the best
    eval.json         metrics of the last evaluation, and what they belong to
    predictions.json  its detections in COCO's results format
    evaluation.json   metrics at several sample ratios, from `mimdet evaluate`
    categories.json   class names, so that the folder alone is enough to predict
    slots             code of parts that were written in a notebook
    environment.json  versions, machine, seed; hashes of data and weights; changes since
    log.txt           what a job printed that was started from a notebook
    job.json          its process, so that it can be found again
    status.json       which process trains, or how the last training ended
    lock              held while a process trains here: a second one is refused

A run of `mimdet pretrain` holds mae.safetensors and pictures of reconstructions besides.
"""

import copy
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from mimdet import processes
from mimdet.config import (
    RANDOM,
    Config,
    PretrainConfig,
    difference,
    flat,
    load_config,
    save_config,
    set_field,
)
from mimdet.console import Stopped
from mimdet.files import (
    PARTIAL,
    append_text,
    finite,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from mimdet.models.checkpoint_files import check_finite, find, shipped
from mimdet.models.detector import Detector, read_categories
from mimdet.models.official import detector_of, load_weights
from mimdet.training.checkpoints import (
    WEIGHTS,
    CheckpointStore,
    MetricsFile,
    has_checkpoint,
    weights_of,
)
from mimdet.training.owner import (
    LOCK,
    STATUS,
    RunInUse,
    alone_in,
    at_work,
    process_record,
    read_status,
)
from mimdet.training.slots import SlotText, check_slots, load_slots, write_slots

LOG = "log.txt"
"""In the folder of a run: what its jobs printed."""
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


class Run:
    """The directory of one training. Same configuration: resumed. Another one: an error, once
    a step is saved or while somebody works here; before that it takes the place of the first."""

    def __init__(
        self, path: str | Path, cfg: Config | PretrainConfig, *, locked: bool = False
    ) -> None:
        """locked: this process already holds the run's lock (`alone_in`) while it trains here."""
        self.path = Path(path)
        self.locked = locked
        self.cfg = cfg
        self.store = CheckpointStore(self.path / "checkpoints")
        self.rows = MetricsFile(self.path / "metrics.jsonl")
        self.began = 0.0
        """When the training of this process began, in seconds since 1970; 0 while it does not."""
        self._config = cfg
        """What config.json is to hold once this configuration is trained."""
        existing = self.path / "config.json"
        self._texts: dict[str, SlotText] = {}
        if existing.exists():
            stored = load_config(existing, type(cfg))
            try:
                self._config = accepted(stored, cfg, self.path)
            except ValueError:
                if processes.rank() == 0 and self._settled():
                    raise
            return
        self.path.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self.path.iterdir() if not PARTIAL.search(path.name)}
        if not names <= {ENVIRONMENT, LOCK, LOG}:  # which one that was killed here may have left
            raise ValueError(f"{self.path} is not empty and holds no run: use another run name")
        about = {"folder": str(Path.cwd()), "run": str(self.path.resolve())}
        write_json(self.path / ENVIRONMENT, about)
        save_config(cfg, existing)

    @contextmanager
    def in_training(self, total: int, done: Callable[[], int]) -> Iterator[None]:
        """Keep other trainings out of the run, and STATUS up to date, while one goes on inside.

        total: its steps; done: asks for those done. RunInUse, in every process, if one is in.
        """
        first = processes.rank() == 0
        with ExitStack() as stack:
            refused = ""
            if first and not self.locked:
                try:
                    stack.enter_context(alone_in(self.path))
                except RunInUse as error:
                    refused = str(error)
            refused = processes.from_first(refused)
            if refused:
                raise RunInUse(refused)
            if first:
                self.keep(self._texts)  # two that began at once: it is that of who trains
                remove_leftovers(self.path)
                stack.enter_context(self._reported(total, done))
            yield

    @contextmanager
    def _reported(self, total: int, done: Callable[[], int]) -> Iterator[None]:
        """Keep STATUS while a training goes on inside, and say how it ended.

        A process that is killed leaves "training" behind, in a run that nobody works on.
        """
        began = time.time()
        about = {"total": total, "began": began, "run": str(self.path.resolve())}
        about |= process_record(psutil.Process())

        def write(state: str, error: str = "") -> None:
            self.check_owner()
            write_json(self.path / STATUS, about | {"state": state, "step": done(), "error": error})

        write("training")
        self.began = began
        try:
            yield
        except BaseException as error:
            asked = isinstance(error, GeneratorExit | KeyboardInterrupt | TrainingStopped)
            with suppress(OSError, RunInUse):  # what went wrong first is what is told
                if asked:
                    write("finished" if done() >= total else "stopped")
                else:
                    write("failed", f"{type(error).__name__}: {error}")
            raise
        write("finished")

    def check_owner(self) -> None:
        """RunInUse where another training has begun here after that of this process."""
        if self.began and read_status(self.path)["began"] not in (self.began, 0.0):
            raise RunInUse(
                f"another training has begun in {self.path}: this one writes nothing more there"
            )

    def keep(self, texts: dict[str, SlotText]) -> None:
        """Keep the code of parts that were written in a notebook, or see that it is the same.

        And the changes of a configuration that do not hinder it from going on.
        """
        self._texts = texts
        if processes.rank() > 0:
            return
        try:
            check_slots(self.path, texts)
        except ValueError:
            if self._settled():
                raise
            self.store.forget_after(-1)
            write_slots(self.path, texts)
        stored = load_config(self.path / "config.json", type(self.cfg))
        changed = difference(stored, self._config)
        if changed:
            if not self._settled():
                self.store.forget_after(-1)
            about = read_environment(self.path)
            changes = about.get("changes", [])
            after = max(self.store.steps(), default=0)
            if after and any(line.startswith(MICRO) for line in changed):
                changed.append(DIFFERS)
            print(f"{self.path} goes on with {', '.join(changed)}")
            changes.append({"after": after, "changed": changed})
            write_json(self.path / ENVIRONMENT, about | {"changes": changes})
            save_config(self._config, self.path / "config.json")

    def _settled(self) -> bool:
        """Whether something would be lost, or somebody works here."""
        return at_work(self.path) or has_checkpoint(self.path, after=0)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        self.check_owner()
        append_text(self.rows.path, json.dumps(finite(row), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: one per step and one per evaluation."""
        return self.rows.read()

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations: {"step", "data", "evaluation", "time"}."""
        return [row for row in self.metrics() if "evaluation" in row]

    def forget_after(self, step: int) -> None:
        """Drop metrics and checkpoints of steps that will be done again."""
        kept = [json.dumps(row) for row in self.metrics() if row["step"] <= step]
        write_text(self.rows.path, "".join(line + "\n" for line in kept))
        self.store.forget_after(step)


def read_environment(path: Path) -> dict[str, Any]:
    """The run's ENVIRONMENT; empty before it was begun."""
    file = path / ENVIRONMENT
    found: Any = read_json(file) if file.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no record of a run: remove it")
    return found


def inputs_of(cfg: Config | PretrainConfig, path: Path, **inputs: Any) -> dict[str, Any]:
    """What a training begins with, as ENVIRONMENT records it: `inputs`, and a hash of its weights.

    The weights are hashed in the first process only. Weights that are not there have no hash: a run
    that has begun does not need them any more. ValueError where the run `path` has a checkpoint and
    began with others. Where there is a hash it alone counts, so that a file may be moved.
    """
    source, inputs["weights"] = cfg.training.init_from, ""
    if source not in ("", RANDOM) and processes.rank() == 0:
        with suppress(FileNotFoundError), find(weights_of(source)).open("rb") as file:
            inputs["weights"] = f"{source} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    known = read_environment(path) if has_checkpoint(path) else {}
    bare = {name: str(now).rpartition("sha256:")[2] for name, now in inputs.items() if now}
    changed = [n for n in bare if n in known and str(known[n]).rpartition("sha256:")[2] != bare[n]]
    if changed:
        lines = [f"{INPUTS[name]}: {known[name]} -> {inputs[name]}" for name in changed]
        raise ValueError(
            f"{path} began with other inputs than there are now:\n  "
            + "\n  ".join(lines)
            + "\nPut the old ones back to go on, or train the new ones under another run name."
        )
    return inputs


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
    free: tuple[str, ...] = FREE if has_checkpoint(path) else FREE + FROM_DATA
    free += MICRO if stored.training.step_images == cfg.training.step_images else ()
    for name in [name for name in old if old[name] != new[name] and name not in free]:
        if name in PATHS and old[name] and Path(new[name]).exists():
            target = path_of(old[name], path)
            if target.resolve() == Path(new[name]).resolve():
                set_field(kept, name, old[name])
                continue
            if not target.exists():
                continue  # it was moved; `inputs_of` sees whether it is the same
        refused.append(f"{name}: {old[name]} -> {new[name]}")
    if refused:
        raise ValueError(
            f"{path} holds a run with another configuration:\n  "
            + "\n  ".join(refused)
            + "\nUse another run name, or the old values to resume it. A finished run is trained "
            f"further by `mimdet resume {path} --steps N`."
        )
    return kept


class TrainingStopped(Stopped):
    """Raised after the checkpoint is written; the same call resumes."""

    def __init__(self, step: int, run: Path, signal_number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}: step {step} is saved in {run}; "
            "run the same command again to resume"
        )
        self.signal_number = signal_number


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
        if checkpoint != "last":
            raise ValueError(f"{source} is a file of weights, without checkpoint {checkpoint!r}")
        return load_weights(source, cfg).to(device)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} is neither a run (there is no config.json in it) nor a weights file"
        )
    if cfg is not None:
        raise ValueError(f"{path} is a run and has its own configuration: leave cfg out")
    own = stored_config(path)
    if not isinstance(own, Config):
        raise ValueError(f"{path} is a run of an autoencoder: mimdet.load_mae_model reads it")
    slots = load_slots(path, own, trust_code)
    slots.pop("dataset", None)
    store = CheckpointStore(path / "checkpoints")
    place = store.find(checkpoint)
    if place is None:
        raise FileNotFoundError(
            f"{path} has no checkpoint {checkpoint!r}; it has steps {store.steps()}, "
            "and the names 'last' and (after an evaluation) 'best'"
        )
    steps = store.steps((WEIGHTS,))
    file = store.newest(store.weights, steps) if checkpoint == "last" else store.weights(place)
    assert file is not None  # `find` has found one
    check_finite(file.tensors, file.name)
    categories = read_categories((path / "categories.json").read_bytes())
    model = detector_of(file, own, categories, **slots)
    model.step = int(Path(file.name).parent.name)
    return model.to(device)
