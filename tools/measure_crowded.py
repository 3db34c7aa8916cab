"""What an image with very many objects costs: `python tools/measure_crowded.py [--objects 10000]`.

Two steps of `tiny` on an image of 640 x 640 pixels with so many rectangles, each a polygon of four
corners, read from a COCO file. Prints a line of json: processor seconds of a step, and the most
memory that the process held, its imports included.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import mimdet
from mimdet import presets
from mimdet.config import change

SIDE = 640


def write_data(folder: Path, objects: int) -> None:
    """train.json and val.json (a few of the same objects) of one image of noise."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    image = {"id": 1, "file_name": "noise.png", "height": SIDE, "width": SIDE}
    annotations: list[dict[str, Any]] = []
    for number in range(1, objects + 1):
        (x, y), (w, h) = rng.uniform(0, SIDE - 30, 2), rng.uniform(6, 30, 2)
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        entry = {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": w * h}
        annotations.append(entry | {"bbox": [x, y, w, h], "segmentation": [corners]})
    for name, part in (("train", annotations), ("val", annotations[:8])):
        content = {"images": [image], "categories": [{"id": 1, "name": "box"}], "annotations": part}
        (folder / f"{name}.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=10_000)
    objects = parser.parse_args().objects
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["MIMDET_CACHE"] = str(folder / "cache")
        write_data(folder, objects)
        cfg = presets.tiny()
        change(cfg.data, source="coco", train_images=scratch, val_images=scratch)
        change(cfg.data, train_json=f"{scratch}/train.json", val_json=f"{scratch}/val.json")
        change(cfg.training, steps=2, batch_size=1)
        begin = time.process_time()
        seconds = []
        for _ in mimdet.train(cfg, folder / "run"):
            seconds.append(round(time.process_time() - begin, 1))
            begin = time.process_time()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"objects": objects, "cpu_seconds": seconds, "peak_gb": round(most, 2)}))


if __name__ == "__main__":
    main()
