"""What tiles are worth on a large picture: drawn scenes side by side, whole and in tiles.

    python tools/measure_tiles.py notebooks/results/tiles.json

The shipped detector `tiny` saw scenes of 128 pixels at twice that size. Of a mosaic of 8 x 8 such
scenes, 1,024 pixels wide, whose truth is that of the scenes, the json holds AP and the CPU seconds
of a picture for each way to look at it. `--scenes 4` takes smaller mosaics, `--mosaics 2` fewer.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mimdet
from mimdet.analysis.evaluate import results_for
from mimdet.analysis.metrics import coco_metrics
from mimdet.data.annotations import AnnotatedImages, Annotation, RunLengths
from mimdet.data.shapes import ShapesCOCO
from mimdet.experiments.results import hardware_text
from mimdet.files import write_json
from mimdet.models.detector import Detector
from mimdet.structures import as_rle, bitmap_to_rle, rle_to_bitmap

WAYS: dict[str, dict[str, int]] = {
    "whole, as it was trained": {},
    "whole, 512 pixels, at most 500": {"short_side": 512, "detections": 500},
    "whole, 1,024 pixels, at most 500": {"short_side": 1024, "detections": 500},
    "whole, 2,048 pixels, at most 500": {"short_side": 2048, "detections": 500},
    "tiles of 512": {"tile": 512, "detections": 200},
    "tiles of 256": {"tile": 256, "detections": 100},
    "tiles of 256 at twice the size": {"tile": 256, "short_side": 512, "detections": 100},
    "tiles of 512 at twice the size": {"tile": 512, "short_side": 1024, "detections": 200},
}
"""Name -> options of `mimdet.predict`."""


class Mosaic(AnnotatedImages):
    """Pictures of `side` x `side` scenes without a gap, for evaluation."""

    def __init__(self, scenes: ShapesCOCO, side: int) -> None:
        self.scenes, self.side = scenes, side
        self.categories, self.category_ids = scenes.categories, scenes.category_ids
        self.has_masks, self.area_scale = True, scenes.area_scale  # small means what it does there
        self.version = f"{scenes.version}, mosaics of {side} x {side}"

    def __len__(self) -> int:
        return len(self.scenes) // self.side**2

    def image_id(self, index: int) -> int:
        return index

    def image_size(self, index: int) -> tuple[int, int]:
        return self.side * self.scenes.size, self.side * self.scenes.size

    def places(self, index: int) -> list[tuple[int, int, int]]:
        """Scene, top and left of each."""
        first, size = index * self.side**2, self.scenes.size
        cells = [divmod(i, self.side) for i in range(self.side**2)]
        return [(first + i, size * row, size * column) for i, (row, column) in enumerate(cells)]

    def image(self, index: int) -> torch.Tensor:
        size = self.scenes.size
        whole = torch.zeros(3, *self.image_size(index), dtype=torch.uint8)
        for scene, top, left in self.places(index):
            whole[:, top : top + size, left : left + size] = self.scenes[scene].image
        return whole

    def annotations(self, index: int) -> list[Annotation]:
        found, size = [], self.scenes.size
        for scene, top, left in self.places(index):
            for own in self.scenes.annotations(scene):
                x, y, w, h = own.bbox
                bitmap = np.zeros(self.image_size(index), bool)
                inside = rle_to_bitmap(as_rle(own.mask, size, size))
                bitmap[top : top + size, left : left + size] = inside
                runs = bitmap_to_rle(bitmap)
                mask = RunLengths(size=runs["size"], counts=runs["counts"])
                moved = Annotation("", own.category_id, (x + left, y + top, w, h), own.area, False)
                moved.mask = mask
                found.append(moved)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--mosaics", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = mimdet.load_detector("tiny")
    count = options.mosaics * options.scenes**2
    scenes = ShapesCOCO(size=128, length=count, split="val")
    mosaic = Mosaic(scenes, options.scenes)
    rows = [row("the scenes one by one", model, scenes, {})]
    rows += [row(name, model, mosaic, way) for name, way in WAYS.items()]
    about: dict[str, Any] = {
        "command": f"python tools/measure_tiles.py {options.out}",
        "data": mosaic.version,
    }
    about |= {"objects": sum(len(mosaic.annotations(i)) for i in range(len(mosaic)))}
    about |= {"pixels": mosaic.image_size(0)[0], "hardware": hardware_text([])}
    write_json(options.out, about | {"torch": torch.__version__, "rows": rows})


def row(name: str, model: Detector, dataset: Any, way: dict[str, int]) -> dict[str, Any]:
    """What the images are found to hold in one way, in AP x 100 and seconds an image."""
    images = [dataset.image(i) for i in range(len(dataset))]
    began = time.process_time()
    found = mimdet.predict(model, images, **way)
    seconds = (time.process_time() - began) / len(images)
    results: list[dict[str, Any]] = []
    for index, own in enumerate(found):
        results += results_for(own, dataset.image_id(index), dataset.category_ids, True)
    metrics = coco_metrics(dataset.ground_truth(), results, area_scale=dataset.area_scale)
    aps = {f"box_{part}": metrics.box[part] for part in ("AP", "AP50", "AP_small")}
    aps["mask_AP"] = metrics.mask["AP"]
    numbers = {part: round(100 * ap, 1) for part, ap in aps.items()}
    made = {"what": name, "options": way, "images": len(images), "cpu_seconds": round(seconds, 2)}
    print(made | numbers, flush=True)
    return made | numbers


if __name__ == "__main__":
    main()
