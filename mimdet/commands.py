"""The subcommands of `mimdet`, a function each: arguments are options, docstrings the help."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from mimdet.config import Config, PretrainConfig
from mimdet.console import FIRST
from mimdet.demo import demo, save_pictures
from mimdet.files import write_json
from mimdet.playground import playground
from mimdet.prepare import File, Run, check_data, convert, split, start
from mimdet.presets import PRESETS

if TYPE_CHECKING:
    from mimdet.models.detector import Detector

Images = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
Names = Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME...]")]


def train(run: Run, config: Config) -> None:
    """Train a detector; the same command resumes an interrupted run exactly.

    Ctrl-C or SIGTERM saves and exits. Progress goes to the screen, every number to
    RUN/metrics.jsonl, weights to RUN/checkpoints.

    Args:
        run: Directory of the run, for example runs/nuclei.
    """
    from mimdet.training.train import train

    steps = train(config, run, announce=True)
    _follow(steps, f"{run}; next: mimdet evaluate {run} --ratios 0.25 0.5 1")


def pretrain(run: Run, config: PretrainConfig) -> None:
    """Pre-train a masked autoencoder; the same command resumes an interrupted run exactly.

    Writes RUN/metrics.jsonl, a picture of reconstructions at every evaluation and, for
    `mimdet train PRESET RUN2 --init-from RUN`, RUN/mae.safetensors.

    Args:
        run: Directory of the run, for example runs/mae.
    """
    from mimdet.training.pretrain import pretrain

    steps = pretrain(config, run, announce=True)
    _follow(steps, f"{run}; next: mimdet train PRESET RUN --init-from {run}")


def resume(run: Run, steps: int = 0, trust_code: bool = False) -> None:
    """Train in a run's folder, or resume there, with the configuration it holds.

    A run that is complete is left as it is. Runs of a notebook go on in a terminal this way.

    Args:
        run: Directory of the run, of a detector or of an autoencoder.
        steps: Train a finished run's model so many steps more, in RUN+STEPS: with a warm-up and a
            schedule of their own, because those of the run have ended.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.training.train import extend, resume

    run = str(extend(run, steps)) if steps else run
    # A log is read by people: a line of progress now and then.
    followed = resume(run, trust_code=trust_code, announce=True)
    _follow(followed, f"{run}; more: add --steps N", 1 if sys.stdout.isatty() else 20)


def _follow(steps: Iterator[Any], done: str, every: float = 1) -> None:
    """Run a training to its end; the first process has a progress bar, renewed `every` seconds, and
    says after some steps how long the rest will take."""
    from tqdm import tqdm

    from mimdet.training.train import MEASURED, MEASURED_SECONDS, outlook, show_progress

    shown, taken = show_progress(steps, every) if FIRST else steps, []
    for step in shown:
        taken.append(step.seconds)
        if len(taken) == MEASURED or (len(taken) > 2 and sum(taken) > MEASURED_SECONDS):
            if FIRST:  # its first step starts processes and allocates memory
                tqdm.write(outlook(step, mean(taken[1:] or taken)))
            break
    for _ in shown:
        pass
    if FIRST:
        print(f"done: {done}")


def evaluate(
    run: Run,
    ratios: tuple[float, ...] = (1.0,),
    draws: int = 2,
    checkpoint: str = "last",
    limit: int = 0,
    val_json: str = "",
    val_images: str = "",
    out: str = "",
    reuse: bool = False,
    batch_size: int = 4,
    device: str = "auto",
    trust_code: bool = False,
) -> None:
    """COCO box and mask metrics of a trained run, at any list of sample ratios.

    Below ratio 1 the tokens are drawn at random, so the mean and the standard deviation over
    --draws samplings are given. Writes evaluation.json and, of the last draw at the last ratio,
    predictions.json in COCO results format with its metrics and what they belong to, eval.json.

    Args:
        run: Directory of the run, or a released MIMDet file (.pth).
        ratios: Shares of the tokens the encoder sees, for example 0.25 0.5 1.
        draws: Samplings per ratio below 1.
        checkpoint: `last`, `best` or a step number.
        limit: Evaluate the first N images only; 0 = all.
        val_json: Another annotation file than the run's own.
        val_images: Its image folder.
        out: Folder for the results; default: the run, a folder in it for other data or weights than
            its own, or for a file a folder of its name beside it.
        reuse: Take ratio 1 from the training's own last evaluation, if that was of these weights,
            instead of measuring it again. Predictions are then saved only if the last ratio was
            measured.
        batch_size: Images at a time.
        device: `auto` = cuda, then cpu; or any torch device.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet import processes
    from mimdet.analysis.evaluate import evaluate_ratios, ratio_table
    from mimdet.data.coco import build_dataset
    from mimdet.training.train import rows_from_training

    processes.join()
    model = _load(run, checkpoint, device, trust_code)
    data = model.config.data
    data.limit_val = limit or data.limit_val
    data.val_json = val_json or data.val_json
    data.val_images = val_images or data.val_images
    if val_json or val_images:
        data.source = "coco"
    special = [f"limit{limit}"] if limit else []
    special += [Path(val_json).stem] if val_json else []
    special += ["other-images"] if val_images and not val_json else []
    special += [checkpoint] if checkpoint != "last" else []
    # In the run itself only what belongs to all of its data and its last weights.
    place = Path(run, "-".join(["evaluation", *special]) if special else "")
    folder = Path(out or (place if Path(run).is_dir() else Path(run).with_suffix("")))
    dataset = build_dataset(data, "val", model.config.training.seed, model.config.detector.masks)
    reuse = reuse and not special and folder == Path(run)
    rows = evaluate_ratios(
        model,
        dataset,
        ratios,
        draws,
        batch_size=batch_size,
        progress=True,
        save_to=folder,
        known=rows_from_training(run, model, dataset) if reuse else (),
    )
    if FIRST:
        write_json(folder / "evaluation.json", {"data": dataset.version, "ratios": rows})
        print(ratio_table(rows))
        if folder != Path(run):
            print(f"in {folder}: evaluation.json, predictions.json")


def _load(run: str, checkpoint: str, device: str, trust_code: bool) -> "Detector":
    from mimdet.training.run import load_detector
    from mimdet.training.trainer import pick_device, use_threads

    device = str(pick_device(device))
    model = load_detector(run, checkpoint=checkpoint, trust_code=trust_code, device=device)
    use_threads(model.config.training.threads)
    return model


def predict(
    run: Run,
    images: Images,
    out: Path = Path("predictions"),
    sample_ratio: float = 1.0,
    score: float = 0.3,
    checkpoint: str = "last",
    device: str = "auto",
    seed: int = 0,
    trust_code: bool = False,
) -> None:
    """Detect objects in image files; writes one json and one picture per image.

    The json is in COCO results format. Its ids are those of the annotation file the detector was
    trained on; an image that is not in the data of the run has its file's name as its id.

    Args:
        run: Directory of the run, or a released MIMDet file (.pth).
        images: Image files.
        out: Folder for the results.
        sample_ratio: Share of the tokens the encoder sees.
        score: Draw detections with at least this score (the json holds all).
        checkpoint: `last`, `best` or a step number.
        device: `auto` = cuda, then cpu; or any torch device.
        seed: Of the tokens that are drawn below ratio 1.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.analysis.evaluate import results_for, save_results
    from mimdet.data.coco import ids_of_files
    from mimdet.images import read_image
    from mimdet.inference import predict
    from mimdet.models.detector import category_entries
    from mimdet.viz import save_figure, show_detections

    if not images:
        raise ValueError("give at least one image: mimdet predict RUN IMAGE...")
    if not 0 <= score <= 1:
        raise ValueError(f"--score {score}: scores are in 0..1")
    stems = {image.stem: image for image in images}
    for image in images:
        if stems[image.stem] != image:
            raise ValueError(
                f"{image} and {stems[image.stem]} would both become {out / image.stem}.json: "
                "predict them in two calls with another --out"
            )
    model = _load(run, checkpoint, device, trust_code)
    names = {category["id"]: category["name"] for category in category_entries(model)}
    image_ids = ids_of_files(model.config.data, images)
    masks = model.roi_heads.mask_head is not None
    out.mkdir(parents=True, exist_ok=True)
    for stem, path in stems.items():
        pixels = read_image(path)
        found = predict(model, pixels, sample_ratio=sample_ratio, seed=seed)
        results = results_for(found, image_ids.get(path, path.name), list(names), masks)
        for result in results:
            result["category"] = names[result["category_id"]]
        save_results(results, out / f"{stem}.json")
        figure = show_detections([pixels], [found], None, model.categories, score, columns=1)
        save_figure(figure, out / f"{stem}.png")
        shown = int((found.scores >= score).sum())
        print(f"{path}: {shown} objects with score >= {score} -> {out / stem}.json, .png")


def errors(run: Run, against: str = "", out: str = "", trust_code: bool = False) -> None:
    """Why a run's AP is what it is: errors by type and what fixing each would bring (TIDE).

    Reads RUN/predictions.json, as `mimdet evaluate` left it. Writes errors.json, the bars, the
    precision-recall curves and, for --against, what changed image by image.

    Args:
        run: Directory of the run.
        against: Another run on the same data, to compare with image by image.
        out: Folder for the results; default: the run.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.analysis.comparison import compare_runs
    from mimdet.analysis.errors import find_errors
    from mimdet.analysis.evaluate import check_belonging
    from mimdet.analysis.metrics import read_results
    from mimdet.data.coco import build_dataset
    from mimdet.training.inputs import stored_config
    from mimdet.training.slots import load_slots
    from mimdet.viz import show_comparison, show_errors, show_precision_recall

    files = {folder: Path(folder, "predictions.json") for folder in (against, run) if folder}
    for folder, file in files.items():
        if not file.exists():
            raise FileNotFoundError(f"{folder} has no predictions.json: `mimdet evaluate` makes it")
    cfg = stored_config(Path(run))
    assert isinstance(cfg, Config)  # an autoencoder leaves no predictions
    load_slots(Path(run), cfg, trust_code)  # the data may be one of them
    dataset = build_dataset(cfg.data, "val", cfg.training.seed, cfg.detector.masks)
    truth, scale = dataset.ground_truth(), getattr(dataset, "area_scale", 1.0)
    found = {folder: read_results(file, truth) for folder, file in files.items()}
    for folder in files:
        print(check_belonging(Path(folder), dataset.version))
    reports = {"box": find_errors(truth, found[run], "bbox", area_scale=scale)}
    if cfg.detector.masks and dataset.has_masks:
        reports["mask"] = find_errors(truth, found[run], "segm", area_scale=scale)
    figures = {"errors": show_errors(reports)}
    for name, report in reports.items():
        print(f"{name}\n{report.table()}\n")
        figures[f"curves_{name}"] = show_precision_recall(report.curves((0.5, 0.75, 0.9)))
    if against:
        figures["comparison"] = show_comparison(compare_runs(truth, found))
    save_pictures(Path(out or run), **figures)
    write_json(Path(out or run, "errors.json"), {name: r.to_dict() for name, r in reports.items()})


def export(
    run: Run,
    file: File,
    half: bool = False,
    inside: bool = False,
    licence: str = "",
    checkpoint: str = "last",
    trust_code: bool = False,
) -> None:
    """Write a run's weights, or the model that runs without this code, into one file.

    A .safetensors file holds configuration and class names too: `mimdet predict FILE IMAGE` works
    anywhere. A .pth file has the layout of the released MIMDet checkpoints, for the original's own
    tools. An .onnx file, of a detector or an autoencoder, needs onnxruntime, a .pt2 file PyTorch.

    Args:
        run: Directory of the run, or shipped weights.
        file: The .onnx, .pt2, .safetensors or .pth to write.
        half: Store float16 (.safetensors and .onnx only).
        inside: Of .onnx and .pt2: give c4 and the encoder's attention too; c4 can become its mean.
        licence: Of the weights, said in an .onnx or .pt2; that of shipped ones is known.
        checkpoint: `last`, `best` or a step number.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.models.checkpoint_files import shipped
    from mimdet.models.exported import export_model
    from mimdet.models.official import export_detectron2, save_detector
    from mimdet.training.pretrain import load_model

    ending = Path(file).suffix
    halves, others = (".safetensors", ".onnx"), (".pt2", ".pth", ".pkl")
    if ending not in halves and (half or ending not in others):
        raise ValueError(f"{file}: name it .safetensors, .onnx, or, without half, .pt2, .pth, .pkl")
    if ending in (".onnx", ".pt2"):
        licence = licence or ("MIT" if run in shipped() else "")
        model = load_model(run, checkpoint=checkpoint, trust_code=trust_code)
        about = export_model(model, file, inside=inside, half=half, licence=licence)
        print(f"{file}: {about['kind']}, sides multiples of {about['multiple']} pixels")
        return
    detector = _load(run, checkpoint, "cpu", trust_code)
    if ending == ".safetensors":
        save_detector(detector, file, half=half)
        print(f"{file}: for mimdet.load_detector, with configuration and class names")
    else:
        export_detectron2(detector, file)
        print(f"{file}: {len(detector.state_dict())} tensors under detectron2's names")


def ablate(
    file: File,
    runs: str = "runs",
    seeds: int = 0,
    processes: int = 0,
    part: str = "1/1",
    known: tuple[str, ...] = (),
    dry_run: bool = False,
    table: bool = False,
    out: str = "",
) -> None:
    """Train every arm of a grid with several seeds; print a table with 95 % intervals.

    Complete runs are skipped and interrupted ones resumed, so the same command continues. Many
    machines share a grid: the first is given --part 1/8, the next --part 2/8, and so on. In one
    folder, --table then shows all that is complete; from folders of their own, the json files that
    they wrote are joined by --known.

    Args:
        file: Python file that defines `base` and `grid`; it is executed. Example:
            notebooks/ablations/sample_ratio.py.
        runs: Folder under which the experiment's runs are kept.
        seeds: Another number of seeds than the file's.
        processes: Runs at a time; 0 = one per GPU, or one per core and thread of a run.
        part: Train a part of the runs alone: 3/8 is every eighth, beginning with the third.
        known: Results (json) of the same grid from elsewhere: what they hold is not trained again.
        dry_run: List the runs; train nothing.
        table: Train nothing; the table is of what is complete.
        out: The json with everything; default RUNS/NAME/result.json.
    """
    from mimdet.experiments.experiment import ablate
    from mimdet.viz.experiments import save_figures

    result = ablate(
        file,
        runs=runs,
        seeds=seeds,
        processes=processes,
        part=part,
        known=known,
        dry_run=dry_run,
        table=table,
        out=out,
    )
    if result is not None:
        for path in save_figures(result, result.folder):
            print(f"figure: {path}")


def cost(
    presets: Names = (),
    size: tuple[int, int] = (800, 1344),
    ratios: tuple[float, ...] = (1.0,),
) -> None:
    """Parameters and multiply-adds of presets, as a markdown table. Nothing is computed.

    Args:
        presets: Names of presets; default: all.
        size: Height and width of the image in pixels.
        ratios: Shares of the tokens the encoder sees; baselines see them all.
    """
    from mimdet.analysis.cost import cost_of, cost_table

    unknown = [name for name in presets if name not in PRESETS]
    if unknown:
        raise ValueError(f"there is no preset {unknown[0]!r}; there are {', '.join(PRESETS)}")
    if not 32 <= min(size) <= max(size) <= 1 << 15:
        raise ValueError(f"--size {size[0]} {size[1]}: height and width in pixels, 32 to {1 << 15}")
    rows = []
    for name in presets or PRESETS:
        cfg = PRESETS[name]()
        seen = ratios if cfg.backbone.kind == "mimdet" else (1.0,)
        rows += [cost_of(cfg, size, ratio) for ratio in seen]
    print(cost_table(rows))


def plan(
    config: Config,
    gpus: int = 1,
    price: float = 0.0,
    measured_steps: int = 6,
    out: str = "",
) -> None:
    """What a training will take: speed, memory, hours, cost; measured in a few steps here.

    Cards are judged by a count of what training holds; its error against the peaks measured here is
    in the last column. Evaluations and the loss of sharing a step are not in the hours.

    Args:
        gpus: Devices like this one that share the steps.
        price: Of one of them, an hour.
        measured_steps: Steps measured at each sample ratio.
        out: Save a picture of it under this name, as .png and .svg.
    """
    from mimdet.training.plan import forecast
    from mimdet.viz import save_figure, show_forecast

    found = forecast(config, gpus, price, measured_steps)
    print(found)
    if out:
        save_figure(show_forecast(found), out)


def profile(config: Config, measured_steps: int = 5, out: str = "") -> None:
    """Where the time of a training step goes: seconds, multiply-adds and speed of every part.

    Args:
        measured_steps: Steps that are measured, after two that warm up.
        out: Save a picture of it under this name, as .png and .svg.
    """
    from mimdet.training.profile import profile
    from mimdet.viz import save_figure, show_profile

    found = profile(config, measured_steps)
    print(found)
    if out:
        save_figure(show_profile(found), out)


def download(
    names: Names = (),
    to: Path = Path("downloads"),
    yes: bool = False,
    unpack: bool = False,
) -> None:
    """Fetch public weights or COCO; without a name, list what there is.

    Shows address, size, licence and free space, then asks. The same command continues an
    interrupted download where it stopped. What arrived is checked and recorded in
    TO/downloads.json; run again, the command checks that the files are still the same.

    Args:
        names: Names from the list; `coco` means images and annotations of train2017 and val2017.
        to: Folder for the files. Those of the Hugging Face hub go to the hub's own cache.
        yes: Do not ask.
        unpack: Unzip COCO to TO/coco/train2017, val2017 and annotations; go on with a half unpacked
            one.
    """
    from mimdet.downloads import download, table

    if names:
        download(names, to, yes=yes, unpack=unpack)
    else:
        print(table())


_FUNCTIONS = (demo, start, plan, profile, train, resume, pretrain, evaluate, predict, errors)
COMMANDS: dict[str, Callable[..., object]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        *_FUNCTIONS,
        ablate,
        cost,
        export,
        playground,
        check_data,
        convert,
        split,
        download,
    )
}
