"""A configuration for pictures of one's own, proposed: every choice with its reason, and its time.

`propose` looks at the data, chooses, and runs a few steps and an evaluation of a few images, so
that time and memory are measured and not guessed.
"""

import contextlib
import copy
import io
import os
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from mimdet.analysis.evaluate import evaluate
from mimdet.config import Config, change, flat
from mimdet.data.annotations import clipped_box
from mimdet.data.augment import apply, draw_geometry, rng_for
from mimdet.data.checks import check_dataset
from mimdet.data.coco import CocoDataset, build_dataset
from mimdet.data.coco_file import REFUSED, Problem, Sections
from mimdet.data.foreign import recognise
from mimdet.data.formats import convert
from mimdet.data.splits import shared_images, split_file
from mimdet.downloads import free_space, readable
from mimdet.files import write_json
from mimdet.inference import SMALL_SIDE
from mimdet.models.detector import build_detector
from mimdet.presets import PRESETS
from mimdet.processes import fast_precision, set_up, usable_cores
from mimdet.structures import Target
from mimdet.training.initial import initialise
from mimdet.training.plan import Pace, measure
from mimdet.training.run import PATHS, Run
from mimdet.training.train import adapt_to_data

STEPS_AT_LEAST, STEPS_AT_MOST, EPOCHS = 400, 10_000, 12
"""Steps are those of EPOCHS passes over the images, within these bounds and the time there is."""
FEWEST_STEPS = 50
"""However little time there is."""
LEAST_PIXELS = 20
"""Side, in pixels of the resized image, that the smallest quarter of the objects should reach. A
token is 16 pixels wide, and the smallest anchor of `tiny` 12."""
SIDES = (256, 640)
"""Shortest sides between which the proposal chooses on a CPU: what a step takes grows with their
square."""
MEASURED = 6
"""Steps that are trained to time one."""
TIMED_IMAGES = 8
IMAGES_OF_SIZES = 2000


@dataclass(slots=True)
class Files:
    """Where the two sets lie, and what was done to get them."""

    train_json: Path
    train_images: Path
    val_json: Path
    val_images: Path
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Proposal:
    """A complete configuration, and why."""

    cfg: Config
    reasons: dict[str, str]
    """Field -> a sentence, for every choice; fields that follow from these have none."""
    notes: list[str]
    """About the data: what was converted, split, left out, shared."""
    sides: np.ndarray
    """(objects,) square root of the boxes' areas, pixels of the resized image."""
    step_seconds: float
    evaluation_seconds: float
    """Of one evaluation."""
    evaluations: int
    start_seconds: float
    """Before the first step: opening the data, building the model."""
    memory: int
    """Bytes of the process while it trained a few steps."""
    disk: int
    """Bytes of the checkpoints that are kept."""

    @property
    def seconds(self) -> float:
        """Of the whole training, evaluations included."""
        steps = self.cfg.training.steps * self.step_seconds
        return self.start_seconds + steps + self.evaluations * self.evaluation_seconds

    def examples(self, count: int = 8) -> list[tuple[Tensor, Target]]:
        """Training images at the size that is proposed, uint8 (3, H, W), with what is in them."""
        dataset = build_dataset(self.cfg.data, "train", masks=self.cfg.detector.masks)
        found = []
        for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist():
            record = dataset[index]
            size, rng = record.image.shape[1:], rng_for("geometry", 0)
            geometry = draw_geometry(self.cfg.data, size[0], size[1], rng, train=False)
            found.append(apply(geometry, record))
        return found

    def table(self) -> str:
        """Notes, then field, value and reason of each choice, then what it costs."""
        values, own, t = flat(self.cfg), flat(PRESETS[self.cfg.preset]()), self.cfg.training
        choices = []
        for name, reason in self.reasons.items():
            value = values[name]
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            choices.append(f"{name} = {shown}: {reason}")
        told = {*self.reasons, *PATHS, "data.source", "detector.num_classes"}
        also = [n for n in own if values[n] != own[n] and n not in told]
        choices.append(f"with them: {', '.join(f'{n} = {values[n]}' for n in also)}")
        lines = [
            *self.notes,
            "",
            *(textwrap.fill(f"- {words}", 100, subsequent_indent="  ") for words in choices),
            "",
            f"time    about {self.seconds / 60:.1f} minutes: {t.steps:,} steps of "
            f"{self.step_seconds:.2f} s and {self.evaluations} x evaluation of "
            f"{self.evaluation_seconds:.0f} s, as {MEASURED} steps took just now",
            f"memory  about {readable(self.memory)}",
            f"disk    {readable(self.disk)} at most, of {readable(free_space(Path('.')))} free",
        ]
        return "\n".join(lines)


def propose(
    data: str | Path,
    work: str | Path = "",
    *,
    images: str | Path = "",
    minutes: float = 10.0,
    turns: bool = False,
    init_from: str = "",
    names: tuple[str, ...] = (),
    share: float = 0.2,
) -> Proposal:
    """Look at `data` and choose a configuration that trains in about `minutes` on this machine.

    data: a folder, or one file, as `find_files` reads it. images: folder of the images, where they
    are not under `data`. work: folder for what has to be written: converted or
    split annotations; default `data` with "-mimdet" behind its name. turns: every turn of a picture
    is as likely (microscopy, pictures from above). init_from: weights to start from; default the
    detector `tiny` that comes with the package. names, share: of `convert` and of `split_file`.

    Raises ValueError, with the first findings, for data that cannot be trained on.
    """
    work = Path(work or f"{Path(data)}-mimdet")
    files = find_files(Path(data), work, images, names, share)
    notes = [*files.notes, *checked_files(files)]
    cfg = PRESETS["tiny"]()
    cfg.data.source = "coco"
    for name in ("train_json", "train_images", "val_json", "val_images"):
        setattr(cfg.data, name, str(getattr(files, name)))
    dataset = CocoDataset(files.train_json, files.train_images, skip_empty=True, masks=False)
    shares, crowded = sizes_of(dataset)
    reasons = {
        "preset": "2 million parameters, which learn on a CPU in minutes. "
        + (
            "There is a GPU: for thousands of images see docs/guides/workstation.md (mimdet_base)."
            if torch.cuda.is_available()
            else "The large presets need a GPU and an autoencoder's weights."
        )
    }
    choose_start(cfg, reasons, init_from, complete_masks(files))
    choose_size(cfg, reasons, shares, dataset)
    choose_rest(cfg, reasons, turns, len(dataset), crowded)
    held_out = CocoDataset(files.val_json, files.val_images, masks=False)
    pace, evaluation, start, size = time_steps(cfg, held_out)
    step = pace.step_seconds
    choose_length(cfg, reasons, len(dataset), minutes - start / 60, step, evaluation)
    sides = shares * cfg.data.test_short_side
    tiny = float((sides < SMALL_SIDE).mean())
    if tiny > 0.01:
        notes.append(
            f"{tiny:.0%} of the objects are smaller than {SMALL_SIDE} pixels at this size and will "
            "hardly be found: cut the pictures up, or set a larger data.test_short_side"
        )
    t = cfg.training
    return Proposal(
        cfg,
        reasons,
        notes,
        sides,
        step,
        evaluation,
        -(-t.steps // t.evaluate_every_steps),
        start,
        pace.peak,
        3 * size * (t.keep_checkpoints + 2),
    )


# ------------------------------------------------------------------------------- the data


def find_files(
    data: Path,
    work: Path,
    images: str | Path = "",
    names: tuple[str, ...] = (),
    share: float = 0.2,
) -> Files:
    """Two COCO files and their image folders under `data`; converted or split into `work` first.

    Of the json files whose names hold "train" and "val" those with the shortest names are taken;
    one COCO file alone, or annotations of another format, are split. ValueError where there are
    none, or where the images of one are in no folder.
    """
    place = Path(images or (data if data.is_dir() else data.parent))
    if not data.exists():
        raise FileNotFoundError(f"{data} does not exist; check the path")
    files = (
        sorted(data.rglob("*.json"), key=lambda f: (len(f.name), str(f))) if data.is_dir() else []
    )
    found = [file for file in ([data] if data.is_file() else files) if is_coco(file)]
    pair = [next((f for f in found if part in f.stem), None) for part in ("train", "val")]
    if all(pair):
        a, b = pair
        folders = image_folder(a, place), image_folder(b, place)  # type: ignore[arg-type]
        return Files(a, folders[0], b, folders[1])  # type: ignore[arg-type]
    notes: list[str] = []
    whole = found[0] if found else work / "all.json"
    if found:
        folder = image_folder(whole, place)
    elif recognise(data):
        made = convert(data, whole, images=images, names=names)
        folder, notes = made.folder, [f"converted into {whole}: {made}"]
    else:
        raise ValueError(
            f"{data} holds no COCO json, VOC xml, YOLO txt, LabelMe json or masks; "
            "docs/guides/own_data.md says what is read"
        )
    split_file(whole, work, share)
    notes.append(
        f"split by image into {work}: train.json and val.json, {share:.0%} held out. If pictures "
        "are frames of a video, or of one patient, split by group (mimdet split --by-name)"
    )
    return Files(work / "train.json", folder, work / "val.json", folder, notes)


def is_coco(file: Path) -> bool:
    """Whether a json file has COCO's three sections; what is in them, its reader says."""
    try:
        return bool(msgspec.json.decode(file.read_bytes(), type=Sections).images)
    except (msgspec.DecodeError, OSError):
        return False


def image_folder(json_path: Path, data: Path) -> Path:
    """The folder under `data` in which the first and last image of the file lie."""
    entries = msgspec.json.decode(json_path.read_bytes(), type=Sections).images
    names = [msgspec.json.decode(entries[place])["file_name"] for place in (0, -1)]
    folders = [json_path.parent, data, *sorted(f for f in data.rglob("*") if f.is_dir())]
    for folder in folders:
        if all((folder / name).is_file() for name in names):
            return folder
    raise FileNotFoundError(f"{json_path}: its image {names[0]} is in no folder under {data}")


def checked_files(files: Files) -> list[str]:
    """What `mimdet check-data` finds in both, in a line a kind; ValueError for what is refused."""
    notes: list[str] = []
    problems: list[Problem] = []
    sets = [(files.train_json, files.train_images), (files.val_json, files.val_images)]
    for json_path, folder in sets:
        report = check_dataset(json_path, folder, decode=False)
        problems += report.problems
        s = report.summary
        notes.append(
            f"{json_path}: {s['images']:,} images, {s['empty_images']:,} of them without objects; "
            f"{s['annotations']:,} objects of {s['categories']} classes, {s['with_masks']:,} with "
            f"a mask, {s['crowds']:,} crowds"
        )
    problems += shared_images(*sets)
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    for kind, of_kind in kinds.items():
        if kind in REFUSED and kind != "segmentation-missing":
            raise ValueError(str(of_kind[0]))
        first = of_kind[0]
        notes.append(f"{kind} ({len(of_kind)}): {first.where}: {first.message}")
    return notes


def complete_masks(files: Files) -> str:
    """Why there are no masks to learn; "" where there are."""
    try:
        sets = [
            CocoDataset(files.train_json, files.train_images),
            CocoDataset(files.val_json, files.val_images),
        ]
    except ValueError as error:
        return f"boxes alone are learned; to learn masks, give every object one: {error}"
    return "" if all(s.has_masks for s in sets) else "there are boxes only"


def sizes_of(dataset: CocoDataset) -> tuple[np.ndarray, int]:
    """(objects,) square root of each box's area as a share of its image's short side; and the
    number of objects that one image in twenty exceeds. Of IMAGES_OF_SIZES images spread evenly."""
    places = np.unique(np.linspace(0, len(dataset) - 1, IMAGES_OF_SIZES).astype(int))
    shares, counts = [], []
    for index in places.tolist():
        height, width = dataset.image_size(index)
        kept = [a for a in dataset.annotations(index) if not a.left_out]
        counts.append(len(kept))
        for annotation in kept:
            x0, y0, x1, y1 = clipped_box(annotation.bbox, height, width)
            shares.append(((x1 - x0) * (y1 - y0)) ** 0.5 / min(height, width))
    return np.array(shares), int(np.quantile(counts, 0.95))


# ------------------------------------------------------------------------------- the choices


def choose_start(cfg: Config, reasons: dict[str, str], init_from: str, no_masks: str) -> None:
    cfg.training.init_from = init_from or "tiny"
    reasons["training.init_from"] = (
        "the weights that were named"
        if init_from
        else "a detector of drawn scenes, which comes with the package: it knows edges, outlines "
        "and where boxes end, and only its classes begin anew"
    )
    reasons["training.optimizer"] = (
        "4 AP more than by adamw after 200 steps on microscope pictures "
        "(docs/measurements.md#microscopy)"
    )
    cfg.detector.masks = not no_masks
    reasons["detector.masks"] = no_masks or "every object has one"
    cfg.detector.norm = "GN"
    reasons["detector.norm"] = (
        "batches are small and pictures differ, so that running means of a batch norm fit neither "
        "(docs/measurements.md#microscopy)"
    )


def choose_size(
    cfg: Config, reasons: dict[str, str], shares: np.ndarray, dataset: CocoDataset
) -> None:
    """The short side at which the smallest quarter of the objects has LEAST_PIXELS."""
    native = int(np.median([min(dataset.image_size(i)) for i in range(min(len(dataset), 500))]))
    quarter = float(np.quantile(shares, 0.25))
    wanted = LEAST_PIXELS / max(quarter, 1e-6)
    side = int(np.clip(min(wanted, 2 * native), *SIDES) / 32 + 0.5) * 32
    steps = [int(side * factor / 32 + 0.5) * 32 for factor in (0.875, 1, 1.125)]
    change(cfg.data, test_short_side=side, short_sides=tuple(steps), augment="multiscale")
    cfg.data.max_side = 2 * side
    reasons["data.test_short_side"] = (
        f"a quarter of the objects then has less than {quarter * side:.0f} pixels a side (stored: "
        f"{quarter * native:.0f}, in pictures of {native}); a larger size takes longer"
    )
    reasons["data.short_sides"] = "an eighth smaller and larger, at random, while training"
    smallest = float(np.quantile(shares, 0.1)) * side
    anchor = min((8, 12, 16, 24), key=lambda size: abs(np.log(size / max(smallest, 1))))
    cfg.detector.anchor_sizes = tuple(anchor * 2**level for level in range(5))
    reasons["detector.anchor_sizes"] = (
        f"a tenth of the objects has less than {smallest:.0f} pixels, the largest "
        f"{float(shares.max()) * side:.0f}"
    )
    cfg.detector.canonical_size = 112.0 * anchor / 12


def choose_rest(
    cfg: Config, reasons: dict[str, str], turns: bool, images: int, crowded: int
) -> None:
    cfg.data.flips = "dihedral" if turns else "horizontal"
    reasons["data.flips"] = (
        "every turn of a picture is as likely, you say"
        if turns
        else "a mirrored photograph is one too; say --turns where every turn is (microscopy, from "
        "above)"
    )
    reasons["data.skip_empty"] = (
        "images without objects teach little; where most of what you will look at is empty, write "
        "false into the run's config.json"
    )
    d = cfg.detector
    if crowded > 15:
        change(d, rpn_pre_nms=(600, 600), rpn_post_nms=(300, 300))
        change(d, rpn_anchors_per_image=256, rois_per_image=128)
        d.detections_per_image = max(50, -(-3 * crowded // 2 // 10) * 10)
        reasons["detector.detections_per_image"] = (
            f"one image in twenty has more than {crowded} objects; proposals are doubled too"
        )
    large = cfg.data.test_short_side > 320
    change(cfg.training, batch_size=2 if large else 4, accumulate=2 if large else 1)
    reasons["training.batch_size"] = (
        "of which two make a step: pictures of this size need memory" if large else "images a step"
    )
    cfg.training.precision = fast_precision()
    if cfg.training.precision == "bf16":
        reasons["training.precision"] = "this CPU computes in it"
    cores = usable_cores()
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cfg.training.threads = int(np.clip(cores - busy, 1, 4))
    reasons["training.threads"] = (
        f"of {cores} cores {busy:.1f} are busy, and threads that wait for one another are slower "
        "than one alone"
    )


def choose_length(
    cfg: Config,
    reasons: dict[str, str],
    images: int,
    minutes: float,
    step: float,
    evaluation: float,
) -> None:
    """Steps by images and time; as many evaluations as take a sixth of it."""
    t = cfg.training
    a_step = t.step_images
    wanted = int(np.clip(EPOCHS * images / a_step, STEPS_AT_LEAST, STEPS_AT_MOST))
    budget = max(60.0, 60 * minutes)
    count = int(np.clip(budget / 6 / max(evaluation, 1e-3), 1, 5))
    fitting = int((budget - count * evaluation) / step)
    t.steps = min(wanted, max(FEWEST_STEPS, fitting))
    t.evaluate_every_steps = -(-t.steps // count)
    t.warmup_steps = min(50, t.steps // 10)
    epochs = f"{t.steps * a_step / images:.1f} passes over {images:,} images"
    enough = f"what {minutes:.0f} minutes are enough for"
    if fitting < t.steps:
        enough = f"the fewest that teach anything, more than {minutes:.0f} minutes are enough for"
    reasons["training.steps"] = (
        f"{epochs}, enough for so many"
        if wanted <= fitting
        else f"{epochs}, {enough}; {wanted:,} would be better: "
        f"--minutes {(wanted * step + count * evaluation) / 60:.0f}"
    )
    reasons["training.evaluate_every_steps"] = (
        f"{count} of them, of about {evaluation:.0f} s each; the best weights are kept"
    )


# ------------------------------------------------------------------------------- the time


def time_steps(cfg: Config, held_out: CocoDataset) -> tuple[Pace, float, float, int]:
    """-> the pace of steps, measured as by `mimdet plan`; seconds of an evaluation of all of
    `held_out`, by a few of its images; seconds before a first step; bytes of the model.
    """
    began = time.perf_counter()
    tried = copy.deepcopy(cfg)
    set_up(tried.training)
    data = build_dataset(tried.data, "train", masks=tried.detector.masks)
    few = (str(held_out.json_path), held_out.image_folder, TIMED_IMAGES)
    some = CocoDataset(*few, masks=tried.detector.masks)
    with contextlib.redirect_stdout(io.StringIO()):
        adapt_to_data(tried, data)
        cfg.detector.num_classes = tried.detector.num_classes
        model = build_detector(tried)
        initialise(model, tried.training.init_from)
        model.categories, model.category_ids = list(data.categories), list(data.category_ids)
        start = time.perf_counter() - began
        began = time.perf_counter()
        evaluate(model, some, batch_size=cfg.training.batch_size)
        each = (time.perf_counter() - began) / len(some)
        tried.training.accumulate = 1
        pace = measure(tried, data, MEASURED, cfg.training.step_images)
    size = sum(value.nbytes for value in model.state_dict().values())
    return pace, each * len(held_out), start, size


def write(proposal: Proposal, run: str | Path) -> None:
    """Make the folder of a run with this configuration: `mimdet resume RUN` trains it."""
    if (Path(run) / "config.json").exists():
        raise ValueError(f"{run} holds a run already: `mimdet resume {run}`, or another name")
    Run(run, proposal.cfg)
    write_json(Path(run) / "proposal.json", {"reasons": proposal.reasons, "notes": proposal.notes})
