"""A detector on a data set: predictions, COCO metrics, at any sample ratio."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimdet import processes
from mimdet.analysis.metrics import IouType, Metrics, coco_metrics
from mimdet.config import model_part
from mimdet.data.loader import Dataset, ids_of_labels, stream
from mimdet.files import read_json, write_json, write_text
from mimdet.images import Resize
from mimdet.inference import (
    DEFAULT_BATCH,
    detect_originals,
    device_of,
    equal_padded_size,
    generator_for,
    warn_of_small,
    zoom_of,
)
from mimdet.models.checkpoint_files import check_finite
from mimdet.models.detector import OVERLAP, Detector, at_size
from mimdet.models.sampling import Keep, Sampling
from mimdet.structures import Detections, probabilities_to_rle


def results_for(
    detections: Detections,
    image_id: int | str,
    category_ids: Sequence[int | None],
    has_masks: bool,
) -> list[dict[str, Any]]:
    """COCO results of one image: image_id, category_id, bbox (x, y, width, height) and score as
    plain floats, and with `has_masks` the pasted mask as compressed RLE under `segmentation`.

    category_ids: COCO id of each label; detections whose label has None are left out. Boxes and
    masks are in pixels of `detections.image_size`, which must be the size of the image file.
    Raises ValueError when masks are wanted of detections that have none.
    """
    known = [category_ids[label] is not None for label in detections.labels.tolist()]
    detections = detections[torch.tensor(known, dtype=torch.bool, device=detections.labels.device)]
    boxes = detections.boxes.float().cpu()
    xywh = boxes.clone()
    xywh[:, 2:] -= boxes[:, :2]
    labels, scores = detections.labels.tolist(), detections.scores.tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": bbox, "score": score}
        for label, score, bbox in zip(labels, scores, xywh.tolist(), strict=True)
    ]
    if not has_masks:
        return results
    if detections.mask_probabilities is None:
        raise ValueError(
            f"image {image_id!r}: the detections have no masks; use has_masks=False or a detector "
            "with a mask head"
        )
    height, width = detections.image_size
    rles = probabilities_to_rle(detections.mask_probabilities, boxes, height, width)
    return [result | {"segmentation": rle} for result, rle in zip(results, rles, strict=True)]


def _results_of(found: tuple[Detections, int | str], **options: Any) -> list[dict[str, Any]]:
    return results_for(*found, **options)


def save_results(results: list[dict[str, Any]], path: str | Path) -> str:
    """Write a COCO results file: complete or, if interrupted, as it was before; -> its sha256."""
    text = json.dumps(results) + "\n"
    write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(slots=True)
class Evaluation:
    """One pass over a data set."""

    metrics: Metrics
    results: list[dict[str, Any]]
    """COCO results format: boxes, scores, categories, masks as RLE."""
    about: dict[str, Any]
    """What the numbers belong to (`belonging`)."""
    seconds: float

    @property
    def box(self) -> dict[str, float]:
        """The 12 COCO numbers of the boxes, `box["AP"]` in 0..1."""
        return self.metrics.box

    @property
    def mask(self) -> dict[str, float]:
        """The 12 COCO numbers of the masks; empty without masks."""
        return self.metrics.mask

    def table(self) -> str:
        return self.metrics.table()


def evaluate(
    model: Detector,
    dataset: Dataset,
    *,
    sample_ratio: float | None = None,
    keep: Keep | None = None,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH,
    workers: int = 0,
    progress: bool = False,
    short_side: int = 0,
    detections: int = 0,
    tile: int = 0,
    overlap: int = OVERLAP,
) -> Evaluation:
    """COCO box and mask metrics at one sample ratio (default: the model's `sample_ratio_eval`).

    The tokens of an image are drawn from (seed, its place in the data set), so the numbers do not
    depend on the batch size. Published APs use ratio 1, where nothing is drawn. Several processes
    share the images; the first one holds all results. workers: processes that load images; with one
    or more, another turns what is found into results while the model goes on. short_side,
    detections, tile, overlap: as of `mimdet.models.detector.at_size`.
    """
    start = time.perf_counter()
    check_finite(model.state_dict(), "the detector")
    model = at_size(model, short_side, detections, tile, overlap)
    if sample_ratio is None:
        sample_ratio = model.sample_ratio_eval
    category_ids = ids_of_labels(model.categories, dataset)
    masks = model.roi_heads.mask_head is not None
    sizes = [dataset.image_size(i) for i in range(len(dataset))]
    groups = equal_padded_size([model.resize.size(*size) for size in sizes], batch_size)
    mine = groups[processes.rank() :: processes.world()]
    loaded = stream(mine, partial(resized_images, dataset, model.resize), workers)

    def found() -> Iterator[tuple[Detections, int | str]]:
        for indices, images in zip(mine, loaded, strict=True):
            generators = [generator_for(image_seed(seed, i), device_of(model)) for i in indices]
            sampling = Sampling(sample_ratio, keep, generators=generators)
            own = detect_originals(model, images, [sizes[i] for i in indices], sampling)
            yield from zip(own, map(dataset.image_id, indices), strict=True)

    encode = partial(_results_of, category_ids=category_ids, has_masks=masks)
    results: list[dict[str, Any]] = []
    with progress_bar(len(dataset), progress) as bar:
        for own in stream(found(), encode, min(workers, 1)):
            results += own
            bar.update(min(processes.world(), bar.total - bar.n))
    results = processes.gather_lists(results)
    kinds: list[IouType] = ["bbox", "segm"] if masks and dataset.has_masks else ["bbox"]
    scale = getattr(dataset, "area_scale", 1.0)
    metrics = Metrics()
    if processes.rank() == 0:
        truth = dataset.ground_truth()
        zooms = {
            entry["id"]: zoom_of(model, (entry["height"], entry["width"]))
            for entry in truth["images"]
        }
        objects = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
        areas = [max(0, entry["bbox"][2]) * max(0, entry["bbox"][3]) for entry in objects]
        warn_of_small(areas, [zooms[entry["image_id"]] for entry in objects])
        metrics = coco_metrics(truth, results, kinds, scale)
    metrics = processes.from_first(metrics)
    about = belonging(model, dataset, sample_ratio, keep, seed)
    return Evaluation(metrics, results, about, time.perf_counter() - start)


def belonging(
    model: Detector, dataset: Dataset, ratio: float, keep: Keep | None = None, seed: int = 0
) -> dict[str, Any]:
    """What an evaluation's numbers follow from, besides this code and the machine.

    step of the weights in their run; sample_ratio, keep and seed of the tokens; data: version, and
    images: how many; config: sha256 of the model's part of the configuration; weights: sha256 of
    names and values; tiles: where images are cut, their side, overlap and zoom.
    """
    weights = hashlib.sha256()
    for name, value in model.state_dict().items():
        weights.update(name.encode())
        weights.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    tiling = {"tiles": model.tiling[:3]} if model.tiling else {}
    return tiling | {
        "step": model.step,
        "sample_ratio": ratio,
        "keep": keep or getattr(model.backbone, "keep", None),
        "seed": seed,
        "data": dataset.version,
        "images": len(dataset),
        "config": hashlib.sha256(model_part(model.config).encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


def save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Replace predictions.json and eval.json, whose metrics are of these predictions.

    eval.json comes last and names the other's sha256: where an interruption leaves two that do not
    belong together, `check_belonging` refuses them.
    """
    digest = save_results(evaluation.results, folder / "predictions.json")
    about = evaluation.about | {"predictions": digest}
    write_json(folder / "eval.json", about | evaluation.metrics.to_dict())


def check_belonging(folder: Path, data: str) -> str:
    """What a folder's predictions.json belongs to, in words.

    ValueError where it is not that of the eval.json beside it, or not of the `data` in use. Results
    of another tool have no eval.json.
    """
    file, about = folder / "predictions.json", folder / "eval.json"
    if not about.exists():
        return f"{file}: of another tool, there is no eval.json beside it"
    found = read_json(about)
    if found.get("predictions") != hashlib.sha256(file.read_bytes()).hexdigest():
        raise ValueError(
            f"{file} is not what {about} was measured on, because an evaluation was interrupted or "
            f"a file was replaced: run `mimdet evaluate {folder}` again. Before the results of "
            "another tool are looked at, remove eval.json"
        )
    if found["data"] != data:
        raise ValueError(
            f"{file} was made on {found['data']}, the data of the run are {data}: run `mimdet "
            f"evaluate {folder}` again"
        )
    drawn = "" if found["sample_ratio"] == 1 else f", draw {found['seed']}"
    return f"{file}: step {found['step']}, sample ratio {found['sample_ratio']:g}{drawn}"


def evaluate_ratios(
    model: Detector,
    dataset: Dataset,
    ratios: Sequence[float],
    draws: int = 2,
    *,
    save_to: str | Path | None = None,
    batch_size: int = DEFAULT_BATCH,
    progress: bool = False,
    known: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """One row per ratio: mean and standard deviation of box and mask AP over `draws` samplings.

    At ratio 1 every token is kept, so one pass is enough and the deviation is 0. `save_to`: folder
    for predictions and metrics of the last pass (`save_evaluation`). `known`: rows of ratios that
    need not be measured again; predictions are saved of what is measured.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one sampling of the tokens per ratio")
    if not ratios:
        raise ValueError("ratios: give at least one share of the tokens, for example 1")
    rows, measured = [], {row["sample_ratio"]: row for row in known}
    for ratio in ratios:
        if ratio in measured:
            rows.append(measured[ratio])
            continue
        passes = [
            evaluate(
                model,
                dataset,
                sample_ratio=ratio,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
            for seed in range(draws if ratio < 1 else 1)
        ]
        seconds = sum(p.seconds for p in passes)
        row = ratio_row(ratio, [p.metrics.to_dict() for p in passes], seconds)
        rows.append(row | {"about": passes[0].about})
        if save_to is not None and processes.rank() == 0 and ratio == ratios[-1]:
            save_evaluation(passes[-1], Path(save_to))
    return rows


def ratio_row(ratio: float, passes: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """passes: `Metrics.to_dict` of every sampling at this ratio."""
    row: dict[str, Any] = {
        "sample_ratio": ratio,
        "draws": len(passes),
        "seconds": round(seconds, 2),
    }
    for kind in ("box", "mask"):
        values = [
            float("nan") if p[kind]["AP"] is None else p[kind]["AP"] for p in passes if p[kind]
        ]
        if values:
            ap = torch.tensor(values, dtype=torch.float64)
            row[f"{kind}_ap"] = float(ap.mean())
            row[f"{kind}_ap_sd"] = float(ap.std()) if len(values) > 1 else 0.0
    return row | {"metrics": list(passes)}


def ratio_table(rows: Sequence[dict[str, Any]]) -> str:
    """`evaluate_ratios` rows as text: AP x 100, seconds of one draw over all images."""
    lines = ["ratio  draws      box AP     mask AP  s a draw"]
    for row in rows:
        cells = [_mean_sd(row, "box"), _mean_sd(row, "mask")]
        lines.append(
            f"{row['sample_ratio']:5.2f}  {row['draws']:5d}  {cells[0]:>10}  {cells[1]:>10}"
            f"  {row['seconds'] / row['draws']:8.1f}"
        )
    return "\n".join(lines)


def _mean_sd(row: dict[str, Any], kind: str) -> str:
    if f"{kind}_ap" not in row:
        return "-"
    mean = f"{100 * row[f'{kind}_ap']:.1f}"
    return mean if row["draws"] == 1 else f"{mean} ± {100 * row[f'{kind}_ap_sd']:.1f}"


def image_seed(seed: int, index: int) -> int:
    """The seed of one image's token draw."""
    return seed * 1_000_003 + index


def resized_images(dataset: Dataset, resize: Resize, indices: Sequence[int]) -> list[Tensor]:
    return [resize(dataset.image(i)) for i in indices]


def progress_bar(images: int, show: bool) -> Any:
    """Of the first process, where it is wanted."""
    from tqdm import tqdm

    hidden = not show or processes.rank() != 0
    return tqdm(total=images, unit="img", mininterval=1, file=sys.stdout, disable=hidden)
