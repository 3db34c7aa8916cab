"""`mimdet evaluate | predict | errors`: what a trained detector finds, and what it does not."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from mimdet.config import Config
from mimdet.console import FIRST, Failed
from mimdet.demo import save_pictures
from mimdet.files import read_json, write_file, write_json, write_text
from mimdet.prepare import Run

if TYPE_CHECKING:
    from torch import Tensor

    from mimdet.analysis.errors import ErrorReport
    from mimdet.data.coco import CocoDataset
    from mimdet.models.detector import Detector
    from mimdet.structures import Detections

Images = Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")]
MOST_SMALL = 102
"""Images on a contact sheet, at most six in a row."""
SHEET = 1440
"""Pixels of its width."""


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
    from mimdet.analysis.metrics import Metrics
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
        print(f"{ratio_table(rows)}\n\n{Metrics(**rows[-1]['metrics'][-1]).summary()}")
        if folder != Path(run):
            print(f"in {folder}: evaluation.json, predictions.json")


def load_run(run: str, checkpoint: str, device: str, trust_code: bool) -> "Detector":
    """The detector of a run or a file, on a device, with the threads of its training."""
    import torch

    from mimdet.processes import pick_device
    from mimdet.training.run import load_detector

    device = str(pick_device(device))
    model = load_detector(run, checkpoint=checkpoint, trust_code=trust_code, device=device)
    if model.config.training.threads:
        torch.set_num_threads(model.config.training.threads)
    return model


def predict(
    run: Run,
    images: Images,
    out: Path = Path("predictions"),
    annotations: str = "",
    score: float = 0.3,
    thresholds: str = "",
    sample_ratio: float = 1.0,
    short_side: int = 0,
    detections: int = 0,
    tile: int = 0,
    overlap: int = 64,
    batch_size: int = 4,
    checkpoint: str = "last",
    device: str = "auto",
    seed: int = 0,
    trust_code: bool = False,
) -> None:
    """Detect objects in image files: one json of all of them, and one picture.

    OUT/annotations.json is a complete COCO file of the objects that are drawn, with outlines, which
    annotation tools import. With --annotations it is OUT/predictions.json instead: all detections,
    in COCO results format. Of a single image OUT/NAME.json holds those too, with the names of their
    classes. OUT/pictures.jpg shows the first hundred images. Images are read upright, as viewers
    show them, or as the annotation file has their sizes. One that cannot be read is named at the
    end, with exit code 2.

    Args:
        run: Directory of the run, or a file of weights.
        images: Image files, folders, patterns as "photos/**/*.jpg", or - for a list of files on
            standard input.
        out: Folder for the results.
        annotations: COCO file that names the images: its ids are those of the results, and images
            that it does not name are left out.
        score: Take objects of at least this score.
        thresholds: A score for each class instead: a file that `mimdet errors` wrote, or `best` for
            RUN/thresholds.json.
        sample_ratio: Share of the tokens the encoder sees.
        short_side: Pixels that the short side of an image is resized to; 0 = as in training.
        detections: The most found in an image, or in a tile; 0 = as in training.
        tile: Cut images into tiles of so many pixels a side, seen at full resolution, or with
            --short-side at that size; 0 = whole images.
        overlap: Pixels that neighbouring tiles share: as many as most objects have.
        batch_size: Images at a time.
        checkpoint: `last`, `best` or a step number.
        device: `auto` = cuda, then cpu; or any torch device.
        seed: Of the tokens that are drawn below ratio 1.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from PIL import Image
    from torch import tensor

    from mimdet.analysis.evaluate import results_for
    from mimdet.analysis.outlines import coco_annotations
    from mimdet.data.loader import ids_of_labels
    from mimdet.models.detector import at_size, category_entries
    from mimdet.viz import contact_sheet, small_picture

    if not images:
        raise ValueError("give at least one image or folder: mimdet predict RUN IMAGE...")
    if not 0 <= score <= 1 or batch_size < 1:
        raise ValueError(f"--score {score}: from 0 to 1; --batch-size {batch_size}: from 1")
    truth, files = _listed(images, annotations)
    model = load_run(run, checkpoint, device, trust_code)
    model = at_size(model, short_side, detections, tile, overlap)
    limits = tensor(_limits(model.categories, thresholds, run, score))
    classes = category_entries(model)
    ids: Any = ids_of_labels(model.categories, truth) if truth else [c["id"] for c in classes]
    columns = min(6, math.ceil(math.sqrt(len(files))))
    whole: dict[str, Any] = {"info": {"description": f"found by mimdet, {run}"}, "licenses": []}
    whole |= {"images": [], "annotations": [], "categories": classes}
    small: list[Any] = []
    broken: list[str] = []
    objects, surest, began = 0, 0.0, time.perf_counter()
    for entry, image, found in _detected(model, files, broken, batch_size, sample_ratio, seed):
        whole["images"].append(entry)
        sure = found[found.scores >= limits[found.labels]]
        objects, surest = objects + len(sure), max([surest, *found.scores.tolist()])
        results = results_for(found, entry["id"], ids, found.mask_probabilities is not None)
        if len(files) == 1:
            named = dict(zip(ids, (kind["name"] for kind in classes), strict=True))
            results = [own | {"category": named[own["category_id"]]} for own in results]
            write_json(out / f"{Path(entry['file_name']).stem}.json", results, indent=None)
        if truth:
            whole["annotations"] += results
        else:
            first = len(whole["annotations"]) + 1
            whole["annotations"] += coco_annotations(sure, entry["id"], ids, first)
        if len(small) < MOST_SMALL:
            title = f"{entry['file_name']}: {len(sure)}"
            small.append(small_picture(image, sure, model.categories, title, SHEET // columns))
    if small:
        speed = len(whole["images"]) / (time.perf_counter() - began)
        file = out / ("predictions.json" if truth else "annotations.json")
        write_json(file, whole["annotations"] if truth else whole, indent=None)
        sheet = Image.fromarray(contact_sheet(small, columns))
        write_file(out / "pictures.jpg", partial(sheet.save, format="JPEG", quality=90))
        said = f"{len(whole['images'])} images, {speed:.2g} a second: {objects} objects"
        print(f"{said}; {file}, pictures.jpg")
    if small and not objects:
        print(f"nothing reaches the score {limits.min():g}; the surest has {surest:.2g} (--score)")
    if broken:
        raise Failed(f"{len(broken)} of {len(files)} images are left out, first: {broken[0]}")


def _listed(
    images: Sequence[str], annotations: str
) -> tuple["CocoDataset | None", dict[Path, tuple[int | str, tuple[int, int] | None]]]:
    """The annotation file, and of each image file its id and the (height, width) it has there."""
    from mimdet.data.coco import CocoDataset, named_images
    from mimdet.images import find_images

    files = find_images(images)
    if not annotations:
        return None, {file: (number, None) for number, file in enumerate(files, 1)}
    truth = CocoDataset(annotations, None, masks=False)
    index = named_images(truth, files)
    if len(index) < len(files):
        print(f"left out: {len(files) - len(index)} images that {annotations} does not name")
    return truth, {file: (truth.image_id(i), truth.image_size(i)) for file, i in index.items()}


def _limits(classes: Sequence[str], thresholds: str, run: str, score: float) -> list[float]:
    """The least score of each class."""
    if not thresholds:
        return [score] * len(classes)
    file = Path(run, "thresholds.json") if thresholds == "best" else Path(thresholds)
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}: `mimdet errors {run}` makes it")
    best = read_json(file)
    return [best[name]["score"] if name in best else score for name in classes]


def _detected(
    model: "Detector",
    files: Mapping[Path, tuple[int | str, tuple[int, int] | None]],
    broken: list[str],
    batch_size: int,
    sample_ratio: float,
    seed: int,
) -> Iterator[tuple[dict[str, Any], "Tensor", "Detections"]]:
    """Of each of the files (`_listed`) its COCO entry, the image and what is found in it; of one
    that cannot be used `broken` says why."""
    from mimdet.analysis.evaluate import progress_bar
    from mimdet.images import read_image
    from mimdet.inference import predict

    folder, order = os.path.commonpath([file.absolute().parent for file in files]), [*files]
    with progress_bar(len(files), True) as bar:
        for start in range(0, len(files), batch_size):
            entries, images = [], []
            for file in order[start : start + batch_size]:
                number, size = files[file]
                try:
                    image = read_image(file, size=size)
                    if size not in (None, image.shape[1:]):
                        raise ValueError(f"{file} is no image of {size} pixels, as annotated")
                except ValueError as error:
                    broken.append(str(error))
                    continue
                name, (height, width) = os.path.relpath(file, folder), image.shape[1:]
                entry = {"id": number, "file_name": Path(name).as_posix()}
                entries.append(entry | {"height": height, "width": width})
                images.append(image)
            found = predict(
                model, images, sample_ratio=sample_ratio, seed=seed, batch_size=batch_size
            )
            yield from zip(entries, images, found, strict=True)
            bar.update(min(batch_size, bar.total - bar.n))


def errors(
    run: Run,
    against: str = "",
    annotations: str = "",
    images: str = "",
    out: str = "",
    device: str = "auto",
    trust_code: bool = False,
) -> None:
    """Why a detector's AP is what it is: errors by type and what fixing each would bring (TIDE).

    Names the worst images, confused classes, what may be wrong with the annotations, and the best
    score to cut each class at. Writes errors.json, thresholds.json (`mimdet predict --thresholds`),
    review.csv (annotations to look at), the bars, the precision-recall curves and, for --against,
    what changed image by image.

    Args:
        run: Directory of a run, with the predictions.json that `mimdet evaluate` left; a file of
            COCO results; or a file of weights, which is evaluated.
        against: Another of these on the same data, to compare with image by image.
        annotations: COCO file that the results are about; default: the data of the run.
        images: Its image folder; only weights need it.
        out: Folder for the results; default: the run, or a folder of the file's name beside it.
        device: For weights: `auto` = cuda, then cpu; or any torch device.
        trust_code: Execute parts that a notebook stored in the run, or that its config.json names.
    """
    from mimdet.analysis.comparison import compare_runs
    from mimdet.analysis.errors import find_errors
    from mimdet.analysis.metrics import coco_metrics
    from mimdet.data.coco import CocoDataset
    from mimdet.viz import show_comparison, show_errors, show_precision_recall

    data: Any = CocoDataset(annotations, images or None) if annotations else None
    found: dict[str, list[dict[str, Any]]] = {}
    for source in filter(None, (run, against)):  # the data of the first are those of both
        data, found[source] = _results_of(source, data, device, trust_code)
    truth, scale = data.ground_truth(), getattr(data, "area_scale", 1.0)
    masks = data.has_masks and all(
        "segmentation" in entry for own in found.values() for entry in own
    )
    kinds: dict[str, Any] = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
    for source, results in found.items():
        print(f"{source}\n{coco_metrics(truth, results, [*kinds.values()], scale).table()}\n")
    reports = {k: find_errors(truth, found[run], kinds[k], area_scale=scale) for k in kinds}
    figures = {"errors": show_errors(reports)}
    for name, report in reports.items():
        print(f"{name}\n{report.table()}\n")
        figures[f"curves_{name}"] = show_precision_recall(report.curves((0.5, 0.75, 0.9)))
    if against:
        both = {against: found[against], run: found[run]}
        compared = compare_runs(truth, both, [*kinds.values()][-1])
        print(f"{compared.table()}\n")
        figures["comparison"] = show_comparison(compared)
    folder = Path(out or (run if Path(run).is_dir() else Path(run).with_suffix("")))
    save_pictures(folder, **figures)
    write_json(folder / "errors.json", {name: r.to_dict() for name, r in reports.items()})
    _review(reports["box"], data, folder)


def _results_of(
    source: str, data: Any, device: str, trust_code: bool
) -> tuple[Any, list[dict[str, Any]]]:
    """The data that a run, a file of results or of weights is about, unless given, and results."""
    from mimdet.analysis.evaluate import check_belonging, evaluate
    from mimdet.analysis.metrics import read_results
    from mimdet.data.coco import build_dataset
    from mimdet.models.checkpoint_files import shipped
    from mimdet.training.run import stored_config
    from mimdet.training.slots import load_slots

    file = Path(source)
    if source in shipped() or (file.is_file() and file.suffix != ".json"):
        model = load_run(source, "last", device, trust_code)
        data = data or build_dataset(model.config.data, "val", masks=model.config.detector.masks)
        return data, evaluate(model, data, progress=True).results
    if data is None and file.suffix == ".json":
        raise ValueError(f"{source} holds results: name what they are about, --annotations FILE")
    results = file if file.suffix == ".json" else file / "predictions.json"
    if not results.exists():
        raise FileNotFoundError(f"{source} has no {results.name}: `mimdet evaluate` makes it")
    if data is None:
        cfg = stored_config(file)
        assert isinstance(cfg, Config)  # an autoencoder leaves no predictions
        load_slots(file, cfg, trust_code)  # the data may be one of them
        data = build_dataset(cfg.data, "val", cfg.training.seed, cfg.detector.masks)
    if results.name == "predictions.json":
        print(check_belonging(results.parent, data.version))
    return data, read_results(results, data.ground_truth())


def _review(report: "ErrorReport", data: Any, folder: Path) -> None:
    """Print where to look, and write thresholds.json and review.csv."""
    from pandas import DataFrame

    name_of = getattr(data, "file_name", data.image_id)
    names = {data.image_id(i): name_of(i) for i in range(len(data))}
    best, worst, rows = report.thresholds(), report.worst_images(), []
    for doubt, errors in report.label_faults().items():
        for one in errors:
            box = [round(side) for side in (one.result or one.truth or {})["bbox"]]
            rows.append([doubt, names[one.image_id], one.said, one.true, one.score, *box])
    columns = ["doubt", "image", "said", "true", "score", "x", "y", "width", "height"]
    tables = {
        "the most frequent confusions": report.confusions().head(10),
        "the best score to cut a class at (mimdet predict --thresholds)": best.reset_index(
            names="class"
        ),
        "images with most mistakes there": worst.assign(image_id=worst["image_id"].map(names)),
        "annotations to review": DataFrame(rows, columns=columns),
    }
    for title, table in tables.items():
        if len(table):
            print(f"{title}\n{table.to_string(index=False, float_format='%.2f', na_rep='')}\n")
    write_json(folder / "thresholds.json", best.to_dict("index"))
    write_text(folder / "review.csv", tables["annotations to review"].to_csv(index=False))
    print(f"in {folder}: errors.json, thresholds.json, review.csv")
