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
from mimdet.analysis.cost import training_bytes
from mimdet.config import Config, DataConfig, change, from_dict, set_field, to_dict
from mimdet.data.coco import build_dataset
from mimdet.data.scenes import LEVELS
from mimdet.downloads import files_named
from mimdet.files import SHIPPED
from mimdet.images import read_image
from mimdet.presets import mimdet_base, tiny
from mimdet.processes import pick_device, seed_all, usable_cores
from mimdet.structures import Record, Target
from mimdet.training.trainer import Step

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
_VAL = COCO_LAYOUT["val_json"]
LAYOUTS = (
    ("annotations.json", "annotations.json", "images"),
    (_VAL, _VAL, COCO_LAYOUT["val_images"]),
    ("train.json", "val.json", "images"),
)
"""Files of a folder of pictures: to train on, to look at, their images."""
STRICT = "MIMDET_STRICT_CHECKS"
"""Environment variable: where it is set, as tests do, a check that fails ends its notebook."""
PICTURES = "MIMDET_PICTURES"
"""Environment variable: a folder or photo that notebooks show where their PATH names none."""
NUCLEI = "nuclei"
"""As a PATH: the microscope picture that comes with the package, and its detector."""
WEIGHTS = "MIMDET_WEIGHTS"
"""Environment variable that names the folder of `mimdet download`, for full mode."""
CHANGES = "MIMDET_FULL"
"""Environment variable with fields of full mode's configuration that are to be others, such as
"training.batch_size=2 training.accumulate=32 data.limit_val=500". The word `rehearsal` in it says
that the weights are random, so that `check(..., trained=True)` is skipped."""


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
    changed = "" if _is_quick(mode) else f"; {CHANGES}={os.environ.get(CHANGES, '')!r}"
    drawn = f"{data.shapes_level}, {data.shapes_size} px, drawn on the fly: no files"
    lines = {
        "mode": f"{mode}: preset {cfg.preset}, seed {seed}{changed}",
        "device": device,
        "versions": f"mimdet {__version__}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}",
        "time": "not measured" if estimate is None else f"about {estimate:g} min",
        "data": drawn if data.source == "shapes" else f"{data.train_json}, {data.val_json}",
    }
    if not _is_quick(mode):
        once, image = (number / 1e9 for number in training_bytes(cfg))
        lines["start"] = cfg.training.init_from
        lines["disk"] = f"a checkpoint takes {0.75 * once:.1f} GB, a run keeps up to three"
        lines["memory"] = (
            f"about {once:.1f} GB, and an image {image:.1f} GB in fp32 or half of that in bf16"
        )
    print("\n".join(f"{name:<9} {text}" for name, text in lines.items()))
    return cfg


def quick_config() -> Config:
    """`tiny` shortened to a minute: easy scenes at 128 px, fewer blocks and head layers.

    The statistics of two images a step are too noisy for BatchNorm, so the heads have GroupNorm
    (box AP of three seeds by AdamW: 13.8, 11.4 and 15.8 with it; 8.0, 6.6 and 7.8 without). By Muon
    the first of them has 25.9.
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
    change(cfg.training, learning_rate=4e-3, rate_multiplier=1.0, betas=(0.9, 0.98))
    return cfg


def full_config() -> Config:
    """`mimdet_base` on the COCO that MIMDET_COCO names, from Meta's autoencoder, with the changes
    of MIMDET_FULL, such as training.init_from=random."""
    cfg = full_recipe()
    change(cfg.data, **_full_data())
    cfg.training.init_from = cfg.training.init_from or _downloaded("mae-base-full")
    return cfg


def full_recipe() -> Config:
    """`mimdet_base` with the changes of MIMDET_FULL. ValueError naming a field that is wrong."""
    cfg = mimdet_base()
    for word in os.environ.get(CHANGES, "").split():
        name, _, text = word.partition("=")
        if word == "rehearsal":
            continue
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            set_field(cfg, name, value)
        except AttributeError as error:
            raise ValueError(f"{CHANGES}: {word!r} names no field: {error}") from error
    changed: Config = from_dict(to_dict(cfg))  # its error names a field of another type
    return changed


def rehearsing() -> bool:
    """True where MIMDET_FULL says that this is a rehearsal: weights are random."""
    return "rehearsal" in os.environ.get(CHANGES, "").split()


def _full_data() -> dict[str, str]:
    """Field of `DataConfig` -> where it is below MIMDET_COCO. ValueError, FileNotFoundError."""
    folder = os.environ.get(COCO, "")
    layout = ", ".join(COCO_LAYOUT.values())
    if not folder:
        raise ValueError(
            f"full mode trains on COCO 2017: set the environment variable {COCO} to the folder "
            f"that holds {layout} (in a cell: %env {COCO}=path), or use "
            'MODE = "quick", which needs no data'
        )
    places = {name: Path(folder, part).absolute() for name, part in COCO_LAYOUT.items()}
    for path in places.values():
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: {COCO}={folder} must be the folder that holds {layout}"
            )
    return {name: str(path) for name, path in places.items()}


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


def check(text: str, condition: Any, why: str = "", *, trained: bool = False) -> None:
    """Print `✓ text: why`; when the condition does not hold, `✗ text` and the numbers behind it.

    condition: anything with a truth value, such as a bool or a tensor of one element. A notebook
    goes on after a failure; elsewhere, and where STRICT is set, it raises AssertionError. trained:
    it holds for trained weights only, so that a rehearsal (MIMDET_FULL) says `- text` and skips it.
    """
    text += f": {why}" if why else ""
    if trained and rehearsing():
        print(f"- {text} (skipped: the weights are not trained)")
    elif bool(condition):
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
    """Print whether a student's answer is right; `...` is none yet. right: the value, of which a
    float may be 1 % off, or a function of the answer that says so."""
    if answer is ...:
        print(f"· exercise {exercise}: no answer yet")
        return
    if callable(right):
        is_right = bool(right(answer))
    elif isinstance(right, float) and isinstance(answer, int | float):
        is_right = abs(answer - right) <= 0.01 * abs(right)
    else:
        is_right = type(answer) is type(right) and answer == right
    said = f"exercise {exercise}: {getattr(answer, '__name__', repr(answer))}"
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


def own_path(path: str = "") -> str:
    """The PATH of a notebook or, where it is empty, what MIMDET_PICTURES names for all of them."""
    return path or os.environ.get(PICTURES, "")


@in_one_line()
def open_pictures(path: str | Path = "", mode: str = "quick", count: int = 8) -> Pictures:
    """The first `count` pictures a notebook shows.

    path: "" = held-out scenes of ShapesCOCO (quick) or COCO val2017 (full, from the folder in
    MIMDET_COCO); "nuclei" = the microscope picture that comes with the package (a folder of yours
    is "./nuclei"); a photo, any image file; or a folder with `annotations.json` (COCO format) and
    `images/`, with `train.json` and `val.json` beside `images/`, or in the layout of COCO 2017, of
    which val2017 is shown. Raises FileNotFoundError and ValueError that say what is expected.
    """
    quick = _is_quick(mode)
    file = SHIPPED / NUCLEI if str(path) == NUCLEI else Path(path)
    data = DataConfig()
    if path and not file.exists():
        raise FileNotFoundError(f"{file} does not exist: give a photo, a folder or {NUCLEI!r}")
    if path and not file.is_dir():
        nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
        return Pictures([Record(read_image(file), nothing, file.name)], [], None, data)
    if path:
        found = [
            layout
            for layout in LAYOUTS
            if all((file / name).is_file() for name in layout[:2]) and (file / layout[2]).is_dir()
        ]
        if not found:
            raise FileNotFoundError(
                f"{file} must hold annotations.json (COCO format) and images/, or COCO's own "
                f"{COCO_LAYOUT['val_json']} and {COCO_LAYOUT['val_images']}/, or train.json, "
                "val.json and images/; for other layouts use mimdet.CocoDataset(json, images)"
            )
        train, val, images = (str(file / part) for part in found[0])
        data = DataConfig(source="coco", train_json=train, train_images=images)
        data.val_json, data.val_images = val, images
    elif not quick:
        data = full_recipe().data
        change(data, **_full_data())
    dataset = build_dataset(data, "val")
    if not len(dataset):
        raise ValueError("the data set has no images: look at it with `mimdet check-data`")
    records = [dataset[i] for i in range(min(count, len(dataset)))]
    return Pictures(records, list(dataset.categories), dataset, data)


@in_one_line()
def open_detector(mode: str = "quick", path: str | Path = "") -> "Detector":
    """A finished detector in evaluation mode: the shipped `tiny`, or `nuclei` where the pictures'
    path is "nuclei"; or the released MIMDet ViT-B, which is on the GPU where there is one (`.cpu()`
    fetches it)."""
    from mimdet.training.run import load_detector

    if _is_quick(mode):
        return load_detector(NUCLEI if str(path) == NUCLEI else "tiny")
    cfg = full_recipe() if os.environ.get(CHANGES) else None  # without it, from names and shapes
    if cfg is not None:
        cfg.backbone.keep = "padded"  # as of any released file
    device = str(pick_device("auto"))
    return load_detector(_downloaded("mimdet-base"), cfg, device=device)


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
    """Where the file is that `mimdet download` calls by this name: in the folder of MIMDET_WEIGHTS,
    else in `downloads` here or beside this folder, where the README's command puts it."""
    own = os.environ.get(WEIGHTS, "")
    folders = (
        [Path(own).absolute()] if own else [Path.cwd() / d for d in ("downloads", "../downloads")]
    )
    files = [folder.resolve() / files_named(name)[0].file_name for folder in folders]
    for file in files:
        if file.exists():
            return str(file)
    raise FileNotFoundError(
        f"full mode needs {' or '.join(map(str, files))}: run `mimdet download {name}` in the "
        f"folder above, or set {WEIGHTS} to the folder that holds it"
    )
