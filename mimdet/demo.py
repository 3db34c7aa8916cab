"""`mimdet demo`: from nothing to a trained detector, its AP and its pictures, in minutes.

The demo types the commands a user would type: `mimdet train`, `mimdet evaluate`, with as many
threads as there are cores, up to four.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mimdet.config import Config, load_config
from mimdet.files import read_json
from mimdet.models.checkpoint_files import shipped
from mimdet.presets import tiny

RATIOS = ("0.25", "0.5", "1")
DRAWS = 2
SHIPPED_DETECTOR = "tiny"
"""Weights of a detector that was trained longer; see mimdet/pretrained/README.md."""
FINISHED_SCENES = 8
CURVE_POINTS = 2
"""Evaluations while training, for the curve of AP; the last one is also the table's ratio 1."""
TIMED_STEPS = 24
TIMED_SCENES = 32
STARTUP_SECONDS = 30
"""Starting twice, and drawing the figures."""
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
"""glibc keeps freed memory instead of asking the system for it again in every step: 3 to 8 % less
CPU time a step, a third fewer page faults. Other systems ignore it."""
MARGIN = 0.8
"""Steps and evaluations of a trained model cost more than those that were timed: its proposals
find more objects, so the mask head has more to do."""


def demo(minutes: float, run: str, level: str, steps: int, scenes: int, seed: int) -> None:
    """Train `tiny` on ShapesCOCO for about `minutes`, then evaluate it and draw what it sees."""
    start = time.perf_counter()
    path = Path(run or f"runs/demo-{minutes:g}min")
    if SHIPPED_DETECTOR in shipped():
        show_shipped(path.with_name(f"{path.name}-shipped"))
    if (path / "config.json").exists():
        check_same_demo(path, level, steps, scenes, seed)
        print(f"{path} exists: going on with it.")
        launch(["resume", str(path)])
    else:
        cfg = tiny()
        cfg.data.shapes_level, cfg.training.seed = level, seed
        cfg.training.threads, cfg.training.precision = threads(), precision()
        if not steps:
            print("Timing this machine ...", flush=True)
            steps = steps_that_fit(minutes * 60 - (time.perf_counter() - start), scenes, cfg)
        print(f"Training a MIMDet of 2 million parameters on {4 * steps:,} new scenes of {level}.")
        what = ["--shapes-level", level, "--seed", str(seed), "--shapes-val", str(scenes)]
        how = ["--threads", str(cfg.training.threads), "--precision", cfg.training.precision]
        every = max(1, -(-steps // CURVE_POINTS))
        length = ["--steps", str(steps), "--evaluate-every-steps", str(every)]
        launch(["train", "tiny", str(path), *what, *how, *length])
    print("\nAP x 100 on held-out scenes, by the share of tokens the encoder sees:")
    launch(["evaluate", str(path), "--ratios", *RATIOS, "--draws", str(DRAWS), "--reuse"])
    draw(path)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all.")


def check_same_demo(path: Path, level: str, steps: int, scenes: int, seed: int) -> None:
    """Raises ValueError where the run in `path` is a demo with other settings."""
    cfg = load_config(path / "config.json")
    asked = {"--level": level, "--seed": seed, "--scenes": scenes, "--steps": steps}
    found = {
        "--level": cfg.data.shapes_level,
        "--seed": cfg.training.seed,
        "--scenes": cfg.data.shapes_val,
        "--steps": cfg.training.steps if steps else 0,  # 0: as many as fitted
    }
    differ = [f"{name} {found[name]}" for name in asked if asked[name] != found[name]]
    if differ:
        raise ValueError(f"{path} holds a demo with {', '.join(differ)}: give another --run")


def show_shipped(folder: Path) -> None:
    """What a finished detector looks like: the one that comes with the package."""
    from mimdet.data.shapes import ShapesCOCO
    from mimdet.models.checkpoint_files import SHIPPED
    from mimdet.training.run import load_detector
    from mimdet.training.trainer import use_threads
    from mimdet.viz.style import save_figure

    use_threads(threads())
    model = load_detector(SHIPPED_DETECTOR)
    card = read_json(SHIPPED / "cards.json")[SHIPPED_DETECTOR]
    print(
        f"A finished detector comes with the package: box AP {card['box_ap']:.1f}, mask AP "
        f"{card['mask_ap']:.1f} on 200 held-out scenes of shapes-v1-medium (mimdet/pretrained)."
    )
    data = model.config.data
    scenes = ShapesCOCO(data.shapes_level, data.shapes_size, FINISHED_SCENES, "val")
    save_figure(detections_beside_truth(model, scenes), folder / "detections.png")
    print(f"figure: {folder / 'detections.png'}; now yours, from random weights:")


def steps_that_fit(seconds: float, scenes: int, cfg: Config) -> int:
    """Training steps that fit into the time, after a short throwaway training has been timed.

    Set aside are the evaluations while training and for the table, and the starts.
    """
    from mimdet.training.signals import TrainingStopped
    from mimdet.training.train import train

    begin = time.perf_counter()
    cfg.training.steps, cfg.data.shapes_val = TIMED_STEPS, TIMED_SCENES
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial"
        try:
            for _ in train(cfg, trial):
                pass
        except TrainingStopped:
            sys.exit("stopped before the training began; run the same command again")
        rows = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    times = [row["time"]["seconds"] for row in rows if "loss" in row]
    steady = times[len(times) // 3 :]  # the first ones pay for warming up
    per_scene = rows[-1]["time"]["seconds"] / TIMED_SCENES
    passes = CURVE_POINTS + DRAWS * (len(RATIOS) - 1)
    left = seconds - (time.perf_counter() - begin) - passes * scenes * per_scene - STARTUP_SECONDS
    return max(20, int(MARGIN * left / (sum(steady) / len(steady))))


def launch(words: list[str]) -> None:
    """Run a `mimdet` command in a process of its own."""
    print(f"$ mimdet {' '.join(words)}", flush=True)
    child = subprocess.Popen([sys.executable, "-m", "mimdet", *words], env=MEMORY | os.environ)
    try:
        child.wait()
    except KeyboardInterrupt:  # the child has received it too, and saves
        child.wait()
        sys.exit("stopped; run the same command again to go on")
    if child.returncode:
        sys.exit(f"mimdet {words[0]} failed with exit code {child.returncode}")


def threads() -> int:
    """Cores this process may use, at most 4: a model this small cannot fill more.

    On idle cores one process with two threads makes a step in 0.25 s where two processes that
    synchronise their norms need 0.34 s, and a single thread 0.34 s.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, cores or 1)


def precision() -> Literal["auto", "bf16"]:
    """bf16 where the CPU computes with it: a step then takes 17 % less time."""
    import torch

    known: Mapping[str, Any] = {}
    if hasattr(torch.cpu, "get_capabilities"):  # newer than the oldest PyTorch that is supported
        known = torch.cpu.get_capabilities()
    native = known.get("avx512_bf16") or known.get("amx_bf16")
    return "bf16" if native and not torch.cuda.is_available() else "auto"


def draw(path: Path) -> None:
    """Three figures in the run's directory: detections beside the truth, training, ratios."""
    from mimdet.config import load_config
    from mimdet.data.coco import build_dataset
    from mimdet.training.run import Run, load_detector
    from mimdet.training.trainer import use_threads
    from mimdet.viz.charts import show_ratios, show_training
    from mimdet.viz.style import save_figure

    use_threads(threads())
    cfg = load_config(path / "config.json")
    dataset = build_dataset(cfg.data, "val")
    ratios = json.loads((path / "evaluation.json").read_text())["ratios"]
    figures = {
        "detections": detections_beside_truth(load_detector(path), dataset),
        "training": show_training(Run(path, cfg).metrics()),
        "ratios": show_ratios(ratios),
    }
    for name, figure in figures.items():
        save_figure(figure, path / f"{name}.png")
        print(f"figure: {path / name}.png")


def detections_beside_truth(model: Any, dataset: Any) -> Any:
    """Figure of the first eight images."""
    from mimdet.inference import predict
    from mimdet.viz.figures import show_detections

    records = [dataset[i] for i in range(min(8, len(dataset)))]
    images, truth = [r.image for r in records], [r.target for r in records]
    return show_detections(images, predict(model, images), truth, dataset.categories)
