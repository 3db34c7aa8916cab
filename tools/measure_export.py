"""How close an exported model is to the one it came from: `python tools/measure_export.py`.

onnxruntime against `mimdet.predict` on drawn scenes: the same detections in the same order, and
the largest differences of boxes, scores and masks; mimdet_base with random weights at two sizes;
the autoencoder's pictures; with `--run RUN` a detector of one's own, on 20 held-out pictures of its
own data. Writes notebooks/results/export.json.
"""

import argparse
import math
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import mimdet
from mimdet.data.coco import build_dataset
from mimdet.data.shapes import ShapesCOCO
from mimdet.files import read_json, write_json
from mimdet.images import Resize, resize_image
from mimdet.models.detector import Detector
from mimdet.models.exported import export_model
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.sampling import SAMPLERS, Sample, select, token_grid
from mimdet.presets import mimdet_base
from mimdet.structures import Detections

RATIOS = (0.1, 0.25, 0.5, 1.0)
DETECTORS = ("tiny", "tiny_half")
SCORES = 1e-4
"""How far scores may be apart."""
LEAST = 0.05
"""The score below which no preset's detector finds anything."""
BASE_SIZES = ((416, 640), (300, 350))
"""Height and width; the second is padded to 320 x 352."""
RESULT = Path(__file__).resolve().parents[1] / "notebooks/results/export.json"


def session(model: Any, **options: Any) -> onnxruntime.InferenceSession:
    """The model after a trip through a file, on one thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        export_model(model, file, **options)
        return onnxruntime.InferenceSession(file, settings, ["CPUExecutionProvider"])


def drawn(height: int, width: int, ratio: float, seed: int) -> Sample:
    """A random sample of one image's own tokens."""
    grid = token_grid(height, width)
    padded = token_grid(*mimdet.structures.padded_size(height, width))
    generator = torch.Generator().manual_seed(seed)
    scores = SAMPLERS["random"](torch.empty(grid[0] * grid[1], 1), grid, generator)
    return select([scores], [grid], padded, ratio)


def run(exported: onnxruntime.InferenceSession, model: Detector, image: Any, sample: Sample) -> Any:
    """Detections of the exported model in the pixels of the image it is given."""
    batch = model.prepare(image)
    feeds = {
        "image": batch.tensors.numpy(),
        "keep": sample.keep[0].numpy(),
        "size": np.array(batch.image_sizes[0]),
    }
    boxes, labels, scores, masks = (torch.from_numpy(part) for part in exported.run(None, feeds))
    return Detections(boxes, scores, labels, batch.image_sizes[0], masks)


def difference(ours: Detections, theirs: Detections) -> dict[str, float]:
    """The largest difference of each part; `other`: 1 where not the same labels in the same order,
    apart from `swapped` neighbours, whose scores lie closer together than the tolerance, and from
    the last ones of either side whose scores lie as close to the least score (`at_least`).

    Where the counts differ otherwise nothing can be compared.
    """
    found = {"other": 0.0, "detections": float(len(ours))}
    both = min(len(ours), len(theirs))
    last = torch.cat([ours.scores[both:], theirs.scores[both:]])
    if len(last) and float(last.max()) < LEAST + SCORES:
        found["at_least"] = float(len(last))
        ours, theirs = ours[torch.arange(both)], theirs[torch.arange(both)]
    if len(ours) == len(theirs):
        order = list(range(len(ours)))
        for i in range(len(ours) - 1):
            close = float(theirs.scores[i] - theirs.scores[i + 1]) < SCORES
            if close and away(ours, i, theirs, order[i + 1]) < away(ours, i, theirs, order[i]):
                order[i], order[i + 1] = order[i + 1], order[i]
        found["swapped"] = float(sum(place != i for i, place in enumerate(order)))
        theirs = theirs[torch.tensor(order, dtype=torch.long)]
    if not torch.equal(ours.labels, theirs.labels):
        return found | {"other": 1.0}
    for name in ("boxes", "scores", "mask_probabilities"):
        apart = (getattr(ours, name) - getattr(theirs, name)).abs()
        found[name] = float(apart.max()) if len(ours) else 0.0
    return found


def away(ours: Detections, i: int, theirs: Detections, j: int) -> float:
    """How far two boxes are apart in pixels; infinitely where their labels differ."""
    if ours.labels[i] != theirs.labels[j]:
        return math.inf
    return float((ours.boxes[i] - theirs.boxes[j]).abs().max())


def summary(differences: Iterable[dict[str, float]]) -> dict[str, Any]:
    every = list(differences)
    summed = {name: int(sum(d[name] for d in every)) for name in ("other", "detections")}
    parts = ("boxes", "scores", "mask_probabilities")
    for name in ("swapped", "at_least"):
        count = int(sum(d.get(name, 0) for d in every))
        summed |= {name: count} if count else {}
    return {"images": len(every)} | summed | {p: max(d.get(p, 0.0) for d in every) for p in parts}


def compare(model: Detector, images: list[Any], ratio: float, exported: Any) -> dict[str, Any]:
    differences = []
    for seed, image in enumerate(images):
        height, width = model.resize(image).shape[1:]
        sample = drawn(height, width, ratio, seed)
        ours = mimdet.predict(model, model.resize(image), sample=sample)
        differences.append(difference(ours, run(exported, model, image, sample)))
    return summary(differences)


def base_with_boxes() -> Detector:
    """mimdet_base with random weights, but for two layers whose scores are drawn further apart: as
    they begin, objectness and classes differ by less than the rounding of different kernels."""
    torch.manual_seed(0)
    model = mimdet.build_detector(mimdet_base()).eval()
    torch.nn.init.normal_(model.rpn.head.cls_logits.weight, std=1.0)
    torch.nn.init.normal_(model.roi_heads.box_head.cls_score.weight, std=0.1)
    return model


def measure_tiny(scenes: int) -> Iterator[dict[str, Any]]:
    images = drawn_scenes(scenes)
    for name in DETECTORS:
        model = mimdet.load_detector(name)
        exported = session(model)
        for ratio in RATIOS:
            yield {"model": name, "ratio": ratio} | compare(model, images, ratio, exported)


def measure_run(run: str) -> Iterator[dict[str, Any]]:
    model = mimdet.load_detector(run)
    dataset = build_dataset(model.config.data, "val", masks=model.config.detector.masks)
    images, exported = [dataset[i].image for i in range(20)], session(model)
    for ratio in RATIOS:
        row = {"model": Path(run).name, "ratio": ratio}
        yield row | compare(model, images, ratio, exported)


def measure_autoencoder(scenes: int) -> Iterator[dict[str, Any]]:
    mae = mimdet.load_mae_model("tiny_mae")
    painter = session(mae)
    for ratio in RATIOS:
        apart = 0.0
        for seed, image in enumerate(drawn_scenes(scenes)):
            batch = pad_and_normalise([resize_image(image, (256, 256))], mae)
            sample = drawn(*batch.image_sizes[0], ratio, seed)
            with torch.no_grad():
                ours = mae.reconstruct(batch.tensors, mae(batch.tensors, sample=sample)).painted
            feeds = {"image": batch.tensors.numpy(), "keep": sample.keep[0].numpy()}
            apart = max(apart, float(np.abs(ours.numpy() - painter.run(None, feeds)[0]).max()))
        yield {"model": "tiny_mae", "ratio": ratio, "images": scenes, "painted": apart}


def measure_base(scenes: int) -> Iterator[dict[str, Any]]:
    base = base_with_boxes()
    base.resize = Resize()  # as it is
    exported = session(base)
    for height, width in BASE_SIZES:
        cells = (-(-height // 8), -(-width // 8), 3)
        noise = np.random.default_rng(0).integers(0, 256, cells, np.uint8)
        picture = torch.from_numpy(noise.repeat(8, 0).repeat(8, 1)).permute(2, 0, 1)
        row = compare(base, [picture[:, :height, :width].contiguous()], 0.25, exported)
        yield {"model": "mimdet_base, random weights", "size": [height, width]} | row


def drawn_scenes(count: int) -> list[Any]:
    data = ShapesCOCO("shapes-v1-medium", length=count, split="val")
    return [data.image(i) for i in range(count)]


PARTS = {"tiny": measure_tiny, "autoencoder": measure_autoencoder, "base": measure_base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--run", help="a detector of one's own, instead of the parts")
    parser.add_argument("--out", type=Path, default=RESULT, help="rows of other models stay in it")
    arguments = parser.parse_args()
    rows = []
    parts = [PARTS[part](arguments.scenes) for part in arguments.parts]
    for row in chain.from_iterable([measure_run(arguments.run)] if arguments.run else parts):
        print(row, flush=True)
        rows.append(row)
    new = {row["model"] for row in rows}
    known = read_json(arguments.out)["rows"] if arguments.out.exists() else []
    rows = [row for row in known if row["model"] not in new] + rows
    write_json(arguments.out, {"command": "python tools/measure_export.py", "rows": rows})


if __name__ == "__main__":
    main()
