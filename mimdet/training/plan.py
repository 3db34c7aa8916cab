"""Before a training: what it will take, from a few real steps and a count of what memory holds."""

import copy
import math
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from statistics import mean

import numpy as np
import psutil
import torch

from mimdet.analysis.cost import markdown_table, training_bytes
from mimdet.config import Config
from mimdet.data.coco import build_dataset
from mimdet.data.loader import Dataset
from mimdet.data.shapes import ShapesCOCO
from mimdet.downloads import readable
from mimdet.models.detector import build_detector
from mimdet.processes import set_up
from mimdet.structures import padded_size
from mimdet.training.optim import Schedule
from mimdet.training.run import Run
from mimdet.training.train import DetectorTrainer, adapt_to_data

RATIOS = (0.25, 0.5, 1.0)
CARDS = (8, 16, 24, 48, 80, 141)
"""Memory of GPUs, in GB of 10^9 bytes."""
WORKSPACE = 0.9
"""Share of a card that tensors may take: the rest is CUDA's own and what the allocator wastes."""
AHEAD = 200
"""Steps whose image sizes are looked at, to measure those that stand for them."""
HEAP_GROWTH = 200_000_000
"""Bytes by which a process outgrows its first steps, as blocks of ever other sizes come and go in
glibc's heap: 0.26 GB in 200 steps of `tiny`, 0.15 in 20 of `mimdet_base`."""
COCO_IMAGES = 117_266
"""With a usable annotation, in train2017."""


@dataclass(slots=True)
class Pace:
    """What steps took at one share of the tokens."""

    ratio: float
    step_seconds: float
    """Of a whole step, as the schedule has them, on this device alone."""
    cpu_seconds: float
    """The same of this process's CPU time, loading included."""
    images_per_second: float
    waiting: float
    """Share of the step spent waiting for the loader."""
    peak: int
    """Bytes at the largest micro-batch: of tensors on a GPU; on a CPU of the process, and what its
    heap grows by in the steps to come."""
    before: int
    """The same without model and data."""
    counted: int
    """Bytes that `training_bytes` counts for that micro-batch."""

    @property
    def count_error(self) -> float:
        """Of the memory model: counted / measured - 1."""
        return self.counted / max(1, self.peak - self.before) - 1


@dataclass(slots=True)
class Card:
    """What fits on a GPU at the configuration's own ratio and its largest training images."""

    gigabytes: int
    kept: int
    """Images of a micro-batch without recomputation; 0 = not even one."""
    recomputed: int
    """With it (`backbone.checkpointing=on`)."""

    def advice(self, wanted: int) -> str:
        """What to do about a micro-batch of `wanted` images."""
        if self.kept >= wanted:
            return "off"
        if self.recomputed > self.kept:
            return "on" if self.recomputed >= wanted else f"on, batch_size={self.recomputed}"
        return f"off, batch_size={self.kept}" if self.kept else "too small"


@dataclass(slots=True)
class Forecast:
    """What `forecast` found; print it, or `mimdet.viz.show_forecast` draws it."""

    preset: str
    device: str
    measured_batch: int
    """Images of the micro-batches that were measured."""
    batch_size: int
    steps: int
    step_images: int
    gpus: int
    price: float
    """Of a GPU (or this machine) an hour; 0 = not asked."""
    own_ratio: float
    note: str = ""
    here: Card = field(default_factory=lambda: Card(0, 0, 0))
    """What fits in this device's memory."""
    paces: list[Pace] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)

    def hours(self, pace: Pace) -> float:
        """Of the whole schedule on `gpus` devices like this one that share each step without loss;
        evaluations are not in it."""
        return pace.step_seconds * self.steps / 3600 / self.gpus

    def __str__(self) -> str:
        """Two tables in Markdown, and what they are of."""
        paces = [
            {
                "ratio": f"{pace.ratio:g}",
                "images/s": f"{pace.images_per_second:.3g}",
                "waiting": f"{100 * pace.waiting:.0f} %",
                "peak memory": readable(pace.peak),
                f"hours, {self.gpus} device(s)": f"{self.hours(pace):.3g}",
                "cost": f"{self.hours(pace) * self.gpus * self.price:.2f}" if self.price else "-",
                "count / peak": f"{100 * pace.count_error:+.0f} %",
            }
            for pace in self.paces
        ]
        cards = [
            {
                "memory": f"{card.gigabytes} GB" + (" (here)" if card is self.here else ""),
                "largest batch_size": str(card.kept),
                "with recomputation": str(card.recomputed),
                "checkpointing": card.advice(self.batch_size),
            }
            for card in [*self.cards, self.here]
        ]
        return (
            f"{self.preset}: {self.steps:,} steps of {self.step_images} images; measured on "
            f"{self.device}, micro-batches of {self.measured_batch}{self.note}\n\n"
            f"{markdown_table(paces)}\n\n"
            f"Fits, by count, at ratio {self.own_ratio:g} and the largest training images:\n\n"
            f"{markdown_table(cards)}"
        )


def forecast(
    cfg: Config,
    gpus: int = 1,
    price: float = 0.0,
    steps: int = 6,
    ratios: tuple[float, ...] = RATIOS,
) -> Forecast:
    """Measure `steps` steps of a micro-batch at each ratio here, and say what the schedule takes.

    The steps are chosen by the size of their images, to stand for the first AHEAD of them; the one
    with the largest images shows the memory. Micro-batches are `batch_size` images, or as many as
    fit. A recipe for COCO without files is measured on drawn scenes of 640 pixels; a backbone that
    samples nothing, at ratio 1. ValueError for gpus, steps or price below what makes sense.
    """
    if gpus < 1 or steps < 1 or price < 0:
        raise ValueError(f"gpus={gpus}, steps={steps}, price={price}: at least 1, 1 and 0")
    set_up(cfg.training)
    cfg, data, stand_in = training_data(cfg)
    wanted = cfg.training.batch_size
    schedule = Schedule(cfg.training, COCO_IMAGES if stand_in else len(data))
    precision, memory = cfg.training.precision, psutil.virtual_memory().available
    device = f"a CPU, {torch.get_num_threads()} thread(s)"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory, device = gpu.total_memory, gpu.name
        cfg.training.precision = "bf16" if precision == "auto" else precision
    (here,) = fitting(cfg, memory / 1e9)
    measured = max(1, min(wanted, here.kept or here.recomputed))
    found = Forecast(
        cfg.preset or cfg.backbone.kind,
        device,
        measured,
        wanted,
        schedule.total,
        cfg.training.step_images,
        gpus,
        price,
        cfg.backbone.sample_ratio,
        ("; drawn scenes stand in for COCO" if stand_in else "")
        + ("; memory is counted as if nothing were frozen" if cfg.training.freeze else ""),
        here,
    )
    as_on_gpu = copy.deepcopy(cfg)
    as_on_gpu.training.precision = "bf16" if precision == "auto" else precision
    found.cards = fitting(as_on_gpu, *CARDS)
    cfg.training.batch_size, cfg.training.accumulate = measured, 1
    for ratio in ratios if cfg.backbone.kind == "mimdet" else (1.0,):
        cfg.backbone.sample_ratio = ratio
        found.paces.append(measure(cfg, data, steps, found.step_images))
        # Memory of the system that a process once had, it keeps.
        found.paces[-1].before = found.paces[0].before
    return found


def training_data(cfg: Config) -> tuple[Config, Dataset, bool]:
    """(a copy of cfg that suits the data, what it trains on, whether that only stands in for it).

    A recipe for COCO that names no files gets drawn scenes of 640 x 640 pixels.
    """
    cfg = copy.deepcopy(cfg)
    stand_in = cfg.data.source == "coco" and not cfg.data.train_json
    data: Dataset = (
        ShapesCOCO("shapes-v2-medium", size=640, length=1000, split="train")
        if stand_in
        else build_dataset(cfg.data, "train", cfg.training.seed, cfg.detector.masks)
    )
    adapt_to_data(cfg, data)
    return cfg, data, stand_in


def measure(cfg: Config, data: Dataset, steps: int, images: int) -> Pace:
    """The pace of steps of so many images, from some of one micro-batch, updates included."""
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        before, model = memory.now(), build_detector(cfg)
        run = Run(os.path.join(folder, "run"), cfg)
        trainer = DetectorTrainer(cfg, run, model, data, data, {})
        plan, loader = trainer.loader.plan, trainer.loader
        loader.workers = 0  # computing and loading are told apart
        sizes = [plan.padded(plan.micro_batches(step)[0]) for step in range(AHEAD)]
        order = np.argsort([height * width for height, width in sizes])
        largest = int(order[-1])
        middles = [order[int((i + 0.5) * AHEAD / steps)] for i in range(steps)]
        trainer.one_step(loader.batches(largest, largest + 1))  # warms up, too
        begin = time.process_time()
        done = [trainer.one_step(loader.batches(int(step), int(step) + 1)) for step in middles]
        cpu = (time.process_time() - begin) / steps
        peak = memory.peak()
    growth = 0 if memory.cuda else HEAP_GROWTH
    loading = mean(step.loading * step.seconds for step in done)
    compute = mean(step.seconds for step in done) - loading
    workers = min(cfg.data.workers, (os.cpu_count() or 1) - 1)
    waiting = max(0.0, loading / workers - compute) if workers > 0 else loading
    batch = cfg.training.batch_size
    once, image = training_bytes(cfg, sizes[largest])
    return Pace(
        cfg.backbone.sample_ratio,
        (compute + waiting) * images / batch,
        cpu * images / batch,
        batch / (compute + waiting),
        waiting / (compute + waiting),
        peak + growth,
        before + growth,
        once + batch * image,
    )


def fitting(cfg: Config, *memories: float) -> list[Card]:
    """What fits in so many GB of memory, by count, of the largest images the recipe makes."""
    cfg, data, most = copy.deepcopy(cfg), cfg.data, []
    long = data.max_side if data.augment != "lsj" else data.lsj_size
    size = padded_size(min(long, max(data.short_sides)), long)
    if data.source == "shapes":  # square ones
        size = padded_size(max(data.short_sides), max(data.short_sides))
    for mode in ("off", "on"):
        cfg.backbone.checkpointing = mode  # type: ignore[assignment]
        once, image = training_bytes(cfg, size)
        room = [WORKSPACE * gigabytes * 1e9 - once for gigabytes in memories]
        most.append([max(0, math.floor(left / image)) for left in room])
    return [Card(round(gigabytes), *two) for gigabytes, *two in zip(memories, *most, strict=True)]


class PeakMemory:
    """Bytes in use: of tensors where there is a GPU, else of the process, looked at in between.

    `with PeakMemory() as memory:`, then `memory.now()` and `memory.peak()`; the peak of a process
    is sampled every so many seconds.
    """

    def __init__(self, every: float = 0.01) -> None:
        self.cuda, self.process = torch.cuda.is_available(), psutil.Process()
        self.every, self.highest = every, 0
        self.over, self.watcher = threading.Event(), threading.Thread(target=self.watch)

    def __enter__(self) -> "PeakMemory":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watcher.join()

    def watch(self) -> None:
        while not self.over.wait(self.every):
            self.highest = max(self.highest, self.now())

    def now(self) -> int:
        return int(torch.cuda.memory_allocated() if self.cuda else self.process.memory_info().rss)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated() if self.cuda else self.highest)
