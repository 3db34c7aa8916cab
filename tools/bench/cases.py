"""Cases that take one part of the kit, and the same work done without it."""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from timm.layers import Attention
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from mimdet.analysis.cost import transformer_cost
from mimdet.analysis.metrics import COLUMNS, coco_metrics
from mimdet.analysis.outlines import mask_outlines
from mimdet.config import DataConfig
from mimdet.data.coco import build_dataset
from mimdet.data.loader import TrainLoader
from mimdet.data.shapes import ShapesCOCO
from mimdet.models.roi_heads import mask_targets
from mimdet.models.sampling import Sample, grid_sampler, select
from mimdet.models.vit import Encoder, FewTokensAttention
from mimdet.structures import (
    as_rle,
    bitmap_to_rle,
    crops_to_bitmaps,
    paste,
    probabilities_to_rle,
    rle_to_bitmap,
)

IMAGES, DETECTIONS, OBJECTS, CLASSES = 60, 100, 7, 80
HEIGHT, WIDTH = 480, 640


def interleaved(
    sides: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, float], Any]:
    """Side -> median CPU seconds, in turns, after one run each that does not count; and what each
    returned first."""
    found = {name: run() for name, run in sides.items()}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            begin = time.process_time()
            run()
            spent[name].append(time.process_time() - begin)
    return {name: median(times) for name, times in spent.items()}, found


def row(
    what: str, seconds: dict[str, float], ratio: float, goal: float, equal: str, most: bool = False
) -> dict[str, Any]:
    """A row of the table. most: the ratio should be at most the goal, not at least."""
    return {
        "what": what,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "ratio": round(ratio, 3),
        "goal": goal,
        "reached": bool(ratio <= goal if most else ratio >= goal),
        "equal": equal,
    }


# ------------------------------------------------------------------------------- evaluation


def random_boxes(rng: np.random.Generator, count: int) -> Tensor:
    """(count, 4) xyxy inside the image, sides as COCO's: most of them small."""
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * np.maximum(1, [WIDTH, HEIGHT] - sides)
    boxes = np.concatenate([corner, corner + sides], axis=1)
    return torch.tensor(boxes, dtype=torch.float32).clamp(max=HEIGHT)


def detections() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO ground truth, and per image what a detector found: boxes, mask probabilities, ..."""
    rng = np.random.default_rng(0)
    across = torch.linspace(-1, 1, 28)
    disc = (1.2 - across[:, None] ** 2 - across**2).clamp(0, 1)
    truth: dict[str, Any] = {"images": [], "annotations": []}
    truth["categories"] = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CLASSES)]
    found = []
    for image in range(1, IMAGES + 1):
        truth["images"].append({"id": image, "height": HEIGHT, "width": WIDTH})
        boxes = random_boxes(rng, OBJECTS)
        kinds = rng.integers(1, CLASSES + 1, OBJECTS)
        masks = probabilities_to_rle(disc.expand(OBJECTS, -1, -1), boxes, HEIGHT, WIDTH)
        for box, kind, rle in zip(boxes.tolist(), kinds.tolist(), masks, strict=True):
            x, y, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
            area = float(rle_to_bitmap(rle).sum())
            entry: dict[str, Any] = {
                "id": len(truth["annotations"]) + 1,
                "image_id": image,
                "iscrowd": 0,
            }
            entry |= {"category_id": kind, "bbox": [x, y, width, height], "area": area}
            truth["annotations"].append(entry | {"segmentation": rle})
        near = boxes.repeat(DETECTIONS // OBJECTS + 1, 1)[:DETECTIONS]
        shift = torch.tensor(rng.normal(0, 6, near.shape), dtype=torch.float32)
        moved = near + shift
        low, high = moved[:, :2].clamp(min=0), torch.maximum(moved[:, 2:], moved[:, :2] + 4)
        noise = torch.tensor(rng.uniform(-0.2, 0.2, (DETECTIONS, 28, 28)), dtype=torch.float32)
        found.append(
            {
                "image": image,
                "boxes": torch.cat([low, torch.maximum(high, low + 4)], dim=1),
                "masks": (disc + noise).clamp(0, 1),
                "scores": rng.uniform(0, 1, DETECTIONS),
                "kinds": np.where(
                    rng.uniform(0, 1, DETECTIONS) < 0.5,
                    np.resize(kinds, DETECTIONS),
                    rng.integers(1, CLASSES + 1, DETECTIONS),
                ),
            }
        )
    return truth, found


def results(found: list[dict[str, Any]], encode: Callable[..., Any]) -> list[dict[str, Any]]:
    """COCO results; encode: (probabilities, boxes, height, width) -> run lengths."""
    entries = []
    for one in found:
        rles = encode(one["masks"], one["boxes"], HEIGHT, WIDTH)
        for box, rle, score, kind in zip(
            one["boxes"].tolist(), rles, one["scores"].tolist(), one["kinds"].tolist(), strict=True
        ):
            entry = {"image_id": one["image"], "category_id": kind, "score": score}
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            entries.append(entry | {"bbox": sides, "segmentation": rle})
    return entries


def torchvision_rle(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[Any]:
    """What one writes with torchvision: every mask a full image, then encoded."""
    bitmaps = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0] > 0.5
    return [bitmap_to_rle(bitmap) for bitmap in bitmaps]


def pycocotools_metrics(truth: dict[str, Any], entries: list[dict[str, Any]]) -> list[float]:
    """The 24 numbers, boxes first."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, dropped in (("bbox", "segmentation"), ("segm", "bbox")):
            api = COCO()
            api.dataset = copy.deepcopy(truth)
            api.createIndex()
            # With both fields, pycocotools takes a mask's area from the box.
            own = [{k: v for k, v in entry.items() if k != dropped} for entry in entries]
            evaluation = COCOeval(api, api.loadRes(own), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers += evaluation.stats.tolist()
    return numbers


def kit_metrics(truth: dict[str, Any], entries: list[dict[str, Any]]) -> list[float]:
    """The same 24 by the kit."""
    found = coco_metrics(truth, entries)
    return [kind[name] for kind in (found.box, found.mask) for name in list(COLUMNS)[:12]]


def largest_difference(a: list[float], b: list[float]) -> float:
    return float(np.abs(np.nan_to_num(a, nan=-1) - np.nan_to_num(b, nan=-1)).max())


def many(truth: dict[str, Any], entries: list[dict[str, Any]], times: int) -> tuple[Any, Any]:
    """Truth and results of the same images again and again, under new ids."""
    images, own, found = [], [], []
    for turn in range(times):
        more = {"image_id": turn * IMAGES, "id": turn * len(truth["annotations"])}
        images += [image | {"id": image["id"] + more["image_id"]} for image in truth["images"]]
        for entry in truth["annotations"]:
            own.append(entry | {name: entry[name] + offset for name, offset in more.items()})
        found += [entry | {"image_id": entry["image_id"] + more["image_id"]} for entry in entries]
    return truth | {"images": images, "annotations": own}, found


def evaluation(repeats: int) -> list[dict[str, Any]]:
    """Masks to run lengths, metrics, and both: against torchvision and pycocotools."""
    truth, found = detections()
    entries = results(found, probabilities_to_rle)
    both = {
        "kit": lambda: kit_metrics(truth, results(found, probabilities_to_rle)),
        "torchvision + pycocotools": lambda: pycocotools_metrics(
            truth, results(found, torchvision_rle)
        ),
    }
    metrics = {
        "kit": lambda: kit_metrics(truth, entries),
        "pycocotools": lambda: pycocotools_metrics(truth, entries),
    }
    one = found[0]
    pasted = paste(one["masks"], one["boxes"], HEIGHT, WIDTH).numpy()
    ours = np.stack([rle_to_bitmap(entry["segmentation"]) for entry in entries[:DETECTIONS]])
    pixels = f"{(pasted != ours).sum()} of {pasted.sum()} mask pixels differ from grid_sample's"
    rows = []
    named = {"metrics": (metrics, 1.0), "whole evaluation": (both, 20.0)}
    for name, (sides, goal) in named.items():
        seconds, numbers = interleaved(sides, repeats)
        own, other = seconds.values()
        equal = f"24 numbers, largest difference {largest_difference(*numbers.values()):.1e}"
        if sides is both:  # torchvision's masks are half a pixel off those of the paper's code
            equal = f"metrics: see above; {pixels}"
        what = f"{name}, {IMAGES} images x {DETECTIONS}"
        rows.append(row(what, seconds, other / own, goal, equal))
    times = 5000 // IMAGES
    seconds, numbers = interleaved({"kit": partial(kit_metrics, *many(truth, entries, times))}, 1)
    once = largest_difference(numbers["kit"][:6], kit_metrics(truth, entries)[:6])
    equal = f"AP of the images once and {times} times: largest difference {once:.1e}"
    what = f"metrics of {times * IMAGES:,} images x {DETECTIONS}, seconds"
    rows.append(row(what, seconds, seconds["kit"], 5.5, equal, most=True))
    return rows


# ------------------------------------------------------------------------------- data


def jpegs(folder: Path, count: int) -> DataConfig:
    """Scenes of 640 pixels as a COCO data set: JPEG files, polygons of about 40 points."""
    from PIL import Image

    scenes = ShapesCOCO("shapes-v2-medium", size=WIDTH, length=count, split="train")
    truth = scenes.ground_truth()
    (folder / "images").mkdir()
    for entry in truth["images"]:
        entry["file_name"] = f"{entry['id']:06d}.jpg"
        image = Image.fromarray(scenes.scene(entry["id"]).image)
        image.save(folder / "images" / entry["file_name"], quality=90)
        masks = scenes[entry["id"]].target.masks
        assert masks is not None
        outlines = mask_outlines(masks.bitmaps.float(), masks.boxes, (WIDTH, WIDTH))
        objects = [one for one in truth["annotations"] if one["image_id"] == entry["id"]]
        for annotation, rings in zip(objects, outlines, strict=True):
            thinned = [np.reshape(ring, (-1, 2))[:: max(1, len(ring) // 80)] for ring in rings]
            annotation["segmentation"] = [points.flatten().tolist() for points in thinned]
    (folder / "annotations.json").write_text(json.dumps(truth))
    return DataConfig(
        source="coco",
        train_json=str(folder / "annotations.json"),
        train_images=str(folder / "images"),
        workers=0,
    )


def torchvision_images(cfg: DataConfig) -> Any:
    """torchvision's reference for detection, with the paper's sizes: `data[i]`."""
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    crop = v2.Compose(
        [v2.RandomShortestSize(list(cfg.crop_short_sides)), v2.RandomCrop(cfg.crop_sides[0])]
    )
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([crop], cfg.crop_probability),
            v2.RandomShortestSize(list(cfg.short_sides), cfg.max_side),
            v2.ToDtype(torch.float32, scale=True),
            v2.SanitizeBoundingBoxes(),
        ]
    )
    data = CocoDetection(cfg.train_images, cfg.train_json, transforms=transform)
    return wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels", "masks"))


def loader(repeats: int) -> list[dict[str, Any]]:
    """Images a second and core that are read, augmented and brought to size with their masks."""
    count = 16
    with tempfile.TemporaryDirectory() as folder:
        cfg = jpegs(Path(folder), count)
        data = build_dataset(cfg, "train", 0)
        reference = torchvision_images(cfg)
        ours = TrainLoader(data, cfg, 4, count // 4, 0)
        sides = {
            "kit": lambda: next(iter(ours.batches(0, 1))),
            "torchvision": lambda: [reference[i] for i in range(count)],
        }
        seconds, _ = interleaved(sides, repeats)
        plain = copy.deepcopy(cfg)
        plain.augment, plain.test_short_side = "none", WIDTH  # the scenes' own size
        record = build_dataset(plain, "train", 0)[0]
        assert record.target.masks is not None
        masks = crops_to_bitmaps(record.target.masks, *record.image.shape[1:])
        truth = reference._dataset.coco.imgToAnns[record.image_id]
        rles = [as_rle(one["segmentation"], WIDTH, WIDTH) for one in truth]
        known = np.stack([rle_to_bitmap(rle) for rle in rles])
        iou = (masks.numpy() & known).sum() / (masks.numpy() | known).sum()
    equal = f"masks of an image without augmentation: IoU {iou:.3f}"
    return [row("loader, a core", seconds, seconds["torchvision"] / seconds["kit"], 4.0, equal)]


def targets(repeats: int) -> list[dict[str, Any]]:
    """Mask targets of 128 proposals, against roi_align on masks of the whole image."""
    record = ShapesCOCO("shapes-v2-medium", size=WIDTH, length=1, split="train")[0]
    crops = record.target.masks
    assert crops is not None
    full = crops_to_bitmaps(crops, *record.image.shape[1:])
    rng = np.random.default_rng(1)
    index = torch.tensor(rng.integers(0, len(full), 128))
    shift = torch.tensor(rng.normal(0, 2, (128, 4)), dtype=torch.float32)
    boxes = record.target.boxes[index] + shift
    rois = torch.cat([index[:, None].float(), boxes], dim=1)
    sides = {
        "kit": lambda: mask_targets(crops, index, boxes),
        "full masks": lambda: roi_align(full[:, None].float(), rois, 28, 1.0, -1)[:, 0] >= 0.5,
    }
    seconds, found = interleaved(sides, 5 * repeats)
    ours, theirs = (value.bool() for value in found.values())
    iou = float((ours & theirs).sum() / (ours | theirs).sum())
    ratio = seconds["full masks"] / seconds["kit"]
    return [row("mask targets of 128 proposals", seconds, ratio, 10.0, f"IoU {iou:.3f}")]


# ------------------------------------------------------------------------------- encoder


def encoder(repeats: int) -> list[dict[str, Any]]:
    """ViT-B blocks on a sample of 1,600 tokens: what share of the ideal, by multiply-adds."""
    torch.manual_seed(0)
    depth, dim, side = 2, 768, 40
    net = Encoder(dim, depth, 12)
    tokens = torch.rand(1, side * side, dim)
    samples = {ratio: sampled(tokens, side, ratio) for ratio in (1.0, 0.5, 0.25)}

    def step(sample: Sample) -> Tensor:
        found = net(tokens, sample)[0]
        found.square().mean().backward()
        net.zero_grad()
        return found.detach()

    sides = {f"ratio {ratio:g}": partial(step, sample) for ratio, sample in samples.items()}
    seconds, _ = interleaved(sides, repeats)
    full = transformer_cost(side * side, dim, depth)
    rows = []
    for ratio in (0.5, 0.25):
        kept = len(samples[ratio].keep[0])
        ideal = full / transformer_cost(kept, dim, depth)
        gained = seconds["ratio 1"] / seconds[f"ratio {ratio:g}"]
        with torch.no_grad():  # each sampled token is one of those that a smaller image would have
            alone = net.norm(run_alone(net, tokens, samples[ratio]))
            error = float((net(tokens, samples[ratio])[0] - alone[0]).abs().max())
        what = f"encoder at {ratio:g}: {gained:.2f}x of an ideal {ideal:.2f}x"
        times = {name: seconds[name] for name in ("ratio 1", f"ratio {ratio:g}")}
        equal = f"tokens alone: largest difference {error:.0e}"
        rows.append(row(what, times, gained / ideal, 0.95, equal))
    return rows


def sampled(tokens: Tensor, side: int, ratio: float) -> Sample:
    scores = grid_sampler(tokens[0], (side, side), torch.Generator().manual_seed(0))
    return select([scores], [(side, side)], (side, side), ratio)


def run_alone(net: Encoder, tokens: Tensor, sample: Sample) -> Tensor:
    from mimdet.models.vit import resize_table

    x = (tokens + resize_table(net.pos_embed, sample.grid))[:, sample.keep[0]]
    for block in net.blocks:
        x = block(x)
    return x


def attention(repeats: int) -> list[dict[str, Any]]:
    """Attention that learns in bfloat16 on a CPU: the kit's against timm's own."""
    rows = []
    for images, tokens in ((4, 128), (4, 256), (32, 257)):
        torch.manual_seed(0)
        layer = FewTokensAttention(128, 4, qkv_bias=True)
        theirs = Attention(128, 4, qkv_bias=True)
        theirs.load_state_dict(layer.state_dict())
        x = torch.randn(images, tokens, 128, requires_grad=True)

        def step(layer: torch.nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                found: Tensor = layer(x)
            found.float().square().mean().backward()
            return found.detach()

        sides = {"timm": partial(step, theirs, x), "kit": partial(step, layer, x)}
        seconds, found = interleaved(sides, 5 * repeats)
        error = float((found["kit"] - found["timm"]).abs().max())
        equal = f"largest difference {error:.0e} of {float(found['timm'].abs().max()):.1f}"
        what = f"attention of {images} x {tokens} tokens learning in bfloat16"
        rows.append(row(what, seconds, seconds["timm"] / seconds["kit"], 1, equal))
    return rows


CASES = (evaluation, loader, targets, encoder, attention)
