"""What the cells of a notebook share: the first cell, sanity checks, a live figure."""

import io
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mimdet import __version__
from mimdet.config import Config, DataConfig
from mimdet.data.coco import CocoDataset
from mimdet.data.shapes import ShapesCOCO
from mimdet.images import read_image
from mimdet.presets import mimdet_base, tiny
from mimdet.processes import usable_cores
from mimdet.structures import Record, Target
from mimdet.training.trainer import Step, seed_all

if TYPE_CHECKING:
    from mimdet.models.detector import Detector
    from mimdet.models.mae import MAE


MODES = ("quick", "full")
COCO = "MIMDET_COCO"
"""Environment variable that names the folder of COCO 2017, for full mode."""
COCO_LAYOUT = {
    "train_json": "annotations/instances_train2017.json",
    "train_images": "train2017",
    "val_json": "annotations/instances_val2017.json",
    "val_images": "val2017",
}
"""Field of `DataConfig` -> place in that folder, as the official archives unpack."""


# ------------------------------------------------------------------------------- the first cell


def notebook_setup(
    mode: str, *, steps: int = 0, seed: int = 0, minutes: Mapping[str, float] | None = None
) -> Config:
    """Prepare this process, print what a reader should know, and return the mode's Config.

    mode: "quick" (a small detector on drawn scenes, any CPU) or "full" (MIMDet ViT-B on the COCO
    2017 that the environment variable MIMDET_COCO points to, a GPU). steps: training steps, 0 = as
    many as the mode takes. seed: of every generator and of the configuration. minutes: measured
    time of the notebook by mode, for the table. Raises ValueError for an unknown mode or an unset
    variable, FileNotFoundError for a part of COCO that is missing.
    """
    if mode not in MODES:
        raise ValueError(f"MODE={mode!r}: use one of {list(MODES)}")
    cfg = quick_config() if mode == "quick" else full_config()
    cfg.training.steps = steps or cfg.training.steps
    cfg.training.seed = seed
    threads = sensible_threads()
    torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed)
    seed_all(seed)
    estimate = (minutes or {}).get(mode)
    lines = {
        "mode": f"{mode}: preset {cfg.preset}, seed {seed}",
        "device": device_text(threads),
        "versions": versions_text(),
        "time": "not measured" if estimate is None else f"about {estimate:g} min",
        "data": data_text(cfg),
    }
    print("\n".join(f"{name:<9} {text}" for name, text in lines.items()))
    return cfg


def quick_config() -> Config:
    """`tiny` shortened to a minute: easy scenes at 128 px, fewer blocks and head layers.

    The statistics of two images a step are too noisy for BatchNorm, so the heads have GroupNorm
    (box AP of three seeds: 13.8, 11.4 and 15.8 with it; 8.0, 6.6 and 7.8 without).
    """
    from mimdet.data.shapes import LEVELS

    cfg = tiny()
    cfg.data.shapes_level = "shapes-v1-easy"
    cfg.data.shapes_val = 40
    cfg.data.short_sides = (128,)
    cfg.data.test_short_side = 128
    cfg.backbone.depth = 2
    cfg.backbone.decoder_depth = 1
    cfg.detector.num_classes = len(LEVELS[cfg.data.shapes_level].classes)
    cfg.detector.channels = 48
    cfg.detector.anchor_sizes = (12, 24, 48, 96, 192)
    cfg.detector.norm = "GN"
    cfg.detector.box_convs = 0
    cfg.detector.mask_convs = 1
    cfg.detector.rois_per_image = 32
    cfg.training.steps = 280
    cfg.training.batch_size = 2
    cfg.training.accumulate = 1
    cfg.training.reference_batch = 2
    cfg.training.learning_rate = 1.5e-3
    cfg.training.rate_multiplier = 1.0
    cfg.training.betas = (0.9, 0.98)
    cfg.training.warmup_steps = 28
    return cfg


def full_config() -> Config:
    """`mimdet_base` with the COCO paths that the environment variable MIMDET_COCO leads to."""
    value = os.environ.get(COCO, "")
    if not value:
        raise ValueError(
            f"full mode trains on COCO 2017: set the environment variable {COCO} to the folder "
            f"that holds {', '.join(COCO_LAYOUT.values())} (in a cell: %env {COCO}=path), or use "
            'MODE = "quick", which needs no data'
        )
    cfg = mimdet_base()
    for name, place in COCO_LAYOUT.items():
        path = Path(value) / place
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: {COCO}={value} must be the folder that holds "
                f"{', '.join(COCO_LAYOUT.values())}"
            )
        setattr(cfg.data, name, str(path))
    return cfg


def sensible_threads() -> int:
    """CPU threads for small models: OMP_NUM_THREADS if set; one on a small or busy machine; else 4.

    Threads that wait for a core another program uses are slower than a single one.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    cores = usable_cores()
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > cores / 2
    return 1 if cores <= 2 or busy else min(4, cores // 2)


def device_text(threads: int) -> str:
    cpu = f"CPU, {threads} thread{'' if threads == 1 else 's'}"
    if not torch.cuda.is_available():
        return cpu
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB; {cpu}"


def versions_text() -> str:
    import torchvision

    return (
        f"mimdet {__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Python {platform.python_version()}"
    )


def data_text(cfg: Config) -> str:
    if cfg.data.source == "shapes":
        return f"{cfg.data.shapes_level}, {cfg.data.shapes_size} px, drawn on the fly: no files"
    return f"{cfg.data.train_json}, {cfg.data.val_json}"


# ------------------------------------------------------------------------------- sanity checks


def check(text: str, condition: Any, why: str = "") -> None:
    """Print `✓ text: why`, or raise AssertionError with the text when the condition does not hold.

    condition: anything with a truth value, such as a bool or a tensor of one element.
    """
    if not bool(condition):
        raise AssertionError(f"✗ {text}" + (f" ({why})" if why else ""))
    print(f"✓ {text}" + (f": {why}" if why else ""))


# ------------------------------------------------------------------------------- a live figure


def watch(
    steps: Iterable[Step], figure: Callable[[], Any] | None = None, every: float = 3.0
) -> Iterator[Step]:
    """Pass training steps on; redraw one picture of the losses, in a notebook, as they come.

    figure: a function without arguments that returns a matplotlib Figure, for example of the
    current detections; it is drawn below the losses. every: least seconds between two drawings;
    drawing takes at most a tenth of the time. The last state is always drawn, also after an
    interruption, so it is what a saved notebook shows. Outside a notebook nothing is drawn.
    """
    live = LivePicture() if in_notebook() else None
    rows: list[dict[str, Any]] = []
    drawn, due = 0, time.perf_counter() + every
    try:
        for step in steps:
            rows.append({"step": step.number, "loss": step.loss, **step.losses})
            if step.evaluation:
                rows.append({"step": step.number, "evaluation": step.evaluation})
            if live is not None and time.perf_counter() >= due:
                start = time.perf_counter()
                live.show(_pictures(rows, figure))
                drawn, now = len(rows), time.perf_counter()
                due = now + max(every, 9 * (now - start))
            yield step
    finally:
        if isinstance(steps, Generator):
            steps.close()  # a loop that was left early: training saves now, not at some later time
        if live is not None and len(rows) > drawn:
            live.show(_pictures(rows, figure))


def in_notebook() -> bool:
    """True in a process that serves a notebook; a terminal IPython has nowhere to draw."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class LivePicture:
    """One output of a cell that is drawn again and again."""

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, figures: list[Any]) -> None:
        from IPython.display import display

        data, metadata = stacked(figures)
        if self.handle is None:
            self.handle = display(data, metadata=metadata, raw=True, display_id=True)
        else:
            self.handle.update(data, metadata=metadata, raw=True)


def stacked(figures: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures below each other in one picture: (data, metadata) for IPython's display.

    Stored as JPEG where a figure of ours has photographs, as that figure alone would be; else PNG.
    """
    from PIL import Image

    pictures = []
    for figure in figures:
        png = io.BytesIO()
        figure.savefig(png, format="png")
        pictures.append(Image.open(png).convert("RGB"))
    size = (max(p.width for p in pictures), sum(p.height for p in pictures))
    canvas = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    photographs = any(getattr(figure, "has_photographs", False) for figure in figures)
    kind, options = ("jpeg", {"quality": 90, "subsampling": 0}) if photographs else ("png", {})
    file = io.BytesIO()
    canvas.save(file, format=kind, **options)
    alt = " ".join(text for figure in figures if (text := getattr(figure, "alt_text", "")))
    data = {f"image/{kind}": file.getvalue(), "text/plain": alt}
    return data, {f"image/{kind}": {"alt": alt}}


def _pictures(rows: list[dict[str, Any]], figure: Callable[[], Any] | None) -> list[Any]:
    from mimdet.viz.charts import show_training

    losses = show_training(rows)
    return [losses] if figure is None else [losses, figure()]


WEIGHTS = "MIMDET_WEIGHTS"
"""Environment variable that names the folder of `mimdet download`, for full mode."""
FULL_WEIGHTS = {
    "detector": "mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.pth",
    "mae": "mae_visualize_vit_base.pth",
}
DOWNLOADS = {"detector": "mimdet-base", "mae": "mae-base-visualize"}
LEVEL = "shapes-v1-medium"


@dataclass(slots=True)
class Pictures:
    """Images to look at, and the data set they come from."""

    records: list[Record]
    categories: list[str]
    dataset: Any
    """A data set with its truth; None for a single photo."""
    data: DataConfig
    """How a configuration names it: `cfg.data = pictures.data`."""

    @property
    def images(self) -> list[Tensor]:
        """uint8 (3, H, W) each."""
        return [record.image for record in self.records]

    @property
    def targets(self) -> list[Target]:
        return [record.target for record in self.records]


def open_pictures(path: str | Path = "", mode: str = "quick", count: int = 8) -> Pictures:
    """The first `count` pictures a notebook shows.

    path: "" = held-out scenes of ShapesCOCO (quick) or COCO val2017 (full, from the folder in
    MIMDET_COCO); a photo, any image file; or a folder with `annotations.json` (COCO format) and
    `images/`. Raises FileNotFoundError and ValueError that say what is expected.
    """
    _check_mode(mode)
    if path:
        place = Path(path)
        if place.is_dir():
            return _folder(place, count)
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist: give a photo, or a folder of data")
        nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
        photo = Record(read_image(place), nothing, place.name)
        return Pictures([photo], [], None, DataConfig())
    if mode == "full":
        from mimdet.data.coco import build_dataset

        cfg = full_config().data
        return _first(build_dataset(cfg, "val"), count, cfg)
    cfg = DataConfig(source="shapes", shapes_level=LEVEL, shapes_size=128)
    return _first(ShapesCOCO(LEVEL, cfg.shapes_size, cfg.shapes_val, "val"), count, cfg)


def open_detector(mode: str = "quick") -> "Detector":
    """A finished detector in evaluation mode: the shipped `tiny`, or the released MIMDet ViT-B."""
    _check_mode(mode)
    from mimdet.training.run import load_detector

    return load_detector("tiny" if mode == "quick" else _full("detector"))


def open_mae(mode: str = "quick") -> "MAE":
    """A finished autoencoder: the shipped `tiny_mae`, or Meta's ViT-B trained on plain pixels."""
    _check_mode(mode)
    from mimdet.models.weights import load_mae_model

    return load_mae_model("tiny_mae" if mode == "quick" else _full("mae")).eval()


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"MODE={mode!r}: use one of {list(MODES)}")


def _full(kind: str) -> str:
    folder, name = Path(os.environ.get(WEIGHTS, "downloads")), FULL_WEIGHTS[kind]
    if not (folder / name).exists():
        raise FileNotFoundError(
            f"full mode needs {folder / name}: run `mimdet download {DOWNLOADS[kind]}`, or set "
            f"{WEIGHTS} to the folder that holds it"
        )
    return str(folder / name)


def _folder(place: Path, count: int) -> Pictures:
    annotations, images = place / "annotations.json", place / "images"
    if not annotations.is_file() or not images.is_dir():
        raise FileNotFoundError(
            f"{place} must hold annotations.json (COCO format) and images/; "
            "for other layouts use mimdet.CocoDataset(json, images)"
        )
    cfg = DataConfig(source="coco")
    cfg.train_json = cfg.val_json = str(annotations)
    cfg.train_images = cfg.val_images = str(images)
    return _first(CocoDataset(annotations, images), count, cfg)


def _first(dataset: Any, count: int, cfg: DataConfig) -> Pictures:
    if not len(dataset):
        raise ValueError("the data set has no images: look at it with `mimdet check-data`")
    records = [dataset[i] for i in range(min(count, len(dataset)))]
    return Pictures(records, list(dataset.categories), dataset, cfg)
