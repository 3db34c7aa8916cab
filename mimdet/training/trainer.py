"""One training between two steps: gradients, updates, checkpoints, evaluations."""

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mimdet import processes
from mimdet.config import Config
from mimdet.data.coco import build_dataset
from mimdet.data.loader import Dataset, MicroBatch, TrainLoader
from mimdet.models.detector import Detector
from mimdet.predict import autocast
from mimdet.training.checkpoints import Checkpoint
from mimdet.training.optim import build_optimizer, rate_factor, scaled_rate, set_rates
from mimdet.training.run import Run, warm_start
from mimdet.training.signals import StepAbandoned, StopSignals, TrainingStopped


@dataclass(slots=True)
class Step:
    """What one optimiser step did; `train` yields it."""

    number: int
    """Steps done so far."""
    total: int
    losses: dict[str, float]
    """The five losses, averaged over the step's micro-batches."""
    loss: float
    grad_norm: float
    rate: float
    """Learning rate of the stem."""
    images: int
    seconds: float
    """Wall time of the step, loading included."""
    loading: float
    """Share of it spent waiting for the loader."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Metrics, when this step ended with an evaluation."""


class Trainer:
    """Everything of a training between two steps; `steps` is the loop."""

    def __init__(
        self, cfg: Config, run: Run, model: Detector, data: Dataset, val_data: Dataset | None
    ) -> None:
        t = cfg.training
        self.cfg = cfg
        self.run = run
        self.device = pick_device(t.device)
        self.model = model.to(self.device).train()
        self.loader = TrainLoader(
            data,
            cfg.data,
            t.batch_size,
            t.accumulate,
            t.seed,
            processes.rank(),
            processes.world(),
            workers=cfg.data.workers,
        )
        self.val_data = val_data
        self.data_version = data.version
        self.optimizer = build_optimizer(self.model, t)
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=t.precision == "fp16")
        per_epoch = len(data) / (t.batch_size * t.accumulate)
        self.total = t.steps or max(1, round(t.epochs * per_epoch))
        self.warmup = t.warmup_steps or round(t.warmup_epochs * per_epoch)
        self.evaluate_every = t.evaluate_every_steps or round(t.evaluate_every * per_epoch)
        self.checkpoint_every = t.checkpoint_every_steps or max(
            1, min(round(per_epoch), math.ceil(self.total / 10))
        )
        self.best = -1.0
        self.evaluated = -1
        self.updating = False
        self.done = 0
        self.saved = -1
        self.signals = StopSignals(at_once=processes.world() == 1)

    # -------------------------------------------------------------- the loop

    def steps(self) -> Iterator[Step]:
        self.resume()
        if self.done >= self.total and not self.evaluation_due():
            return
        with self.signals.handled():
            try:
                if self.evaluation_due():  # stopped between a step and its evaluation
                    with self.signals.interruptible():
                        self.evaluate()
                batches = iter(self.loader.batches(self.done, self.total))
                while self.done < self.total:
                    yield self.finish(self.one_step(batches))
                    self.stop_together()
            except StepAbandoned:
                self.save()
                raise TrainingStopped(self.done, self.run.path, self.signals.received) from None
            finally:
                self.save()

    def stop_together(self) -> None:
        """With several processes a signal waits for the end of the step, and stops them all."""
        if processes.any_process(self.signals.received > 0, self.device):
            self.signals.received = self.signals.received or signal.SIGTERM
            raise StepAbandoned

    def one_step(self, batches: Iterator[list[MicroBatch]]) -> Step:
        """Accumulate the gradients of the step's micro-batches, then update the weights once.

        The buffers (BatchNorm statistics) change in every forward pass; when the step is abandoned
        they are put back, so that what is saved is exactly the state after the last full step.
        """
        start = time.perf_counter()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        sums: dict[str, Tensor] = {}
        images, loading = 0, 0.0
        try:
            with self.signals.interruptible():
                before = time.perf_counter()
                micro_batches = next(batches)
                loading = time.perf_counter() - before
                set_rates(
                    self.optimizer,
                    rate_factor(self.done, self.total, self.warmup, self.cfg.training),
                )
                self.optimizer.zero_grad(set_to_none=True)
                for batch in micro_batches:
                    losses = self.backward(batch)
                    images += len(batch.images)
                    for name, value in losses.items():
                        sums[name] = sums.get(name, 0) + value / self.cfg.training.accumulate
                processes.sum_gradients(self.parameters)
                processes.average_buffers(self.model)
                processes.sum_in_place(list(sums.values()))
                grad_norm = self.clip([i for b in micro_batches for i in b.image_ids])
        except BaseException:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
            self.optimizer.zero_grad(set_to_none=True)
            raise
        self.update()
        self.done += 1
        seconds = time.perf_counter() - start
        values = {name: float(value) for name, value in sums.items()}
        rate = scaled_rate(self.cfg.training) * rate_factor(
            self.done - 1, self.total, self.warmup, self.cfg.training
        )
        total = sum(values.values())
        return Step(
            self.done,
            self.total,
            values,
            total,
            grad_norm,
            rate,
            images * processes.world(),
            seconds,
            loading / seconds,
        )

    def backward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Losses of one micro-batch, gradients added. Its random draws depend on nothing else."""
        t = self.cfg.training
        seed_all(t.seed, self.done, batch.number)
        with autocast(self.device, t.precision):
            losses: dict[str, Tensor] = self.model(batch.images, batch.targets)
        loss = sum(losses.values(), torch.zeros((), device=self.device))
        if not torch.isfinite(loss):
            values = {name: value.item() for name, value in losses.items()}
            raise FloatingPointError(self.not_finite("loss", str(values), batch.image_ids))
        self.scaler.scale(loss / t.accumulate).backward()
        return {name: value.detach() for name, value in losses.items()}

    def clip(self, image_ids: list[int | str]) -> float:
        """Clip the gradients where the configuration asks for it; returns their norm before."""
        self.scaler.unscale_(self.optimizer)
        limit = self.cfg.training.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if (
            not math.isfinite(norm) and not self.scaler.is_enabled()
        ):  # fp16 skips such a step itself
            raise FloatingPointError(self.not_finite("gradient", f"norm {norm}", image_ids))
        return norm

    def update(self) -> None:
        """One optimiser step."""
        self.updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updating = False

    def not_finite(self, what: str, value: str, image_ids: list[int | str]) -> str:
        return (
            f"step {self.done + 1}: the {what} is not finite ({value}) for the images {image_ids}. "
            "The run is saved as it was before this step; running it again repeats the step. Try a "
            "lower training.learning_rate, training.clip_norm=1, or training.precision=fp32, in a "
            "new run."
        )

    def finish(self, step: Step) -> Step:
        """Write the step's metrics; checkpoint and evaluate when it is time."""
        row: dict[str, Any] = {"step": step.number, "loss": step.loss, **step.losses}
        row |= {"grad_norm": step.grad_norm, "rate": step.rate, "images": step.images}
        row["time"] = {
            "seconds": round(step.seconds, 4),
            "images_per_second": round(step.images / step.seconds, 3),
            "loading": round(step.loading, 3),
            "gpu_memory_gb": peak_memory(self.device),
        }
        if processes.rank() == 0:
            self.run.append(row)
        if step.number % self.checkpoint_every == 0 or self.evaluation_due():
            self.save()
        if self.evaluation_due():
            with self.signals.interruptible():
                step.evaluation = self.evaluate()
        return step

    # -------------------------------------------------------------- evaluation

    def evaluation_due(self) -> bool:
        """True at the end and at every `evaluate_every` steps, until the result is recorded."""
        regular = self.evaluate_every > 0 and self.done > 0 and self.done % self.evaluate_every == 0
        if not regular and self.done != self.total:
            return False
        return self.done != self.evaluated

    def evaluate(self) -> dict[str, Any]:
        from mimdet.analysis.evaluate import evaluate
        from mimdet.analysis.results import save_results
        from mimdet.files import write_json

        if self.val_data is None:
            self.val_data = build_dataset(self.cfg.data, "val", self.cfg.training.seed)
        start = time.perf_counter()
        evaluation = evaluate(
            self.model,
            self.val_data,
            batch_size=self.cfg.training.batch_size,
            workers=self.cfg.data.workers,
            progress=len(self.val_data) >= 1000,
        )
        metrics = evaluation.metrics.to_dict()
        self.evaluated = self.done
        if processes.rank() != 0:
            return metrics
        data = self.val_data.version
        seconds = round(time.perf_counter() - start, 2)
        save_results(evaluation.results, self.run.path / "predictions.json")
        write_json(self.run.path / "eval.json", {"step": self.done, "data": data, **metrics})
        if evaluation.box["AP"] > self.best:
            self.best = evaluation.box["AP"]
            self.save(again=True)
            self.run.store.point("best", f"{self.done:06d}")
        # Last: a run that is killed before this line evaluates again when it is resumed.
        row: dict[str, Any] = {"step": self.done, "data": data, "evaluation": metrics}
        self.run.append(row | {"time": {"seconds": seconds}})
        return metrics

    # -------------------------------------------------------------- checkpoints

    def save(self, again: bool = False) -> None:
        """Write the state after the last full step, once per step.

        A failure in the middle of an update leaves weights that belong to no step: they are not
        saved, and the last checkpoint stays the newest one.
        """
        if self.updating or (self.done == self.saved and not again) or processes.rank() != 0:
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
        }
        self.run.store.save(Checkpoint(self.done, self.model.state_dict(), state))
        self.saved = self.done

    def resume(self) -> None:
        """Continue from the newest checkpoint, or start fresh (warm where `init_from` is set)."""
        last = self.run.store.load_last(self.device)
        if last is None:
            if self.cfg.training.init_from:
                warm_start(self.model, self.cfg.training.init_from)
            if processes.rank() == 0:
                self.run.record_environment(self.model, self.data_version)
        else:
            self.model.load_state_dict(last.weights)
            self.optimizer.load_state_dict(last.optimizer["optimizer"])
            self.scaler.load_state_dict(last.optimizer["scaler"])
            self.best = last.optimizer["best"]
            self.done = self.saved = last.step
        processes.wait_for_all()  # every process has read the checkpoint
        if processes.rank() == 0:
            self.run.forget_after(self.done)
            evaluations = [row["step"] for row in self.run.metrics() if "evaluation" in row]
            self.evaluated = evaluations[-1] if evaluations else -1
        self.evaluated = processes.from_first(self.evaluated)


def seed_all(*numbers: int) -> None:
    """Seed PyTorch's generators from a tuple of numbers, on every device."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    torch.manual_seed(mixed)


def use_threads(count: int) -> None:
    """Set PyTorch's CPU threads; 0 leaves them as they are."""
    if count:
        torch.set_num_threads(count)


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def peak_memory(device: torch.device) -> float:
    """Highest GPU memory allocated so far, GB; 0 on CPU."""
    if device.type != "cuda":
        return 0.0
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
