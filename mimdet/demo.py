"""`mimdet demo`: from nothing to a trained detector, its AP and its pictures, in minutes."""

import copy
import dataclasses
import tempfile
import time
from pathlib import Path

from mimdet.analysis.evaluate import evaluate, evaluate_ratios, ratio_table
from mimdet.config import Config, load_config
from mimdet.data.coco import build_dataset
from mimdet.files import write_json
from mimdet.models.detector import build_detector
from mimdet.predict import predict
from mimdet.presets import tiny
from mimdet.training.progress import show_progress
from mimdet.training.run import Run, load_detector
from mimdet.training.train import train
from mimdet.training.trainer import Trainer
from mimdet.viz.figures import save_figure, show_detections, show_ratios, show_training

RATIOS = (0.25, 0.5, 1.0)
DRAWS = 2
CURVE_POINTS = 3
"""Evaluations while training, for the curve of AP; the last one is at the end."""
TIMED_STEPS = 12
TIMED_SCENES = 16
STARTUP_SECONDS = 15
"""Imports, opening data, and drawing the figures."""


def demo(
    minutes: float, run: str = "", level: str = "shapes-v1-medium", steps: int = 0, seed: int = 0
) -> None:
    """Train `tiny` on ShapesCOCO for about `minutes`, then evaluate it and draw what it sees."""
    start = time.perf_counter()
    path = Path(run or f"runs/demo-{minutes:g}min")
    cfg = demo_config(path, minutes, level, steps, seed)
    print(f"Training a MIMDet of 2 million parameters on drawn scenes ({level}), in {path}:")
    print(f"{cfg.training.steps} steps of {cfg.training.batch_size} new scenes; Ctrl-C saves.")
    for _ in show_progress(train(cfg, path)):
        pass
    report(path)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all.")


def demo_config(path: Path, minutes: float, level: str, steps: int, seed: int) -> Config:
    """The configuration of an existing demo, or a new one whose steps fit into the time."""
    if (path / "config.json").exists():
        print(f"{path} exists: resuming it with its own configuration.")
        return load_config(path / "config.json")
    cfg = tiny()
    cfg.data.shapes_level = level
    cfg.training.seed = seed
    cfg.training.steps = steps or steps_that_fit(cfg, minutes * 60)
    cfg.training.evaluate_every_steps = max(1, cfg.training.steps // CURVE_POINTS)
    return cfg


def steps_that_fit(cfg: Config, seconds: float) -> int:
    """Training steps that fit into the time, after a short throwaway training has been timed.

    Set aside are the evaluations: three while training, the ratio table, and the pictures.
    """
    print("Timing this machine for a few seconds ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        trial = copy.deepcopy(cfg)
        trial.training.steps = TIMED_STEPS
        data = build_dataset(cfg.data, "train", seed=cfg.training.seed)
        run = Run(Path(folder) / "trial", trial)
        model = build_detector(trial)
        trainer = Trainer(trial, run, model, data, None)
        batches = iter(trainer.loader.batches(0, TIMED_STEPS))
        times = [trainer.one_step(batches).seconds for _ in range(TIMED_STEPS)]
        few = dataclasses.replace(cfg.data, shapes_val=TIMED_SCENES)
        pass_seconds = evaluate(model, build_dataset(few, "val")).seconds
    per_step = sum(times[2:]) / len(times[2:])  # the first ones pay for warming up
    passes = CURVE_POINTS + 1 + DRAWS * (len(RATIOS) - 1)
    evaluations = passes * pass_seconds * cfg.data.shapes_val / TIMED_SCENES
    return max(20, int((seconds - evaluations - STARTUP_SECONDS) / per_step))


def report(path: Path) -> None:
    """AP at each sample ratio, and three figures, in the run's directory."""
    model = load_detector(path)
    dataset = build_dataset(model.config.data, "val")
    print(f"AP x 100 on {len(dataset)} held-out scenes of {dataset.version}, by sample ratio:")
    rows = evaluate_ratios(model, dataset, RATIOS, DRAWS, save_to=path / "predictions.json")
    write_json(path / "evaluation.json", {"data": dataset.version, "ratios": rows})
    print(ratio_table(rows))
    scenes = [dataset[i] for i in range(8)]
    found = predict(model, [scene.image for scene in scenes])
    figures = {
        "detections": show_detections(
            [s.image for s in scenes], found, [s.target for s in scenes], dataset.categories
        ),
        "training": show_training(Run(path, model.config).metrics()),
        "ratios": show_ratios(rows),
    }
    for name, figure in figures.items():
        save_figure(figure, path / f"{name}.png")
        print(f"figure: {path / name}.png")
