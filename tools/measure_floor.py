"""What ShapesCOCO holds, and what colour alone finds: `python tools/measure_floor.py [--out FILE]`.

A colour threshold and connected components, each classified by its hue, on the scenes the demo is
evaluated on. It is a floor for the benchmark: a detector that has learned shapes must lie far above
it. Each step is what worked best of several tried (brightness, saturation or local contrast for the
threshold, smoothing first, score by contrast or size alone all give less): a pixel is foreground
when its chroma is far from the image's median (Otsu's threshold), neighbouring foreground pixels of
the same hue band form an object, and its class is the one whose mean hue, measured on training
scenes, is nearest.

Small is a COCO-small object at this scene size, an occluded one less than 95 % visible.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimdet.analysis.metrics import coco_metrics
from mimdet.data.scenes import LEVELS
from mimdet.data.shapes import ShapesCOCO
from mimdet.files import write_json

SMALL = 32**2


def threshold_floor(
    dataset: ShapesCOCO, training: ShapesCOCO, bands: int = 6, least: int = 10
) -> list[dict[str, Any]]:
    """COCO results (image_id, category_id, segmentation as run lengths, bbox, score) of `dataset`.

    training: scenes whose truth gives the mean colour of each class; bands: hue bands, 1 = hue is
    ignored when pixels are joined; least: pixels of the smallest component that counts.
    """
    from pycocotools import mask as coco_mask

    hues = class_hues(training)  # (classes, 2)
    results: list[dict[str, Any]] = []
    for index in range(len(dataset)):
        plane = _hue_plane(dataset.scene(index).image)
        contrast = np.linalg.norm(plane - np.median(plane, axis=(0, 1)), axis=-1)
        foreground = contrast > otsu(contrast)
        band = np.floor((np.arctan2(plane[..., 1], plane[..., 0]) / (2 * np.pi)) % 1.0 * bands)
        components = connected_components(np.where(foreground, band.astype(np.int64) + 1, 0))
        for number in range(1, components.max() + 1):
            mask = components == number
            pixels = int(mask.sum())
            if pixels < least:
                continue
            likeness = hues @ _unit(plane[mask].mean(0))
            runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            salience = contrast[mask].mean() / 255 * np.sqrt(pixels / mask.size)
            results.append(
                {
                    "image_id": dataset.image_id(index),
                    "category_id": dataset.category_ids[int(likeness.argmax())],
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                    "bbox": coco_mask.toBbox(runs).tolist(),
                    "score": float(salience * max(likeness.max(), 0.0)),
                }
            )
    return results


def class_hues(training: ShapesCOCO) -> NDArray[np.float64]:
    """(classes, 2): the mean hue of each class as a unit vector, over the objects of `training`."""
    total = np.zeros((len(training.categories), 2))
    for index in range(len(training)):
        scene = training.scene(index)
        plane = _hue_plane(scene.image)
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            total[label] += _unit(plane[mask].mean(0))
    return np.stack([_unit(row) for row in total])


def otsu(values: NDArray[np.float64], bins: int = 128) -> float:
    """The threshold that splits values into the two groups with the least spread inside."""
    counts, edges = np.histogram(values, bins)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * middles)
    gap = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1 + int(np.argmax(below * above * gap**2))])


def connected_components(bands: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the 4-connected regions of equal value; (H, W) -> (H, W), 1..n; 0 stays 0."""
    places = np.arange(bands.size).reshape(bands.shape)
    down = (bands[1:] == bands[:-1]) & (bands[1:] > 0)
    right = (bands[:, 1:] == bands[:, :-1]) & (bands[:, 1:] > 0)
    first = np.concatenate([places[:-1][down], places[:, :-1][right]])
    second = np.concatenate([places[1:][down], places[:, 1:][right]])
    root = places.ravel().copy()
    while (root[first] != root[second]).any():
        low = np.minimum(root[first], root[second])
        np.minimum.at(root, root[first], low)
        np.minimum.at(root, root[second], low)
        while (root != root[root]).any():
            root = root[root]
    numbers = np.zeros(bands.size, dtype=np.int64)
    used = bands.ravel() > 0
    numbers[used] = np.unique(root[used], return_inverse=True)[1].ravel() + 1
    return numbers.reshape(bands.shape)


def _hue_plane(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W, 3) RGB -> (H, W, 2): direction = hue (red along the first axis), length = chroma."""
    red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
    return np.stack([red - (green + blue) / 2, (green - blue) * np.sqrt(0.75)], axis=-1)


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    levels = {}
    for level in LEVELS:
        dataset = ShapesCOCO(level, 0, 200, "val")
        start = time.process_time()
        scenes = [dataset.scene(index) for index in range(len(dataset))]
        seconds = (time.process_time() - start) / len(scenes)
        areas = np.concatenate([scene.masks.sum((1, 2)) for scene in scenes])
        visible = np.concatenate([scene.visible for scene in scenes])
        results = threshold_floor(dataset, ShapesCOCO(level, 0, 200, "train"))
        truth = dataset.ground_truth()
        metrics = coco_metrics(truth, results, ("segm",), dataset.area_scale)
        levels[dataset.version] = {
            "mask_ap": round(100 * metrics.mask["AP"], 2),
            "small": round(float(np.mean(areas < SMALL * dataset.area_scale)), 3),
            "occluded": round(float(np.mean(visible < 0.95)), 3),
            "milliseconds_a_scene": round(1000 * seconds, 1),
        }
        print(dataset.version, levels[dataset.version])
    if options.out:
        report = {"command": "python tools/measure_floor.py", "scenes": 200, "levels": levels}
        write_json(options.out, report)


if __name__ == "__main__":
    main()
