"""`mimdet evaluate | predict | errors`: what a trained detector finds, and what it does not."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from mimdet.config import Config
from mimdet.console import FIRST
from mimdet.demo import save_pictures
from mimdet.files import write_json
from mimdet.prepare import Run

if TYPE_CHECKING:
    from mimdet.models.detector import Detector

Images = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]


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
    short_side: int = 0,
    detections: int = 0,
    tile: int = 0,
    overlap: int = 64,
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
        out: Folder for the results; default: the run, a folder in it for other data, weights or
            sizes than its own, or for a file a folder of its name beside it.
        reuse: Take ratio 1 from the training's own last evaluation, if that was of these weights,
            instead of measuring it again. Predictions are then saved only if the last ratio was
            measured.
        short_side: Pixels that the short side of an image is resized to; 0 = as in training.
        detections: The most found in an image, or in a tile; 0 = as in training.
        tile: Cut images into tiles of so many pixels a side, seen at full resolution, or with
            --short-side at that size; 0 = whole images.
        overlap: Pixels that neighbouring tiles share: as many as most objects have.
        batch_size: Images at a time.
        device: `auto` = cuda, then cpu; or any torch device.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet import processes
    from mimdet.analysis.evaluate import evaluate_ratios, ratio_table
    from mimdet.data.coco import build_dataset
    from mimdet.models.detector import at_size
    from mimdet.training.train import rows_from_training

    processes.join()
    model = load_run(run, checkpoint, device, trust_code)
    model = at_size(model, short_side, detections, tile, overlap)
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
    sizes = {"side": short_side, "most": detections, "tile": tile}
    special += [f"{name}{pixels}" for name, pixels in sizes.items() if pixels]
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


def load_run(run: str, checkpoint: str, device: str, trust_code: bool) -> "Detector":
    """The detector of a run or a file, on a device, with the threads of its training."""
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
    short_side: int = 0,
    detections: int = 0,
    tile: int = 0,
    overlap: int = 64,
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
        short_side: Pixels that the short side of an image is resized to; 0 = as in training.
        detections: The most found in an image, or in a tile; 0 = as in training.
        tile: Cut images into tiles of so many pixels a side, seen at full resolution, or with
            --short-side at that size; 0 = whole images.
        overlap: Pixels that neighbouring tiles share: as many as most objects have.
        checkpoint: `last`, `best` or a step number.
        device: `auto` = cuda, then cpu; or any torch device.
        seed: Of the tokens that are drawn below ratio 1.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.analysis.evaluate import results_for, save_results
    from mimdet.data.coco import ids_of_files
    from mimdet.images import read_image
    from mimdet.inference import predict
    from mimdet.models.detector import at_size, category_entries
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
    model = load_run(run, checkpoint, device, trust_code)
    model = at_size(model, short_side, detections, tile, overlap)
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
