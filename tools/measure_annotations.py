"""What it costs to read annotations: `python tools/measure_annotations.py [--out FILE]`.

Writes a file of COCO's size (118,000 images, 860,000 annotations with polygons of about 25 points,
1 % of them crowds as run lengths) beside images of which only the headers are sound, then lets a
process each make its table, open the table again, and check it (`mimdet check-data --no-decode`).
Seconds are those of the processor, memory is the most that a process held, its imports included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mimdet.files import write_json

SIZES = ((480, 640), (640, 480), (427, 640), (640, 427))
"""(height, width) of the images, in turn."""
MASKS = 2000
"""Different masks of each size of image; the annotations repeat them."""
READ = "from mimdet.data.coco import CocoDataset; CocoDataset({json!r}, {images!r})[0]"
CHECK = (
    "from mimdet.data.checks import check_dataset\n"
    "report = check_dataset({json!r}, {images!r}, decode=False)\n"
    "assert not report.errors, report.table()"
)
STEPS = {"make the table": READ, "open it again": READ, "check-data": CHECK}


def write_annotations(folder: Path, images: int, annotations: int) -> tuple[Path, Path]:
    """-> (json file, image folder); the same content for the same numbers."""
    from PIL import Image

    rng = np.random.default_rng(0)
    files = folder / "images"
    files.mkdir()
    masks = []
    for number, (height, width) in enumerate(SIZES):
        Image.new("RGB", (width, height)).save(folder / f"{number}.png")
        masks.append([_mask(rng, height, width) for _ in range(MASKS)])
    entries = []
    for number in range(images):
        height, width = SIZES[number % len(SIZES)]
        name = f"{number:012d}.png"
        os.link(folder / f"{number % len(SIZES)}.png", files / name)
        entry = {"id": number, "file_name": name, "height": height, "width": width}
        entries.append(json.dumps(entry))
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 81)]
    of_image = np.sort(rng.integers(0, images, annotations))[rng.permutation(annotations)]
    kinds = rng.integers(1, 81, annotations)
    picked = rng.integers(0, MASKS, annotations)
    with (folder / "instances.json").open("w") as file:
        file.write(f'{{"images": [{", ".join(entries)}], "annotations": [')
        for number, (image, kind, mask) in enumerate(zip(of_image, kinds, picked, strict=True)):
            text = masks[image % len(SIZES)][mask]
            comma = ", " if number else ""
            ids = f'"id": {number + 1}, "image_id": {image}, "category_id": {kind}'
            file.write(f"{comma}{{{ids}, {text}}}")
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return folder / "instances.json", files


def _mask(rng: np.random.Generator, height: int, width: int) -> str:
    """bbox, area, iscrowd and segmentation of one object as json, without braces."""
    from pycocotools import mask as coco_mask

    points = round(float(np.clip(rng.lognormal(np.log(25), 0.6), 4, 200)))
    radius = rng.uniform(8, 0.45 * min(height, width))
    centre = rng.uniform(radius, [width - radius, height - radius])
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    spokes = radius * rng.uniform(0.6, 1, points)
    ring = centre + spokes[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)  # (points, 2)
    flat = ring.round(2).ravel().tolist()
    runs = coco_mask.merge(coco_mask.frPyObjects([flat], height, width))
    mask: dict[str, Any] = {"bbox": [*ring.min(0).round(2), *np.ptp(ring, 0).round(2)]}
    mask |= {"area": float(coco_mask.area(runs)), "iscrowd": int(rng.random() < 0.01)}
    mask["segmentation"] = [flat]
    if mask["iscrowd"]:
        pixels = coco_mask.decode(runs).ravel(order="F")
        edges = np.flatnonzero(np.diff(pixels)) + 1
        counts = np.diff(edges, prepend=0, append=pixels.size).tolist()
        mask["segmentation"] = {"size": [height, width], "counts": counts}
    return json.dumps(mask)[1:-1]


def measure(command: str, cache: Path) -> dict[str, float]:
    """CPU seconds and peak memory of a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", command],
        env=os.environ | {"MIMDET_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"failed: {command}")
    scale = 1 if sys.platform == "darwin" else 1024
    peak: resource.struct_rusage = usage
    return {
        "cpu_seconds": round(peak.ru_utime + peak.ru_stime, 1),
        "peak_gb": round(peak.ru_maxrss * scale / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--annotations", type=int, default=860_000)
    parser.add_argument("--folder", type=Path, help="where the file goes, and stays")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "instances.json", folder / "images"
        if not paths[0].exists():
            write_annotations(folder, options.images, options.annotations)
        report = {
            "command": "python tools/measure_annotations.py",
            "images": options.images,
            "annotations": options.annotations,
            "file_mb": round(paths[0].stat().st_size / 1e6),
        }
        with tempfile.TemporaryDirectory() as cache:
            for step, command in STEPS.items():
                text = command.format(json=str(paths[0]), images=str(paths[1]))
                report[step] = measure(text, Path(cache))
                print(step, report[step], flush=True)
    if options.out:
        write_json(options.out, report)


if __name__ == "__main__":
    main()
