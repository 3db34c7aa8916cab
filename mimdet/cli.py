"""The `mimdet` command. Every field of the configuration is a flag of the same name.

Each command is a dataclass whose fields become its options; what it does stands in `run_*` below.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from mimdet import __version__
from mimdet.config import Config

USAGE = f"""mimdet {__version__}: a ViT detector that trains on a sample of an image's tokens

  mimdet demo                        train a small MIMDet on drawn scenes and look at it (minutes)
  mimdet check-data ANNOTATIONS IMAGES        what is wrong with a COCO-format data set, and where
  mimdet train PRESET RUN                     train, or resume; presets: {{presets}}
  mimdet evaluate RUN --ratios 0.25 0.5 1     COCO metrics at any sample ratios
  mimdet predict RUN IMAGE...                 detections as json and pictures

`mimdet COMMAND --help` explains every option."""


@dataclass
class Train:
    """Train a detector; the same command resumes an interrupted run exactly.

    Ctrl-C or SIGTERM saves and exits. Progress goes to the screen, every number to
    RUN/metrics.jsonl, weights to RUN/checkpoints.
    """

    run: Positional[str]
    """Directory of the run, for example runs/nuclei."""
    config: Config = field(default_factory=Config)


@dataclass
class Evaluate:
    """COCO box and mask metrics of a trained run, at any list of sample ratios.

    Below ratio 1 the tokens are drawn at random, so the mean and the standard deviation over
    --draws samplings are given. Writes RUN/evaluation.json and, at the last ratio,
    RUN/predictions.json in COCO results format.
    """

    run: Positional[str]
    """Directory of the run."""
    ratios: tuple[float, ...] = (1.0,)
    """Shares of the tokens the encoder sees, for example 0.25 0.5 1."""
    draws: int = 2
    """Samplings per ratio below 1."""
    checkpoint: str = "last"
    """`last`, `best` or a step number."""
    limit: int = 0
    """Evaluate the first N images only; 0 = all."""
    val_json: str = ""
    """Another annotation file than the run's own."""
    val_images: str = ""
    """Its image folder."""
    batch_size: int = 4
    device: str = "auto"
    trust_code: bool = False
    """Execute a sampler or stem that was written in a notebook and is stored in the run."""


@dataclass
class Predict:
    """Detect objects in image files; writes one json and one picture per image."""

    run: Positional[str]
    """Directory of the run."""
    images: Positional[tuple[str, ...]]
    """Image files."""
    out: str = "predictions"
    """Folder for the results."""
    sample_ratio: float = 1.0
    """Share of the tokens the encoder sees."""
    score: float = 0.3
    """Draw detections with at least this score (the json holds all)."""
    checkpoint: str = "last"
    device: str = "auto"
    seed: int = 0
    trust_code: bool = False
    """Execute a sampler or stem that was written in a notebook and is stored in the run."""


@dataclass
class CheckData:
    """Say what is wrong with a COCO-format data set, and where. Exit code 1 if anything is."""

    annotations: Positional[str]
    """The json file."""
    images: Positional[str]
    """The image folder."""
    examples: int = 3
    """Examples shown of each kind of problem."""
    quick: bool = False
    """Read only the headers of the image files."""
    json: str = ""
    """Write the whole report to this file."""


@dataclass
class Demo:
    """Train a small MIMDet on ShapesCOCO, read its AP at three sample ratios, look at detections.

    Everything is drawn and trained on this machine; nothing is downloaded. Run it again to resume
    an interrupted demo, or with other --minutes to train longer.
    """

    minutes: float = 6.0
    """Time for everything, from drawing scenes to figures, on an idle machine."""
    run: str = ""
    """Directory of the run; default runs/demo-<minutes>min."""
    level: str = "shapes-v1-medium"
    """shapes-v1-easy, shapes-v1-medium or shapes-v1-hard."""
    steps: int = 0
    """Train exactly this many steps instead of measuring what fits into the time."""
    scenes: int = 200
    """Held-out scenes to evaluate on."""
    seed: int = 0
    processes: int = 0
    """Processes that share the work; 0 = two on a CPU with two cores or more, one on a GPU."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `mimdet` command."""
    words = sys.argv[1:] if arguments is None else arguments
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help", "help"):
        from mimdet.presets import PRESETS

        print(USAGE.format(presets=", ".join(PRESETS)))
        return
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        sys.exit(f"mimdet has no command {name!r}; it has {', '.join(COMMANDS)}")
    try:
        COMMANDS[name](rest)
    except (ValueError, FileNotFoundError, PermissionError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def run_train(words: list[str]) -> None:
    from mimdet.presets import PRESETS

    choices = {
        name: (inspect.getdoc(preset) or "", Train(run=tyro.MISSING, config=preset()))
        for name, preset in PRESETS.items()
    }
    command: Train = tyro.extras.overridable_config_cli(
        choices,
        args=words,
        prog="mimdet train",
        description=inspect.getdoc(Train),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    from mimdet import processes
    from mimdet.training.progress import show_progress
    from mimdet.training.signals import TrainingStopped
    from mimdet.training.train import train

    steps = train(command.config, command.run)
    try:
        for _ in show_progress(steps) if processes.first_of_torchrun() else steps:
            pass
    except TrainingStopped as stopped:
        if processes.first_of_torchrun():
            print(stopped)
        sys.exit(128 + stopped.signal_number)
    finally:
        processes.leave()
    if processes.first_of_torchrun():
        print(f"done: {command.run}; next: mimdet evaluate {command.run} --ratios 0.25 0.5 1")


def run_evaluate(words: list[str]) -> None:
    command = _parse(Evaluate, words, "evaluate")
    from mimdet import processes
    from mimdet.analysis.evaluate import evaluate_ratios, ratio_table
    from mimdet.data.coco import build_dataset
    from mimdet.files import write_json
    from mimdet.training.run import load_detector
    from mimdet.training.trainer import pick_device, use_threads

    processes.join()
    device = str(pick_device(command.device))
    model = load_detector(
        command.run, checkpoint=command.checkpoint, trust_code=command.trust_code, device=device
    )
    use_threads(model.config.training.threads)
    data = model.config.data
    data.limit_val = command.limit or data.limit_val
    data.val_json = command.val_json or data.val_json
    data.val_images = command.val_images or data.val_images
    dataset = build_dataset(data, "val", model.config.training.seed)
    rows = evaluate_ratios(
        model,
        dataset,
        command.ratios,
        command.draws,
        batch_size=command.batch_size,
        progress=True,
        save_to=Path(command.run) / "predictions.json",
    )
    if processes.first_of_torchrun():
        print(ratio_table(rows))
        place = Path(command.run) / "evaluation.json"
        write_json(place, {"data": dataset.version, "ratios": rows})
    processes.leave()


def run_predict(words: list[str]) -> None:
    command = _parse(Predict, words, "predict")
    from mimdet.analysis.results import results_for, save_results
    from mimdet.data.images import read_image
    from mimdet.predict import predict
    from mimdet.training.run import load_detector
    from mimdet.training.trainer import pick_device, use_threads
    from mimdet.viz.figures import save_figure, show_detections

    device = str(pick_device(command.device))
    model = load_detector(
        command.run, checkpoint=command.checkpoint, trust_code=command.trust_code, device=device
    )
    use_threads(model.config.training.threads)
    names, ids = model.categories, list(range(1, len(model.categories) + 1))
    masks = model.roi_heads.mask_head is not None
    for path in map(Path, command.images):
        image = read_image(path)
        found = predict(model, image, sample_ratio=command.sample_ratio, seed=command.seed)
        results = results_for(found, path.name, ids, masks)
        for result in results:
            result["category"] = names[result["category_id"] - 1]
        place = Path(command.out) / path.stem
        place.parent.mkdir(parents=True, exist_ok=True)
        save_results(results, place.with_suffix(".json"))
        figure = show_detections([image], [found], None, names, command.score, columns=1)
        save_figure(figure, place.with_suffix(".png"))
        shown = int((found.scores >= command.score).sum())
        print(f"{path}: {shown} objects with score >= {command.score} -> {place}.json, .png")


def run_check_data(words: list[str]) -> None:
    command = _parse(CheckData, words, "check-data")
    from mimdet.data.checks import check_dataset
    from mimdet.files import write_json

    report = check_dataset(
        command.annotations, command.images, decode=not command.quick, progress=True
    )
    print(report.table(command.examples))
    if command.json:
        write_json(command.json, report.to_dict())
    if not report.ok:
        sys.exit(1)


def run_demo(words: list[str]) -> None:
    command = _parse(Demo, words, "demo")
    from mimdet.demo import demo

    demo(**vars(command))


def _parse(kind: type, words: list[str], name: str) -> Any:
    """A command's dataclass filled from the words."""
    return tyro.cli(kind, args=words, prog=f"mimdet {name}", description=inspect.getdoc(kind))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": run_demo,
    "train": run_train,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "check-data": run_check_data,
}
