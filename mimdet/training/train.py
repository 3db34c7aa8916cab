"""Train a detector: a generator that can be stopped and resumed at any step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimdet import processes
from mimdet.config import Config
from mimdet.data.coco import build_dataset
from mimdet.data.loader import Dataset
from mimdet.models.detector import Detector, build_detector
from mimdet.training.run import Run, load_detector
from mimdet.training.trainer import Step, Trainer, seed_all, use_threads


def train(
    cfg: Config,
    run: str | Path | Run,
    *,
    model: Detector | None = None,
    train_data: Dataset | None = None,
    val_data: Dataset | None = None,
) -> Iterator[Step]:
    """Train and yield after every step; `for step in train(cfg, "runs/x"): ...`.

    A run directory that already holds this configuration is resumed, bit for bit as if it had
    never stopped (on CPU). Ctrl-C and SIGTERM abandon the step in progress, save, and raise
    TrainingStopped; leaving the loop saves too. A model, for example with a sampler of your own,
    and data sets may be passed in; else they are built from `cfg`.
    """
    processes.join()
    seed_all(cfg.training.seed)
    use_threads(cfg.training.threads)
    data = train_data or build_dataset(cfg.data, "train", cfg.training.seed)
    if model is None:
        adapt_to_data(cfg, data)
        model = build_detector(cfg)
    if cfg.detector.num_classes != len(data.categories):
        raise ValueError(
            f"the detector has {cfg.detector.num_classes} classes, the data "
            f"{len(data.categories)}: set detector.num_classes={len(data.categories)}"
        )
    model.categories = list(data.categories)
    if not isinstance(run, Run):
        path = run  # the first process makes the directory, the others then find it
        run = processes.in_turn(lambda: Run(path, cfg))
    yield from Trainer(cfg, run, model, data, val_data).steps()


def fit(cfg: Config, name: str, *, runs: str | Path = "runs", **parts: Any) -> Detector:
    """Train to the end with a progress bar and return the detector, in evaluation mode."""
    from mimdet.training.progress import show_progress

    path = Path(runs) / name
    for _ in show_progress(train(cfg, path, **parts)):
        pass
    return load_detector(path, trust_code=True)


def adapt_to_data(cfg: Config, data: Dataset) -> None:
    """The class count, and whether there are masks to learn, follow from the data."""
    cfg.detector.num_classes = len(data.categories)
    if cfg.detector.masks and not data.has_masks:
        print("The data set has boxes but no masks: training without the mask head.")
        cfg.detector.masks = False
