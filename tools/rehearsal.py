"""Full mode of the notebooks without its downloads: `python tools/notebooks.py rehearse`.

Stand-ins are drawn scenes in COCO's layout and random weights in the layouts of Meta's and the
released files. The class scores of the detector are made large, so that it finds something too.
With `--gpus 3x80` every process also sees three GPUs of 80 GB that compute on the CPU
(stand_in_gpu.py), and the table says what ran where. What is chosen on machines with 1 to 8 GPUs:
`python -m tools.rehearsal docs/measurements.md`.
"""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import mimdet
from mimdet import notebook
from mimdet.analysis.cost import training_bytes
from mimdet.data.rasters import extent
from mimdet.downloads import files_named
from mimdet.experiments.runs import GPU, places_for, plan
from mimdet.files import write_json
from mimdet.models.mae import MAE
from mimdet.models.official import coco_classes, export_detectron2
from mimdet.models.vit import recompute
from mimdet.processes import pick_device
from mimdet.structures import bitmap_to_rle
from mimdet.training.briefing import briefing, default_processes
from mimdet.training.optim import Schedule
from tools import notebooks, stand_in_gpu

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
SKIPS = ["skipped checks"]
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


def rehearse(
    chosen: list[Path], out: Path | None = None, real_size: bool = False, gpus: str = ""
) -> int:
    """Run the sources in full mode on stand-ins, and print a table; -> how many cells failed.

    real_size: models as wide and deep as the released ones, 128 million parameters. out: a file
    with a table that gets the rows. gpus: such as "3x80", of 80 GB each; "" = the machine's own.
    """
    changes = CUTS + ("" if real_size else SMALL)
    rows: dict[str, str] = {}
    failures = 0
    with tempfile.TemporaryDirectory() as temporary, patch.dict(os.environ):
        folder = Path(temporary).resolve()
        make(folder / "full", changes)
        if gpus:
            pretend(gpus, folder)
        for source in chosen:
            rows[source.stem], failed = rehearse_one(source, gpus)
            print(f"{rows[source.stem]}{''.join(failed)}", flush=True)
            failures += len(failed)
    if out is not None:
        write(out, rows, gpus)
    return failures


def pretend(gpus: str, folder: Path) -> None:
    """Kernels and the kit's processes that start in this environment see such GPUs."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(stand_in_gpu.SITE, encoding="utf-8")
    places = [str(folder / "site"), str(notebooks.ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    os.environ[stand_in_gpu.GPUS], os.environ[stand_in_gpu.LOG] = gpus, str(folder / "log")
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def write(out: Path, rows: dict[str, str], gpus: str = "") -> None:
    """Put rows, by notebook, into the table of a file, which keeps those of other notebooks."""
    mark = f" {gpus} -->" if gpus else " -->"
    start, end = START.replace(" -->", mark), END.replace(" -->", mark)
    text = out.read_text(encoding="utf-8") if out.exists() else start + end
    before, _, rest = text.partition(start)
    table, _, after = rest.partition(end)
    old = {line.split(" | ")[0][2:]: line for line in table.splitlines() if line[:3] in STARTS}
    head = ["notebook", "cells", "failed", "passed", "skipped", "seconds", "GB"]
    head += ["products in bf16, in its kernel", "its other processes"] if gpus else SKIPS
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * 6 + "---|" * (len(head) - 7)]
    lines += [line for _, line in sorted((old | rows).items())]
    out.write_text("\n".join([before + start, *lines, end + after]), encoding="utf-8")


def rehearse_one(source: Path, gpus: str = "") -> tuple[str, list[str]]:
    """-> its row of the table, and what failed: a cell's number and first line, error or check."""
    log = Path(os.environ[stand_in_gpu.LOG]) if gpus else None
    if log is not None:
        log.unlink(missing_ok=True)
    book = notebooks.read_source(source)
    notebooks.inject(book, MODE="full", SOLUTIONS=True)
    if gpus:
        said = "from tools.stand_in_gpu import report\nreport()"
        book.cells.append(notebooks.nbformat.v4.new_code_cell(said))
    start = time.perf_counter()
    gigabytes = notebooks.execute(book, source.parent.parent, minutes=60)
    seconds = time.perf_counter() - start
    cells = [cell for cell in book.cells if cell.cell_type == "code"][: -1 if gpus else None]
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
    names = names if log is None else on_gpus(log)
    numbers = [len(cells), len(failed), passed, len(skipped), f"{seconds:.0f}", f"{gigabytes:.2f}"]
    return f"| {source.stem} | {' | '.join(map(str, numbers))} | {names} |", failed


def on_gpus(log: Path) -> str:
    """The last cells of a row: what its processes say that they did on their GPUs."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kernel, others = "-", Counter[str]()
    for line in lines:
        products = {kind[12:]: n for kind, n in line.items() if kind.startswith("products in ")}
        half = products.get("bfloat16", 0)
        share = f"{half:,} of {sum(products.values()):,}"
        if line["words"] == "ipykernel_launcher":
            kernel = share
            continue
        where = line["CUDA_VISIBLE_DEVICES"] or line["RANK"] or "0"
        asked = ", ".join(kind for kind in line if kind.startswith("asked for "))
        others[f"`{line['words']}` on GPU {where}{', ' + asked if asked else ''}, {share}"] += 1
    return " | ".join([kernel, "; ".join(f"{n} x {what}" for what, n in sorted(others.items()))])


# ------------------------------------------------------------------------------- what is chosen


CHOICES, MACHINES = "<!-- choices -->", ("1x24", "1x80", "3x24", "3x80", "8x80")


def choices(machine: str) -> str:
    """A row: what `mimdet_base` and an experiment would do on a machine such as "3x80".

    Changes this process: torch.cuda speaks of that machine from now on.
    """
    stand_in_gpu.there(machine)
    cfg, device = mimdet.presets.mimdet_base(), pick_device("auto")
    again = recompute(cfg.backbone.checkpointing, device)
    shared, images = default_processes(cfg), cfg.training.batch_size
    with torch.device("meta"):
        model = mimdet.build_detector(cfg)
    size = sum(value.nbytes for value in model.state_dict().values())
    weights = {"": SimpleNamespace(nbytes=size, device=device)}
    run: Any = SimpleNamespace(state_dict=lambda: weights, parameters=model.parameters)
    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(shared)}):
        said = briefing(cfg, Path("runs/base"), Schedule(cfg.training, 117_266), 0, run)
    cfg.backbone.checkpointing = "on" if again else "off"
    once, image = training_bytes(cfg)
    planned = plan(mimdet.presets.tiny(), {"backbone.sample_ratio": [0.25, 0.5]}, 2, runs="runs")
    where = [place[GPU] for place in places_for(planned)]
    cells = [
        machine,
        f"{shared} x {images} x {cfg.training.accumulate // shared}",
        f"{(once + images * image) / 1e9:.0f}, {(once + images * image / 2) / 1e9:.0f}",
        "recomputed" if again else "kept",
        ", ".join(where),
        said.splitlines()[0].removeprefix("device").strip(),
    ]
    return f"| {' | '.join(cells)} |"


def write_choices(out: Path) -> None:
    """The table of what is chosen, between its two marks in a file."""
    before, _, rest = out.read_text(encoding="utf-8").partition(CHOICES)
    head = ["GPUs x GB", "processes x images x micro-batches", "GB by count: fp32, bf16"]
    head += ["activations", "4 runs of an experiment on", "said before the first step"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(choices, MACHINES)]
    end = CHOICES.replace("<!-- ", "<!-- /")
    out.write_text(
        "\n".join([before + CHOICES, *lines, end + rest.partition(end)[2]]), encoding="utf-8"
    )


if __name__ == "__main__":
    write_choices(Path(sys.argv[1]))
