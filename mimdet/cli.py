"""The `mimdet` command. Every field of the configuration is a flag of the same name.

What a command does stands in `run_*` below, its options in options.py.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mimdet import __version__
from mimdet.options import (
    Ablate,
    CheckData,
    CostTable,
    Demo,
    Download,
    Errors,
    Evaluate,
    Export,
    Predict,
    Pretrain,
    Resume,
    Train,
    parse,
    parse_preset,
)

USAGE = f"""mimdet {__version__}: a ViT detector that trains on a sample of an image's tokens

  mimdet demo                        train a small MIMDet on drawn scenes and look at it (minutes)
  mimdet check-data ANNOTATIONS IMAGES        what is wrong with a COCO-format data set, and where
  mimdet download [NAME...]                   list public weights and COCO, or fetch them
  mimdet train PRESET RUN                     train, or resume; presets: {{presets}}
  mimdet resume RUN                           go on with a run as its folder says
  mimdet pretrain PRESET RUN                  a masked autoencoder; presets: {{pretrain_presets}}
  mimdet evaluate RUN --ratios 0.25 0.5 1     COCO metrics at any sample ratios
  mimdet predict RUN IMAGE...                 detections as json and pictures
  mimdet errors RUN                           why AP is lost, in numbers and pictures
  mimdet ablate GRID.py                       a grid of trainings with seeds -> a table
  mimdet cost [PRESET...]                     parameters and multiply-adds
  mimdet export RUN FILE                      one file: .safetensors for us, .pth for detectron2

`mimdet COMMAND --help` explains every option."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `mimdet` command."""
    words = sys.argv[1:] if arguments is None else arguments
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help", "help"):
        from mimdet.presets import PRESETS, PRETRAIN_PRESETS

        presets, more = ", ".join(PRESETS), ", ".join(PRETRAIN_PRESETS)
        print(USAGE.format(presets=presets, pretrain_presets=more))
        return
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        sys.exit(f"mimdet has no command {name!r}; it has {', '.join(COMMANDS)}")
    from mimdet.processes import ProcessLost

    files = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    mistakes = (ValueError, *files, FloatingPointError, ProcessLost)
    try:
        COMMANDS[name](rest)
    except mistakes as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def run_train(words: list[str]) -> None:
    from mimdet.presets import PRESETS

    command = parse_preset(Train, PRESETS, words, "train")
    from mimdet.training.train import train

    _follow(train(command.config, command.run))
    _say(f"done: {command.run}; next: mimdet evaluate {command.run} --ratios 0.25 0.5 1")


def run_pretrain(words: list[str]) -> None:
    from mimdet.presets import PRETRAIN_PRESETS

    command = parse_preset(Pretrain, PRETRAIN_PRESETS, words, "pretrain")
    from mimdet.training.pretrain import pretrain

    _follow(pretrain(command.config, command.run))
    _say(f"done: {command.run}; next: mimdet train PRESET RUN --init-from {command.run}")


def run_resume(words: list[str]) -> None:
    command = parse(Resume, words, "resume")
    from mimdet.training.train import resume

    # A log is read by people: a line of progress now and then.
    _follow(resume(command.run, trust_code=command.trust_code), 1 if sys.stdout.isatty() else 20)
    _say(f"done: {command.run}")


def _follow(steps: Iterator[Any], every: float = 1) -> None:
    """Run a training to its end with a progress bar, in the first process; every: seconds."""
    from mimdet import processes
    from mimdet.training.signals import TrainingStopped
    from mimdet.training.trainer import show_progress

    try:
        for _ in show_progress(steps, every) if processes.first_of_torchrun() else steps:
            pass
    except TrainingStopped as stopped:
        _say(str(stopped))
        sys.exit(128 + stopped.signal_number)
    finally:
        processes.leave()


def _say(text: str) -> None:
    """Print, once for all processes."""
    from mimdet import processes

    if processes.first_of_torchrun():
        print(text)


def run_evaluate(words: list[str]) -> None:
    command = parse(Evaluate, words, "evaluate")
    from mimdet import processes
    from mimdet.analysis.evaluate import evaluate_ratios, ratio_table
    from mimdet.data.coco import build_dataset
    from mimdet.files import write_json
    from mimdet.training.run import load_detector
    from mimdet.training.train import rows_from_training
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
    if command.val_json or command.val_images:
        data.source = "coco"
    run = Path(command.run)
    out = command.folder()
    dataset = build_dataset(data, "val", model.config.training.seed)
    own_data = not (command.limit or command.val_json or command.val_images)
    reuse = command.reuse and own_data and out == run and command.checkpoint == "last"
    rows = evaluate_ratios(
        model,
        dataset,
        command.ratios,
        command.draws,
        batch_size=command.batch_size,
        progress=True,
        save_to=out / "predictions.json",
        known=rows_from_training(run, dataset.version) if reuse else (),
    )
    if processes.first_of_torchrun():
        print(ratio_table(rows))
        if out != run:
            print(f"in {out}: evaluation.json, predictions.json")
        write_json(out / "evaluation.json", {"data": dataset.version, "ratios": rows})
    processes.leave()


def run_predict(words: list[str]) -> None:
    command = parse(Predict, words, "predict")
    from mimdet.analysis.evaluate import results_for, save_results
    from mimdet.images import read_image
    from mimdet.inference import predict
    from mimdet.training.run import load_detector
    from mimdet.training.trainer import pick_device, use_threads
    from mimdet.viz.figures import show_detections
    from mimdet.viz.style import save_figure

    device = str(pick_device(command.device))
    model = load_detector(
        command.run, checkpoint=command.checkpoint, trust_code=command.trust_code, device=device
    )
    use_threads(model.config.training.threads)
    names, ids = model.categories, list(range(1, len(model.categories) + 1))
    masks = model.roi_heads.mask_head is not None
    for path, place in command.places().items():
        image = read_image(path)
        found = predict(model, image, sample_ratio=command.sample_ratio, seed=command.seed)
        results = results_for(found, path.name, ids, masks)
        for result in results:
            result["category"] = names[result["category_id"] - 1]
        place.parent.mkdir(parents=True, exist_ok=True)
        save_results(results, place.with_name(f"{place.name}.json"))
        figure = show_detections([image], [found], None, names, command.score, columns=1)
        save_figure(figure, place.with_name(f"{place.name}.png"))
        shown = int((found.scores >= command.score).sum())
        print(f"{path}: {shown} objects with score >= {command.score} -> {place}.json, .png")


def run_export(words: list[str]) -> None:
    command = parse(Export, words, "export")
    from mimdet.models.official import export_detectron2, save_detector
    from mimdet.training.run import load_detector

    suffix = Path(command.file).suffix
    if suffix not in (".safetensors", ".pth", ".pkl"):
        raise ValueError(
            f"{command.file}: name it .safetensors (one file that describes itself), or .pth or "
            ".pkl (the original's layout)"
        )
    if command.half and suffix != ".safetensors":
        raise ValueError(f"{command.file}: --half is for .safetensors files only")
    model = load_detector(command.run, checkpoint=command.checkpoint)
    if suffix == ".safetensors":
        save_detector(model, command.file, half=command.half)
        print(f"{command.file}: for mimdet.load_detector, with configuration and class names")
    else:
        export_detectron2(model, command.file)
        print(f"{command.file}: {len(model.state_dict())} tensors under detectron2's names")


def run_errors(words: list[str]) -> None:
    command = parse(Errors, words, "errors")
    from mimdet.analysis.comparison import compare_runs
    from mimdet.analysis.errors import find_errors
    from mimdet.analysis.metrics import IouType
    from mimdet.config import load_config
    from mimdet.data.coco import build_dataset
    from mimdet.files import read_json, write_json
    from mimdet.viz.errors import show_comparison, show_errors, show_precision_recall
    from mimdet.viz.style import save_figure

    run, out = Path(command.run), Path(command.out or command.run)
    for folder in filter(None, (command.run, command.against)):
        if not (Path(folder) / "predictions.json").exists():
            raise FileNotFoundError(f"{folder} has no predictions.json: `mimdet evaluate` makes it")
    cfg = load_config(run / "config.json")
    dataset = build_dataset(cfg.data, "val", cfg.training.seed)
    truth, found = dataset.ground_truth(), read_json(run / "predictions.json")
    scale = getattr(dataset, "area_scale", 1.0)
    kinds: dict[str, IouType] = {"box": "bbox"}
    if cfg.detector.masks and dataset.has_masks:
        kinds["mask"] = "segm"
    reports = {
        name: find_errors(truth, found, kind, area_scale=scale) for name, kind in kinds.items()
    }
    for name, report in reports.items():
        print(f"{name}\n{report.table()}\n")
    figures = {"errors": show_errors(reports)}
    for name, report in reports.items():
        figures[f"curves_{name}"] = show_precision_recall(report.curves((0.5, 0.75, 0.9)))
    if command.against:
        other = read_json(Path(command.against) / "predictions.json")
        runs = {command.against: other, command.run: found}
        figures["comparison"] = show_comparison(compare_runs(truth, runs))
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
        print(f"figure: {out / name}.png")
    write_json(out / "errors.json", {name: r.to_dict() for name, r in reports.items()})


def run_ablate(words: list[str]) -> None:
    command = parse(Ablate, words, "ablate")
    from mimdet.experiments.experiment import ablate
    from mimdet.experiments.runs import ExperimentStopped

    options = vars(command)
    try:
        result = ablate(options.pop("file"), **options)
    except ExperimentStopped as stopped:
        print(stopped)
        sys.exit(130)
    except RuntimeError as failed:  # every run failed, and why stands in the message
        sys.exit(f"error: {failed}")
    if result is not None:
        from mimdet.viz.experiments import save_figures

        for path in save_figures(result, result.folder):
            print(f"figure: {path}")


def run_cost(words: list[str]) -> None:
    command = parse(CostTable, words, "cost")
    from mimdet.analysis.cost import cost_of, cost_table
    from mimdet.presets import PRESETS

    unknown = [name for name in command.presets if name not in PRESETS]
    if unknown:
        raise ValueError(f"there is no preset {unknown[0]!r}; there are {', '.join(PRESETS)}")
    rows = []
    for name in command.presets or PRESETS:
        cfg = PRESETS[name]()
        ratios = command.ratios if cfg.backbone.kind == "mimdet" else (1.0,)
        rows += [cost_of(cfg, command.size, ratio) for ratio in ratios]
    print(cost_table(rows))


def run_check_data(words: list[str]) -> None:
    command = parse(CheckData, words, "check-data")
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


def run_download(words: list[str]) -> None:
    command = parse(Download, words, "download")
    from mimdet.downloads import download, table

    if not command.names:
        print(table())
        return
    try:
        download(command.names, command.to, yes=command.yes, unpack=command.unpack)
    except OSError as error:  # the network, or a disk that filled up meanwhile
        sys.exit(f"error: {error}")


def run_demo(words: list[str]) -> None:
    command = parse(Demo, words, "demo")
    from mimdet.demo import demo

    demo(**vars(command))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": run_demo,
    "train": run_train,
    "resume": run_resume,
    "pretrain": run_pretrain,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "errors": run_errors,
    "ablate": run_ablate,
    "cost": run_cost,
    "export": run_export,
    "check-data": run_check_data,
    "download": run_download,
}
