"""Where the time of a training step goes."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimdet.analysis.cost import markdown_table
from mimdet.config import Config
from mimdet.models.detector import Detector, autocast, build_detector
from mimdet.processes import set_up
from mimdet.training.plan import training_data
from mimdet.training.run import Run
from mimdet.training.train import DetectorTrainer

WARM = 2
MATRIX = 1024
"""Side of the matrices whose product shows the peak."""
OTHER = "the rest"


@dataclass(slots=True)
class Part:
    """One part of a step, without the parts inside it."""

    name: str
    seconds: float
    """Median over the steps: of the CPU, all threads together, or of a GPU."""
    multiply_adds: int
    """Of matrix products, convolutions and attention."""


@dataclass(slots=True)
class Profile:
    """What `profile` found; print it, or `mimdet.viz.show_profile` draws it."""

    preset: str
    device: str
    images: int
    """Of the micro-batch that a step here has."""
    parts: list[Part]
    """In the order of a step; loading is that of a single process."""
    peak: float
    """Multiply-adds a second of a large matrix product, by the same clock and precision."""

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return sum(part.seconds for part in self.parts)

    def share_of_peak(self, part: Part | None = None) -> float:
        """Of a part, or of all that is computed (loading left out): what it does of `peak`."""
        parts = [p for p in self.parts if p.name != "loading"] if part is None else [part]
        seconds = sum(p.seconds for p in parts)
        return sum(p.multiply_adds for p in parts) / max(seconds, 1e-9) / self.peak

    def __str__(self) -> str:
        """A table in Markdown, and what it is of."""
        rows = [
            {
                "part": part.name,
                "ms": f"{1000 * part.seconds:.1f}",
                "of the step": f"{100 * part.seconds / self.seconds:.0f} %",
                "multiply-adds, G": f"{part.multiply_adds / 1e9:.2f}",
                "of the peak": f"{100 * self.share_of_peak(part):.0f} %",
            }
            for part in self.parts
        ]
        return (
            f"{self.preset}: a step of {self.images} images takes {self.seconds:.3g} s of "
            f"{self.device}; computing reaches {100 * self.share_of_peak():.0f} % of the "
            f"{self.peak / 1e9:.4g} G multiply-adds a second of a matrix product\n\n"
            f"{markdown_table(rows)}"
        )


class Clock:
    """Seconds and multiply-adds by the part that is running; each moment counts for one part."""

    def __init__(self, device: torch.device, operations: FlopCounterMode | None = None) -> None:
        self.device, self.operations = device, operations
        self.seconds: Counter[str] = Counter()
        self.multiply_adds: Counter[str] = Counter()
        self.part = OTHER
        self.last = self.now()

    def now(self) -> tuple[float, int]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() if self.device.type == "cuda" else time.process_time()
        return seconds, self.operations.get_total_flops() // 2 if self.operations else 0

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Inside, time and operations are those of `part`."""
        outer = self.change(part)
        try:
            yield
        finally:
            self.change(outer)

    def change(self, part: str) -> str:
        now = self.now()
        self.seconds[self.part] += now[0] - self.last[0]  # type: ignore[assignment]
        self.multiply_adds[self.part] += now[1] - self.last[1]
        before, self.part, self.last = self.part, part, now
        return before


def places(model: Detector, trainer: DetectorTrainer) -> list[tuple[Any, str, str]]:
    """(owner, method, part) of a step, in the order of the table."""
    backbone, rpn, heads = model.backbone, model.rpn, model.roi_heads
    own = [(getattr(backbone, name, None), "forward", name) for name in ("stem", "encoder")]
    own += [(getattr(backbone, "decoder", None), "forward", "decoder")]
    own += [(backbone, "forward", "other backbone"), (model.neck, "forward", "FPN")]
    own += [(rpn, "forward", "RPN"), (rpn, "losses", "RPN losses"), (rpn, "propose", "proposals")]
    own += [(heads, "sample", "RoI sampling"), (heads.box_pool, "forward", "box head")]
    own += [(heads.box_head, "forward", "box head"), (heads, "box_losses", "box losses")]
    own += [(heads, "mask_loss", "mask losses"), (heads.mask_head, "forward", "mask head")]
    own += [(heads.mask_pool, "forward", "mask head"), (trainer, "backward", "backward")]
    own += [(trainer, "clip", "optimiser"), (trainer, "update", "optimiser")]
    return [place for place in own if place[0] is not None]


@contextmanager
def watched(where: list[tuple[Any, str, str]], clock: Clock) -> Iterator[None]:
    """Inside, each of these methods is measured as its part."""

    def around(method: Any, part: str) -> Any:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with clock.measuring(part):
                return method(*args, **kwargs)

        return measured

    for owner, method, part in where:
        object.__setattr__(owner, method, around(getattr(owner, method), part))
    try:
        yield
    finally:
        for owner, method, _ in where:
            object.__delattr__(owner, method)


def profile(cfg: Config, steps: int = 5) -> Profile:
    """Measure `steps` steps of one micro-batch here, after two that warm up.

    Data as for `mimdet.training.plan.forecast`. Parts are measured one after the other: a GPU is
    waited for at each border, so their sum may exceed what a step takes. ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: measure at least 1")
    set_up(cfg.training)
    cfg, data, _ = training_data(cfg)
    cfg.training.accumulate = 1
    with tempfile.TemporaryDirectory() as folder:
        model = build_detector(cfg)
        run = Run(Path(folder, "run"), cfg)
        trainer = DetectorTrainer(cfg, run, model, data, data, {})
        device, loader, done = trainer.device, trainer.loader, []
        loader.workers = 0
        where = places(model, trainer)
        for step in range(WARM + steps):
            clock = Clock(device)
            with watched(where, clock):
                with clock.measuring("loading"):
                    batches = list(loader.batches(step, step + 1))
                with clock.measuring(OTHER):
                    trainer.one_step(iter(batches))
            done.append(clock.seconds)
        # Fused attention is not counted on every device: its parts are.
        with FlopCounterMode(display=False) as operations, sdpa_kernel(SDPBackend.MATH):
            clock = Clock(device, operations)
            with watched(where, clock), clock.measuring(OTHER):
                trainer.one_step(iter(batches))
    names = list(dict.fromkeys(["loading", *(part for _, _, part in where), OTHER]))
    parts = [
        Part(name, median(s[name] for s in done[WARM:]), clock.multiply_adds[name])
        for name in names
        if name in clock.seconds or name == "loading"
    ]
    images = sum(len(batch.images) for batch in batches[0])
    where_it_ran = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU time"
    return Profile(
        cfg.preset or cfg.backbone.kind,
        where_it_ran,
        images,
        parts,
        matrix_peak(device, cfg.training.precision),
    )


def matrix_peak(device: torch.device, precision: str, repeats: int = 5) -> float:
    """Multiply-adds a second of the fastest of some large matrix products, by `Clock`'s clock."""
    clock, times = Clock(device), []
    with autocast(device, precision), torch.no_grad():
        a, b = torch.rand(2, MATRIX, MATRIX, device=device)
        for _ in range(repeats):
            begin = clock.now()[0]
            a @ b
            times.append(clock.now()[0] - begin)
    return MATRIX**3 / max(min(times), 1e-9)
