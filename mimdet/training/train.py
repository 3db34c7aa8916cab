"""Train a detector: a generator that can be stopped and resumed at any step."""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from mimdet import processes
from mimdet.analysis.evaluate import belonging, evaluate, ids_of_labels, ratio_row, save_results
from mimdet.analysis.metrics import Metrics, percent
from mimdet.config import (
    RANDOM,
    Config,
    DataConfig,
    PretrainConfig,
    TrainingConfig,
    change,
    difference,
)
from mimdet.data.coco import build_dataset
from mimdet.data.loader import Dataset, MicroBatch, TrainLoader
from mimdet.downloads import readable
from mimdet.files import write_json
from mimdet.models.batchnorm import SyncedBatchNorm
from mimdet.models.detector import Detector, build_detector, category_entries
from mimdet.models.sampling import DEFAULT, Sampling
from mimdet.presets import PRESETS, STARTS_FROM_MAE
from mimdet.processes import set_up
from mimdet.training.checkpoints import MetricsFile, has_checkpoint
from mimdet.training.initial import align_stem, check_frozen, initialise, teach_c4
from mimdet.training.optim import frozen_parts
from mimdet.training.owner import read_status
from mimdet.training.run import Run, inputs_of, load_detector, read_environment, stored_config
from mimdet.training.slots import load_slots, name_dataset, read_slots
from mimdet.training.trainer import Step, Trainer

MEASURED = 20
"""Steps after which `outlook` is worth saying, and seconds of at least three steps."""
MEASURED_SECONDS = 60.0
WEEKS = 14 * 86_400
"""Seconds that are worth a warning."""


def train(
    cfg: Config,
    run: str | Path,
    *,
    model: Detector | None = None,
    train_data: Dataset | None = None,
    val_data: Dataset | None = None,
    dataset: Callable[[DataConfig, Literal["train", "val"]], Dataset] | None = None,
    locked: bool = False,
    announce: bool = False,
    **slots: Any,
) -> Iterator[Step]:
    """Train and yield after every step; `for step in train(cfg, "runs/x"): ...`.

    A run directory that already holds this configuration is resumed, bit for bit as if it had
    never stopped (on CPU). Ctrl-C, SIGTERM and a closed terminal abandon the step in progress,
    save, and raise TrainingStopped; leaving the loop saves too.

    dataset: a function `(cfg.data, split) -> data set`; slots: parts of the detector, as for
    `build_detector` (sampler=..., stem=...). Both may be written in a cell: their code is kept with
    the run. A finished model, for example with such parts, and data sets may be passed in as well.
    locked: this process holds the run's lock already (`alone_in`). announce: say first where this
    runs and what it needs (`briefing`).

    Raises ValueError, before anything is written, for a model of another configuration, for data
    sets whose classes differ, and for a recipe that lacks its weights; and where the run began with
    other data, weights, classes or code than these.
    """
    said, begun = check_start(cfg), has_checkpoint(Path(run))
    set_up(cfg.training)
    if said and processes.rank() == 0 and not begun:
        print(said)
    own = {"dataset": dataset} if dataset is not None else {}
    name_dataset(cfg, read_slots(own))
    data = train_data or build_dataset(cfg.data, "train", cfg.training.seed, cfg.detector.masks)
    held_out = val_data or build_dataset(cfg.data, "val", cfg.training.seed, cfg.detector.masks)
    ids_of_labels(data.categories, held_out)
    versions = {"data": data.version, "held_out": held_out.version}
    inputs = inputs_of(cfg, Path(run), **versions, classes=list(data.categories))
    if not begun:
        check_length(cfg, len(data))
    for part in (data, held_out):
        if processes.rank() == 0 and getattr(part, "summary", None):
            print(part.summary)  # type: ignore[attr-defined]
    if model is None:
        if cfg.training.freeze and cfg.training.init_from in ("", RANDOM):
            raise ValueError(
                f"training.freeze keeps {', '.join(cfg.training.freeze)} as it begins, and "
                "training.init_from names no weights to begin with: give them (--init-from)"
            )
        adapt_to_data(cfg, data)
        model = build_detector(cfg, **slots)
    elif slots:
        raise ValueError(f"the model is complete: give {', '.join(slots)} to build_detector")
    check_model(model, cfg, data.categories)
    if not begun:
        check_taught_alone(model, cfg.training)
    model.categories, model.category_ids = list(data.categories), list(data.category_ids)
    texts = read_slots(model.slots | own)
    # The first process makes the directory, the others then find it.
    record = processes.in_turn(lambda: Run(run, cfg, locked=locked))
    record.keep(texts)
    yield from DetectorTrainer(cfg, record, model, data, held_out, inputs).steps(announce)


def fit(cfg: Config, name: str, *, runs: str | Path = "runs", **parts: Any) -> Detector:
    """Train to the end with a progress bar and return the detector, in evaluation mode."""
    path = Path(runs) / name
    for _ in show_progress(train(cfg, path, **parts)):
        pass
    return load_detector(path, trust_code=True)


def resume(
    run: str | Path, *, trust_code: bool = False, locked: bool = False, announce: bool = False
) -> Iterator[Step]:
    """Train in the folder `run`, or go on with it, to the last step; yields as `mimdet.train`.

    The folder holds config.json, and under slots/ the parts that were written in a notebook; they
    are executed only with trust_code=True. FileNotFoundError for a folder that holds no run.
    """
    path = Path(run)
    cfg = stored_config(path)
    set_up(cfg.training)  # a stem written in a cell draws its weights when it is loaded
    if isinstance(cfg, PretrainConfig):
        from mimdet.training.pretrain import pretrain

        yield from pretrain(cfg, path, announce)
        return
    slots = load_slots(path, cfg, trust_code)
    try:
        yield from train(cfg, path, locked=locked, announce=announce, **slots)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} (where the files of this run lie elsewhere now, say so in "
            f"{path / 'config.json'}, or give their paths to the command that began it)"
        ) from error


def extend(run: str | Path, steps: int) -> Path:
    """Make the folder RUN+STEPS, in which `resume` trains a finished run's model `steps` more.

    It is a training of its own, with the same configuration, the run's last weights and another
    seed, so that images come in another order. It has its own warm-up and schedule: at the end of
    the first one the rates are next to nothing, and one of more steps would have had others from
    its first step on. So AP falls a little before it rises.

    The same call again finds the same folder. ValueError for a run that is not finished.
    """
    path = Path(run)
    cfg, status = stored_config(path), read_status(path)
    if steps < 1 or status["state"] != "finished":
        raise ValueError(
            f"{path} is {status['state']}, at step {status['step']} of {status['total']}: --steps "
            f"gives a finished run at least one more; `mimdet resume {path}` finishes it"
        )
    change(
        cfg.training,
        steps=steps,
        seed=cfg.training.seed + 1,
        init_from=str(path),
        align_stem=0,
        c4_first=0,
    )
    set_up(cfg.training)

    def make() -> Path:
        more = Run(path.with_name(f"{path.name}+{steps}"), cfg).path
        if (path / "slots").exists():
            shutil.copytree(path / "slots", more / "slots", dirs_exist_ok=True)
        return more

    return processes.in_turn(make)


class DetectorTrainer(Trainer):
    """What is special to a detector: its losses, AP, and the best checkpoint by box AP."""

    cfg: Config
    model: Detector

    def __init__(
        self,
        cfg: Config,
        run: Run,
        model: Detector,
        data: Dataset,
        val_data: Dataset,
        inputs: dict[str, Any],
    ) -> None:
        t, rank, world = cfg.training, processes.rank(), processes.world()
        began = read_environment(run.path) if has_checkpoint(run.path) else {}
        sizes, first_batch = (t.batch_size, t.accumulate), began.get("batch_size", 0)
        loader = TrainLoader(
            data, cfg.data, *sizes, t.seed, rank, world, cfg.data.workers, first_batch
        )
        super().__init__(cfg, run, model, loader, len(data), inputs)
        self.val_data = val_data

    def start(self) -> None:
        t = self.cfg.training
        if t.init_from not in ("", RANDOM):
            report = initialise(self.model, t.init_from, t.init_decoder)
            check_frozen(self.model, t, report)
            align_stem(self.model, t.init_from, list(self.first_batches(t.align_stem)))
        if t.c4_first:
            teach_c4(self.model, self.first_batches(t.c4_first), t.c4_first)
        write_json(self.run.path / "categories.json", category_entries(self.model))

    def first_batches(self, count: int) -> Iterator[MicroBatch]:
        batches = (batch for step in self.loader.batches(0, count) for batch in step)
        return islice(batches, count)

    def losses(self, batch: MicroBatch) -> dict[str, Tensor]:
        sampled = (1 - self.cfg.training.whole_at_end) * self.schedule.total  # steps
        sampling = DEFAULT if self.done < sampled else Sampling(1.0)
        return self.replica(batch.images, batch.targets, sampling=sampling)

    def measure(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self.model.step = self.done
        evaluation = evaluate(
            self.model,
            self.val_data,
            batch_size=self.cfg.training.batch_size,
            workers=self.cfg.data.workers,
            progress=len(self.val_data) >= 1000,
        )
        if processes.rank() == 0:
            file = self.run.path / "predictions.json"
            evaluation.about["predictions"] = save_results(evaluation.results, file)
            earlier = [row["evaluation"]["box"]["AP"] for row in self.run.evaluations()]
            best = max((ap for ap in earlier if ap is not None), default=-1.0)
            if evaluation.box["AP"] > best:
                self.run.store.point("best", f"{self.done:06d}")
        return evaluation.about, evaluation.metrics.to_dict()


def rows_from_training(run: str | Path, model: Detector, dataset: Dataset) -> list[dict[str, Any]]:
    """The row of ratio 1 from a run's last evaluation while training; none, and a line that says
    why, where that belongs to anything else than this evaluation would (`belonging`)."""
    wanted = belonging(model, dataset, 1.0)
    rows = [row for row in MetricsFile(Path(run, "metrics.jsonl")).read() if "evaluation" in row]
    last = rows[-1] if rows else {}
    other = [name for name, value in wanted.items() if last.get(name) != value]
    if not other:
        row = ratio_row(1.0, [last["evaluation"]], last["time"]["seconds"])
        return [row | {"about": wanted}]
    if processes.rank() == 0:
        print(f"ratio 1 is measured: the training's last evaluation has another {', '.join(other)}")
    return []


def check_start(cfg: Config) -> str:
    """ValueError for a recipe that starts from a masked autoencoder, and is given none; for a stem
    that is to be aligned with none; and for a c4 to be taught first without a loss. -> what is to
    be said where random weights are meant."""
    if cfg.training.align_stem and cfg.training.init_from in ("", RANDOM):
        raise ValueError(
            "training.align_stem fits the stem to an autoencoder's patch embedding, and "
            "training.init_from names none: give it (--init-from FILE), or set align_stem=0"
        )
    if not 0 <= cfg.training.whole_at_end <= 1:
        raise ValueError(
            f"training.whole_at_end={cfg.training.whole_at_end} is a share of the steps: 0 to 1"
        )
    if cfg.training.c4_first and not cfg.detector.c4_loss:
        raise ValueError(
            f"training.c4_first={cfg.training.c4_first} trains the backbone with the loss on c4: "
            "give detector.c4_loss a weight above 0"
        )
    assumed = cfg.preset.startswith(STARTS_FROM_MAE)
    if assumed and not cfg.training.init_from:
        raise ValueError(
            f"{cfg.preset} starts from the weights of a masked autoencoder, and training.init_from "
            "is empty: name them (--init-from FILE; `mimdet download` lists public ones), or say "
            f"training.init_from={RANDOM!r} to begin with random weights, which takes far longer"
        )
    if not assumed or cfg.training.init_from != RANDOM:
        return ""
    return (
        f"{cfg.preset} begins with random weights. Its schedule assumes an autoencoder's: nothing "
        "is published without, and plain ViTs need several times the epochs (Li et al. 2021)."
    )


def check_length(cfg: Config, images: int) -> None:
    """ValueError where epochs were changed and the steps of the preset would decide instead."""
    t = cfg.training
    start = PRESETS[cfg.preset]().training if cfg.preset in PRESETS else t
    if t.steps and t.epochs != start.epochs and t.steps == start.steps:
        a_step = t.step_images
        raise ValueError(
            f"training.epochs={t.epochs:g} is {round(t.epochs * images / a_step):,} steps "
            f"({images:,} images, {a_step} a step), but {cfg.preset} sets training.steps="
            f"{t.steps:,}, which decides, {t.steps * a_step / images:.3g} epochs: set "
            "training.steps=0 too"
        )


def check_model(model: Detector, cfg: Config, categories: list[str]) -> None:
    """ValueError where `model` was built from another configuration, or for other data."""
    changed = [
        line
        for line in difference(model.config, cfg)
        if line.startswith(("backbone.", "detector."))
    ]
    if changed:
        raise ValueError(
            "the model was built from another configuration than the one to be trained:\n  "
            + "\n  ".join(changed)
            + "\nBuild it again, with build_detector(cfg), after the last change of cfg."
        )
    if cfg.detector.num_classes != len(categories):
        raise ValueError(
            f"the detector has {cfg.detector.num_classes} classes, the data {len(categories)}: "
            f"set detector.num_classes={len(categories)}"
        )
    frozen_parts(model, cfg.training.freeze)


def check_taught_alone(model: Detector, cfg: TrainingConfig) -> None:
    """ValueError where the first of several processes, which teaches a stem or c4 alone, would wait
    for the others in a norm."""
    synced = any(isinstance(part, SyncedBatchNorm) for part in model.backbone.modules())
    if processes.world() > 1 and synced and (cfg.align_stem or cfg.c4_first):
        raise ValueError(
            "training.align_stem and training.c4_first teach in the first process alone, and the "
            "BatchNorm in this backbone waits for all: begin the run with one process (it goes on "
            "with more from a checkpoint), or set both to 0"
        )


def adapt_to_data(cfg: Config, data: Dataset) -> None:
    """The class count, and whether there are masks to learn, follow from the data."""
    cfg.detector.num_classes = len(data.categories)
    if cfg.detector.masks and not data.has_masks:
        if processes.rank() == 0:
            print("The data set has boxes but no masks: training without the mask head.")
        cfg.detector.masks = False


def show_progress(steps: Iterable[Step], every: float = 1) -> Iterator[Step]:
    """Pass the steps on, drawing one tqdm line on standard output every so many seconds."""
    from tqdm import tqdm

    bar = tqdm(
        unit="step",
        mininterval=every,
        maxinterval=max(10, every),
        file=sys.stdout,
        dynamic_ncols=True,
        delay=1e-3,  # not before the first step: until then others print
    )
    with bar:
        for step in steps:
            if bar.total is None:
                bar.total, bar.n, bar.initial = step.total, step.number - 1, step.number - 1
            bar.update()
            speed = f"{step.images / step.seconds:.1f} img/s"
            bar.set_postfix_str(f"loss {step.loss:.3g}, {speed}", refresh=False)
            if step.evaluation:
                bar.write(f"step {step.number}: {summary(step.evaluation)}")
            if step.evaluation and step.number == step.total and "box" in step.evaluation:
                bar.write(Metrics(**step.evaluation).summary())
            yield step


def outlook(step: Step, seconds: float) -> str:
    """How long the steps after this one take, of so many seconds each, and the memory so far."""
    from tqdm import tqdm

    rest = (step.total - step.number) * seconds
    left = tqdm.format_interval(rest)
    used = torch.cuda.max_memory_allocated() or psutil.Process().memory_info().rss
    text = (
        f"time    about {left} for {step.total - step.number:,} more steps, without evaluations; "
        f"memory so far {readable(used)} a process"
    )
    if rest < WEEKS:
        return text
    return (
        f"{text}\nwarning: that is {rest / 604_800:.0f} weeks. `mimdet plan` says what other "
        "ratios and GPUs would take; --steps or --epochs shorten a new run"
    )


def summary(evaluation: dict) -> str:  # type: ignore[type-arg]
    """`box AP 18.2, mask AP 14.9` of an evaluation's metrics; of an autoencoder its loss."""
    if "held_out" in evaluation:
        loss = evaluation["held_out"].get("loss")
        return "" if loss is None else f"loss of held-out images {loss:.4f}"
    parts = [
        f"{kind} AP {percent(evaluation[kind]['AP'])}"
        for kind in ("box", "mask")
        if evaluation.get(kind)
    ]
    return ", ".join(parts)
