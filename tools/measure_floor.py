"""What colour alone finds in ShapesCOCO: `python tools/measure_floor.py [--out FILE.json]`.

A colour threshold and connected components, each classified by its hue, on the scenes the demo is
evaluated on. A benchmark on which this scored well would be a toy.
"""

import argparse
import json
from pathlib import Path

from mimdet.analysis.floor import threshold_floor
from mimdet.analysis.metrics import coco_metrics
from mimdet.data.shapes import LEVELS, ShapesCOCO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    floors = {}
    for level in LEVELS:
        dataset = ShapesCOCO(level, 128, 200, "val")
        results = threshold_floor(dataset, ShapesCOCO(level, 128, 200, "train"))
        truth = dataset.ground_truth()
        metrics = coco_metrics(truth, results, ("segm",), dataset.area_scale)
        floors[dataset.version] = round(100 * metrics.mask["AP"], 2)
        print(dataset.version, "mask AP x 100:", floors[dataset.version])
    if options.out:
        report = {"command": "python tools/measure_floor.py", "scenes": 200, "mask_ap": floors}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
