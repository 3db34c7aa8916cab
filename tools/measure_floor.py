"""What ShapesCOCO holds, and what colour alone finds: `python tools/measure_floor.py [--out FILE]`.

Small is a COCO-small object at this scene size, occluded one with less than 95 % visible. A colour
threshold and connected components, each classified by its hue, on the scenes the demo is
evaluated on. A benchmark on which this scored well would be a toy.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from mimdet.analysis.floor import threshold_floor
from mimdet.analysis.metrics import coco_metrics
from mimdet.data.shapes import LEVELS, ShapesCOCO

SMALL = 32**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    levels = {}
    for level in LEVELS:
        dataset = ShapesCOCO(level, 128, 200, "val")
        start = time.process_time()
        scenes = [dataset.scene(index) for index in range(len(dataset))]
        seconds = (time.process_time() - start) / len(scenes)
        areas = np.concatenate([scene.masks.sum((1, 2)) for scene in scenes])
        visible = np.concatenate([scene.visible for scene in scenes])
        results = threshold_floor(dataset, ShapesCOCO(level, 128, 200, "train"))
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
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
