"""`mimdet demo`: from nothing to a trained detector, its AP and its pictures, in minutes.

The demo types the commands a user would type: `mimdet train`, `mimdet evaluate`, with as many
threads as there are cores, up to four.
"""

import copy
import os
import sys
import time
from pathlib import Path
from typing import Any

from mimdet.config import Config, change, flat, load_config
from mimdet.console import Stopped
from mimdet.files import SHIPPED, read_json
from mimdet.presets import tiny

RATIOS = ("0.25", "0.5", "1")
DRAWS = 2
CURVE_POINTS = 2
"""Evaluations while training, for the curve of AP; the last one is also the table's ratio 1."""
TIMED_STEPS = 24
TIMED_SCENES = 32
WHOLE_AT_END = 0.15
"""Share of the steps with all tokens: trained with half throughout, the detector of the package had
57.8 box AP with half and 53.7 with all; then 600 steps with all made that 59.3."""
STARTUP_SECONDS = 30
"""Starting twice, and drawing the figures."""
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
"""glibc keeps freed memory instead of asking the system for it again in every step: 3 to 8 % less
CPU time a step, a third fewer page faults. Other systems ignore it."""
MARGIN = 0.9
"""Steps and evaluations of a trained model cost more than those that were timed: its proposals
find more objects, so the mask head has more to do."""


def demo(
    minutes: float = 6.0,
    run: str = "",
    level: str = "shapes-v1-medium",
    steps: int = 0,
    scenes: int = 200,
    seed: int = 0,
    init_from: str = "random",
) -> None:
    """Train a small MIMDet on drawn scenes; its AP at three sample ratios, its detections.

    Everything is drawn and trained on this machine; nothing is downloaded. Run it again to resume
    an interrupted demo, or with other --minutes to train longer.

    Args:
        minutes: Time for everything, from drawing scenes to figures, on an idle machine.
        run: Directory of the run; default runs/demo-<minutes>min.
        level: shapes-v1-easy, -medium or -hard; shapes-v2-medium (larger objects, 256 pixels) or
            shapes-v2-context (classes that something far away tells).
        steps: Train exactly this many steps instead of measuring what fits into the time.
        scenes: Held-out scenes to evaluate on.
        seed: Of the scenes and of the first weights.
        init_from: Weights to start from: `random`, or `tiny_mae`, the autoencoder that comes with
            the package.
    """
    from mimdet.training.run import Run

    start = time.perf_counter()
    path = Path(run or f"runs/demo-{minutes:g}min")
    show_shipped(path.with_name(f"{path.name}-shipped"))
    begun = (path / "config.json").exists()
    cfg = load_config(path / "config.json") if begun else tiny()
    change(cfg.data, shapes_level=level, shapes_val=scenes)
    cfg.training.seed, cfg.training.steps = seed, steps or cfg.training.steps
    if begun:
        Run(path, cfg).keep({})  # refuses other settings, once there is a checkpoint
        print(f"{path} exists: going on with it.")
        launch(["resume", str(path)])
    else:
        suit_machine(cfg)
        cfg.training.init_from = init_from
        cfg.training.whole_at_end = WHOLE_AT_END
        cfg.data.shapes_size = 0  # the level's own
        if not steps:
            print("Timing this machine ...", flush=True)
            steps = steps_that_fit(minutes * 60 - (time.perf_counter() - start), cfg)
        change(cfg.training, steps=steps, evaluate_every_steps=max(1, -(-steps // CURVE_POINTS)))
        print(f"Training a MIMDet of 2 million parameters on {4 * steps:,} new scenes of {level}.")
        launch(["train", "tiny", str(path), *options(cfg)])
    print("\nAP x 100 on held-out scenes, by the share of tokens the encoder sees:")
    launch(["evaluate", str(path), "--ratios", *RATIOS, "--draws", str(DRAWS), "--reuse"])
    draw(path)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all.")


def options(cfg: Config) -> list[str]:
    """What the command line needs to make `cfg` out of `tiny`."""
    plain = flat(tiny())
    changed = {name: value for name, value in flat(cfg).items() if value != plain[name]}
    return [f"--{n.rpartition('.')[2].replace('_', '-')}={v}" for n, v in changed.items()]


def show_shipped(folder: Path) -> None:
    """What finished detectors look like: two of those that come with the package."""
    from mimdet.data.coco import build_dataset
    from mimdet.training.run import load_detector

    print("Finished detectors come with the package (mimdet/pretrained):")
    cards = read_json(SHIPPED / "cards.json")
    for name in ("tiny", "nuclei"):
        model = load_detector(name)
        held_out = build_dataset(model.config.data, "val")
        scores = f"box AP {cards[name]['box_ap']:.1f}, mask AP {cards[name]['mask_ap']:.1f}"
        print(f"{name}: {scores} on {len(held_out)} held-out images")
        save_pictures(folder, **{name: detections_beside_truth(model, held_out)})
    print("Now yours:")


def steps_that_fit(seconds: float, cfg: Config) -> int:
    """Training steps that fit into the time, after a short throwaway training has been timed.

    Set aside are the evaluations while training and for the table, and the starts.
    """
    from tempfile import TemporaryDirectory

    from mimdet.training.run import Run, TrainingStopped
    from mimdet.training.train import train

    begin, scenes, cfg = time.perf_counter(), cfg.data.shapes_val, copy.deepcopy(cfg)
    cfg.training.steps, cfg.data.shapes_val = TIMED_STEPS, TIMED_SCENES
    cfg.training.init_from = ""  # takes no longer, and prints less
    with TemporaryDirectory() as folder:
        trial = Path(folder) / "trial"
        try:
            times = [step.seconds for step in train(cfg, trial)]
        except TrainingStopped:
            raise Stopped("stopped before the training began; run the same command again") from None
        evaluation = Run(trial, cfg).metrics()[-1]
    steady = times[len(times) // 3 :]  # the first ones pay for warming up
    per_scene = evaluation["time"]["seconds"] / TIMED_SCENES
    passes = CURVE_POINTS + DRAWS * (len(RATIOS) - 1)
    left = seconds - (time.perf_counter() - begin) - passes * scenes * per_scene - STARTUP_SECONDS
    return max(20, int(MARGIN * left / (sum(steady) / len(steady))))


def launch(words: list[str]) -> None:
    """Run a `mimdet` command in a process of its own."""
    import subprocess

    print(f"$ mimdet {' '.join(words)}", flush=True)
    child = subprocess.Popen([sys.executable, "-m", "mimdet", *words], env=MEMORY | os.environ)
    try:
        child.wait()
    except KeyboardInterrupt:  # the child has received it too, and saves
        child.wait()
        raise Stopped("stopped; run the same command again to go on") from None
    if child.returncode:
        sys.exit(child.returncode)  # it has said why


def suit_machine(cfg: Config) -> None:
    """Threads, at most 4, and bf16 where the CPU computes with it: a step takes 17 % less time.

    A model this small cannot fill more: on idle cores (Intel Xeon) two threads make a step in
    0.31 s and a single one in 0.41 s.
    """
    from mimdet.processes import fast_precision, usable_cores

    cfg.training.threads = min(4, usable_cores())
    cfg.training.precision = fast_precision()


def draw(path: Path) -> None:
    """Three figures in the run's directory: detections beside the truth, training, ratios."""
    from mimdet.data.coco import build_dataset
    from mimdet.training.run import Run, load_detector
    from mimdet.viz import show_ratios, show_training

    cfg = load_config(path / "config.json")
    dataset = build_dataset(cfg.data, "val")
    save_pictures(
        path,
        detections=detections_beside_truth(load_detector(path), dataset),
        training=show_training(Run(path, cfg).metrics()),
        ratios=show_ratios(read_json(path / "evaluation.json")["ratios"]),
    )


def save_pictures(folder: Path, **figures: Any) -> None:
    """Write `folder`/NAME.png of each, and say so."""
    from mimdet.viz import save_figure

    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
        print(f"figure: {folder / name}.png")


def detections_beside_truth(model: Any, dataset: Any) -> Any:
    """Figure of the first eight images."""
    from mimdet.inference import predict
    from mimdet.viz import show_detections

    records = [dataset[i] for i in range(min(8, len(dataset)))]
    images, truth = [r.image for r in records], [r.target for r in records]
    return show_detections(images, predict(model, images), truth, dataset.categories)
