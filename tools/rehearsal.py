"""Full mode of the notebooks without its downloads: `python tools/notebooks.py rehearse`.

Stand-ins are drawn scenes in COCO's layout and random weights in the layouts of Meta's and the
released files. The class scores of the detector are made large, so that it finds something too.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import mimdet
from mimdet import notebook
from mimdet.data.rasters import extent
from mimdet.downloads import files_named
from mimdet.files import write_json
from mimdet.models.mae import MAE
from mimdet.models.official import coco_classes, export_detectron2
from mimdet.structures import bitmap_to_rle
from tools import notebooks

GREY = 114
IMAGES = {"train": 24, "val": 32}
CROWD_EVERY = 12  # annotations: one of so many is a crowd
SMALL = (
    "backbone.embed_dim=192 backbone.num_heads=3 backbone.depth=2 backbone.decoder_depth=2 "
    "detector.channels=64 detector.box_fc_dim=128 "
)
"""Models of ten million numbers instead of 128."""
CUTS = (
    "rehearsal detector.rpn_pre_nms=200,100 detector.rpn_post_nms=100,50 "
    "detector.rois_per_image=32 detector.detections_per_image=20 "
    "data.short_sides=96,128 data.crop_short_sides=96, data.crop_sides=64,96 data.max_side=224 "
    "data.test_short_side=128 data.limit_val=32 data.workers=1 "
    "training.steps=6 training.warmup_steps=2 training.batch_size=1 training.accumulate=8 "
)
"""MIMDET_FULL for small images, few proposals and a few steps."""
START, END = "<!-- rehearsal -->", "<!-- /rehearsal -->"
STARTS = ("| 0", "| 1")  # of a row: a notebook's number
SKIPPED = " (skipped: the weights are not trained)"
SURE = 40  # times larger than at random: class scores


def make(folder: Path, changes: str) -> None:
    """COCO and weights in a folder that is new, and an environment that leads to them.

    changes: MIMDET_FULL, which also says how large the models of the weights are.
    """
    os.environ[notebook.COCO] = str(folder / "coco")
    os.environ[notebook.WEIGHTS] = str(folder / "weights")
    os.environ[notebook.CHANGES] = changes
    for split, count in IMAGES.items():
        write_coco(folder / "coco", split, count)
    write_weights(folder / "weights")


def write_coco(folder: Path, split: Any, count: int) -> None:
    """`annotations/instances_*2017.json` and `*2017/*.jpg`: photographs' habits are kept. Sizes
    differ, ids have gaps, the first image is grey, the last one is empty, some objects are crowds.
    """
    scenes = mimdet.ShapesCOCO("shapes-v1-medium", 160, length=count, split=split)
    names, ids = coco_classes(80)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    (folder / f"{split}2017").mkdir(parents=True)
    for index in range(count):
        scene, number = scenes.scene(index), 139 + 146 * index
        right, below = (0, 7 * index % 64) if index % 3 == 2 else (11 * index % 97, 0)
        padding = ((0, below), (0, right))
        pixels = np.pad(scene.image, (*padding, (0, 0)), constant_values=GREY)
        picture = Image.fromarray(pixels).convert("L" if index == 0 else "RGB")
        file = f"{number:012d}.jpg"
        picture.save(folder / f"{split}2017" / file, quality=95)
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        images.append({"id": number, "file_name": file, "license": 1, **size})
        drawn = zip(scene.masks, scene.labels, strict=True) if index < count - 1 else ()
        for mask, label in drawn:
            left, top, end, bottom = extent(mask)
            runs = bitmap_to_rle(np.pad(mask, padding))
            objects.append(
                {
                    "id": 1000 + len(objects),
                    "image_id": number,
                    "category_id": ids[6 * int(label)],
                    "bbox": [int(x) for x in (left, top, end - left, bottom - top)],
                    "area": int(mask.sum()),
                    "iscrowd": int(len(objects) % CROWD_EVERY == CROWD_EVERY - 1),
                    "segmentation": {"size": list(pixels.shape[:2]), "counts": text(runs)},
                }
            )
    kinds = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    content = {"images": images, "annotations": objects, "categories": kinds}
    (folder / "annotations").mkdir(exist_ok=True)
    write_json(folder / "annotations" / f"instances_{split}2017.json", content, indent=None)


def text(runs: Any) -> str:
    """Run lengths as a json file holds them."""
    counts = runs["counts"]
    return counts.decode() if isinstance(counts, bytes) else str(counts)


def write_weights(folder: Path) -> None:
    """The released detector and Meta's two autoencoders, of full mode's sizes, at random."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    cfg = notebook.full_recipe()
    detector = mimdet.build_detector(cfg)
    with torch.no_grad():
        detector.roi_heads.box_head.cls_score.weight.mul_(SURE)
    export_detectron2(detector, folder / files_named("mimdet-base")[0].file_name)
    b = cfg.backbone
    sizes = (224, 16, b.embed_dim, b.depth, b.num_heads, b.decoder_dim, 2 * b.decoder_depth)
    for name, normalised in (("mae-base-full", True), ("mae-base-visualize", False)):
        mae = MAE(*sizes, b.decoder_heads, normalised)
        mimdet.save_mae(mae, folder / files_named(name)[0].file_name)


# ------------------------------------------------------------------------------- the rehearsal


def rehearse(chosen: list[Path], out: Path | None = None, real_size: bool = False) -> int:
    """Run the sources in full mode on stand-ins, and print a table; -> how many cells failed.

    real_size: models as wide and deep as the released ones, 128 million parameters. out: a file
    with a table that gets the rows.
    """
    changes = CUTS + ("" if real_size else SMALL)
    rows: dict[str, str] = {}
    failures = 0
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ):
        make(Path(folder).resolve() / "full", changes)
        for source in chosen:
            rows[source.stem], failed = rehearse_one(source)
            print(f"{rows[source.stem]}{''.join(failed)}", flush=True)
            failures += len(failed)
    if out is not None:
        write(out, rows)
    return failures


def write(out: Path, rows: dict[str, str]) -> None:
    """Put rows, by notebook, into the table of a file, which keeps those of other notebooks."""
    text = out.read_text(encoding="utf-8") if out.exists() else START + END
    before, _, rest = text.partition(START)
    table, _, after = rest.partition(END)
    old = {line.split(" | ")[0][2:]: line for line in table.splitlines() if line[:3] in STARTS}
    head = ["notebook", "cells", "failed", "passed", "skipped", "seconds", "GB", "skipped checks"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * 6 + "---|"]
    lines += [line for _, line in sorted((old | rows).items())]
    out.write_text("\n".join([before + START, *lines, END + after]), encoding="utf-8")


def rehearse_one(source: Path) -> tuple[str, list[str]]:
    """-> its row of the table, and what failed: a cell's number and first line, error or check."""
    book = notebooks.read_source(source)
    notebooks.inject(book, MODE="full", SOLUTIONS=True)
    start = time.perf_counter()
    gigabytes = notebooks.execute(book, source.parent.parent, minutes=60)
    seconds = time.perf_counter() - start
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    failed, printed = [], []
    for number, cell in enumerate(cells, start=1):
        lines = notebooks.printed(cell).splitlines()
        errors = [output for output in cell.outputs if output.output_type == "error"]
        wrong = [f"{error.ename}: {error.evalue[:300]}" for error in errors]
        wrong += [line for line in lines if line.startswith("✗ ")]
        where = f"code cell {number}, {notebooks.code_of(cell).splitlines()[0]}"
        failed += [f"\n    {where}\n        {said}" for said in wrong]
        printed += lines
    passed = sum(line.startswith("✓ ") for line in printed)
    skipped = [line[2:] for line in printed if line.startswith("- ") and line.endswith(SKIPPED)]
    names = "; ".join(line.removesuffix(SKIPPED).split(":")[0] for line in skipped)
    numbers = [len(cells), len(failed), passed, len(skipped), f"{seconds:.0f}", f"{gigabytes:.2f}"]
    return f"| {source.stem} | {' | '.join(map(str, numbers))} | {names} |", failed
