"""What the cells of a notebook share: the first cell, checks, answers, a live figure."""

import ast
import linecache
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from mimdet import __version__
from mimdet.config import Config, DataConfig, change
from mimdet.data.coco import build_dataset
from mimdet.data.scenes import LEVELS
from mimdet.downloads import files_named
from mimdet.images import read_image
from mimdet.presets import mimdet_base, tiny
from mimdet.processes import usable_cores
from mimdet.structures import Record, Target
from mimdet.training.trainer import Step, seed_all

if TYPE_CHECKING:
    from mimdet.models.detector import Detector
    from mimdet.models.mae import MAE


COCO = "MIMDET_COCO"
"""Environment variable that names the folder of COCO 2017, for full mode."""
COCO_LAYOUT = {
    "train_json": "annotations/instances_train2017.json",
    "train_images": "train2017",
    "val_json": "annotations/instances_val2017.json",
    "val_images": "val2017",
}
"""Field of `DataConfig` -> file or folder in that folder, as the official archives unpack."""
STRICT = "MIMDET_STRICT_CHECKS"
"""Environment variable: where it is set, as tests do, a check that fails ends its notebook."""


# ------------------------------------------------------------------------------- the first cell


@contextmanager
def in_one_line() -> Iterator[None]:
    """Inside, what is wrong with an input is one line in a notebook, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = f"{type(error).__name__}: {error}"
        vars(error)["_render_traceback_"] = lambda: [line]
        raise


@in_one_line()
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
    cfg = quick_config() if _is_quick(mode) else full_config()
    cfg.training.steps = steps or cfg.training.steps
    cfg.training.seed = seed
    threads = sensible_threads()
    torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed)
    seed_all(seed)
    estimate = (minutes or {}).get(mode)
    device, data = f"CPU, {threads} thread{'' if threads == 1 else 's'}", cfg.data
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        device = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB; {device}"
    drawn = f"{data.shapes_level}, {data.shapes_size} px, drawn on the fly: no files"
    lines = {
        "mode": f"{mode}: preset {cfg.preset}, seed {seed}",
        "device": device,
        "versions": f"mimdet {__version__}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}",
        "time": "not measured" if estimate is None else f"about {estimate:g} min",
        "data": drawn if data.source == "shapes" else f"{data.train_json}, {data.val_json}",
    }
    print("\n".join(f"{name:<9} {text}" for name, text in lines.items()))
    return cfg


def quick_config() -> Config:
    """`tiny` shortened to a minute: easy scenes at 128 px, fewer blocks and head layers.

    The statistics of two images a step are too noisy for BatchNorm, so the heads have GroupNorm
    (box AP of three seeds: 13.8, 11.4 and 15.8 with it; 8.0, 6.6 and 7.8 without).
    """
    cfg = tiny()
    change(cfg.data, shapes_level="shapes-v1-easy", shapes_val=40)
    change(cfg.data, short_sides=(128,), test_short_side=128)
    change(cfg.backbone, depth=2, decoder_depth=1)
    cfg.detector.num_classes = len(LEVELS[cfg.data.shapes_level].classes)
    change(cfg.detector, channels=48, anchor_sizes=(12, 24, 48, 96, 192), norm="GN")
    change(cfg.detector, box_convs=0, mask_convs=1, rois_per_image=32)
    change(cfg.training, steps=280, warmup_steps=28)
    change(cfg.training, batch_size=2, accumulate=1, reference_batch=2)
    change(cfg.training, learning_rate=1.5e-3, rate_multiplier=1.0, betas=(0.9, 0.98))
    return cfg


def full_config() -> Config:
    """`mimdet_base` with the COCO paths that the environment variable MIMDET_COCO leads to."""
    folder = os.environ.get(COCO, "")
    layout = ", ".join(COCO_LAYOUT.values())
    if not folder:
        raise ValueError(
            f"full mode trains on COCO 2017: set the environment variable {COCO} to the folder "
            f"that holds {layout} (in a cell: %env {COCO}=path), or use "
            'MODE = "quick", which needs no data'
        )
    cfg = mimdet_base()
    for name, part in COCO_LAYOUT.items():
        path = Path(folder, part)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: {COCO}={folder} must be the folder that holds {layout}"
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


# ------------------------------------------------------------------------------- sanity checks


def check(text: str, condition: Any, why: str = "") -> None:
    """Print `✓ text: why`; when the condition does not hold, `✗ text` and the numbers behind it.

    condition: anything with a truth value, such as a bool or a tensor of one element. A notebook
    goes on after a failure; elsewhere, and where STRICT is set, it raises AssertionError.
    """
    text += f": {why}" if why else ""
    if bool(condition):
        print(f"✓ {text}")
    elif os.environ.get(STRICT) or not in_notebook():
        raise AssertionError(f"✗ {text}")
    else:
        print(f"✗ {text}{_as_written(sys._getframe(1))}")
        print("  Few steps, another seed or your own data can do that. The lesson goes on.")


def _as_written(frame: FrameType) -> str:
    """The condition of the check that a cell is at, and the numbers that its names stand for."""
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))
    except SyntaxError:
        return ""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) > 1)
    call = next((node for node in calls if node.lineno == frame.f_lineno), None)
    if call is None:
        return ""
    names = sorted({n.id for n in ast.walk(call.args[1]) if isinstance(n, ast.Name)})
    known = {name: frame.f_globals.get(name) for name in names}
    numbers = [f"{k} = {v:.4g}" for k, v in known.items() if isinstance(v, int | float)]
    return "\n  ".join(["", ast.unparse(call.args[1]), *numbers])


def judge(exercise: int, answer: Any, right: Any) -> None:
    """Print whether a student's answer is right; `...` is none yet. Numbers may be 1 % off."""
    if answer is ...:
        print(f"· exercise {exercise}: no answer yet")
        return
    if isinstance(right, float) and isinstance(answer, int | float):
        is_right = abs(answer - right) <= 0.01 * abs(right)
    else:
        is_right = type(answer) is type(right) and answer == right
    said = f"exercise {exercise}: {answer!r}"
    print(f"✓ {said}" if is_right else f"✗ {said} is not it")


def solution(line: str, cell: str) -> None:
    """The cell magic of an exercise's solution: the cell runs where SOLUTIONS is true."""
    shell: Any = sys.modules["IPython"].get_ipython()
    if shell.user_ns.get("SOLUTIONS"):
        shell.run_cell(cell).raise_error()
    else:
        print("A solution, not run: set SOLUTIONS = True, or remove the first line of this cell.")


if "IPython" in sys.modules and (_shell := sys.modules["IPython"].get_ipython()):
    _shell.register_magic_function(solution, "cell")


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
    live = in_notebook()
    rows: list[dict[str, Any]] = []
    pictures: list[Any] = []
    drawn, due = 0, time.perf_counter() + every
    try:
        for step in steps:
            rows.append({"step": step.number, "loss": step.loss, **step.losses})
            if step.evaluation:
                rows.append({"step": step.number, "evaluation": step.evaluation})
            start = time.perf_counter()
            if live and start >= due:
                _redraw(pictures, rows, figure)
                drawn, now = len(rows), time.perf_counter()
                due = now + max(every, 9 * (now - start))
            yield step
    finally:
        if isinstance(steps, Generator):
            steps.close()  # a loop that was left early: training saves now, not at some later time
        if live and len(rows) > drawn:
            _redraw(pictures, rows, figure)


def in_notebook() -> bool:
    """True in a process that serves a notebook; a terminal IPython has nowhere to draw."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _redraw(
    pictures: list[Any], rows: list[dict[str, Any]], figure: Callable[[], Any] | None
) -> None:
    """The losses, and the figure below them, where `pictures` shows them already, if it does."""
    from IPython.display import display

    from mimdet.viz import show_training

    figures = [show_training(rows)] + ([figure()] if figure else [])
    for picture, each in zip(pictures, figures, strict=False):
        picture.update(each)
    pictures += [display(each, display_id=True) for each in figures[len(pictures) :]]


# ------------------------------------------------------------------------------- what it opens


WEIGHTS = "MIMDET_WEIGHTS"
"""Environment variable that names the folder of `mimdet download`, for full mode."""


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


@in_one_line()
def open_pictures(path: str | Path = "", mode: str = "quick", count: int = 8) -> Pictures:
    """The first `count` pictures a notebook shows.

    path: "" = held-out scenes of ShapesCOCO (quick) or COCO val2017 (full, from the folder in
    MIMDET_COCO); a photo, any image file; or a folder with `annotations.json` (COCO format) and
    `images/`. Raises FileNotFoundError and ValueError that say what is expected.
    """
    quick = _is_quick(mode)
    file = Path(path)
    if path and not file.exists():
        raise FileNotFoundError(f"{file} does not exist: give a photo, or a folder of data")
    if path and not file.is_dir():
        nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
        return Pictures([Record(read_image(file), nothing, file.name)], [], None, DataConfig())
    data = DataConfig()
    if path:
        annotations, images = file / "annotations.json", file / "images"
        if not annotations.is_file() or not images.is_dir():
            raise FileNotFoundError(
                f"{file} must hold annotations.json (COCO format) and images/; "
                "for other layouts use mimdet.CocoDataset(json, images)"
            )
        data = DataConfig(source="coco", val_json=str(annotations), val_images=str(images))
        data.train_json, data.train_images = data.val_json, data.val_images
    elif not quick:
        data = full_config().data
    dataset = build_dataset(data, "val")
    if not len(dataset):
        raise ValueError("the data set has no images: look at it with `mimdet check-data`")
    records = [dataset[i] for i in range(min(count, len(dataset)))]
    return Pictures(records, list(dataset.categories), dataset, data)


@in_one_line()
def open_detector(mode: str = "quick") -> "Detector":
    """A finished detector in evaluation mode: the shipped `tiny`, or the released MIMDet ViT-B."""
    from mimdet.training.run import load_detector

    return load_detector("tiny" if _is_quick(mode) else _downloaded("mimdet-base"))


@in_one_line()
def open_mae(mode: str = "quick") -> "MAE":
    """A finished autoencoder: the shipped `tiny_mae`, or Meta's ViT-B trained on plain pixels."""
    from mimdet.models.weights import load_mae_model

    source = "tiny_mae" if _is_quick(mode) else _downloaded("mae-base-visualize")
    return load_mae_model(source).eval()


def _is_quick(mode: str) -> bool:
    if mode not in ("quick", "full"):
        raise ValueError(f"MODE={mode!r}: use one of ['quick', 'full']")
    return mode == "quick"


def _downloaded(name: str) -> str:
    """Where the file is that `mimdet download` calls by this name."""
    file = Path(os.environ.get(WEIGHTS, "downloads"), files_named(name)[0].file_name)
    if not file.exists():
        raise FileNotFoundError(
            f"full mode needs {file}: run `mimdet download {name}`, or set {WEIGHTS} to the "
            "folder that holds it"
        )
    return str(file)
