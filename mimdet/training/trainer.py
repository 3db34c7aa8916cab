"""One training between two steps: gradients, updates, checkpoints, evaluations, stop signals."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from mimdet import processes
from mimdet.config import Config, PretrainConfig, check_model_part, model_part
from mimdet.data.loader import StepLoader
from mimdet.files import finite, write_json
from mimdet.models.detector import autocast, compile_parts
from mimdet.processes import pick_device, seed_all
from mimdet.training.briefing import briefing, environment
from mimdet.training.checkpoints import Checkpoint
from mimdet.training.optim import Schedule, build_optimizer, freeze, scaled_rate
from mimdet.training.run import ENVIRONMENT, Run, TrainingStopped, read_environment


@dataclass(slots=True)
class Step:
    """What one optimiser step did; `train` yields it."""

    number: int
    """Steps done so far."""
    total: int
    losses: dict[str, float]
    """The losses of `Detector.forward`, averaged over the step's micro-batches."""
    loss: float
    grad_norm: float
    rate: float
    """Learning rate of the stem."""
    images: int
    seconds: float
    """Wall time of the step, loading included."""
    loading: float
    """Share of it spent waiting for the loader."""
    skipped: bool = False
    """Gradients that fp16 cannot hold: the weights are as before."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Metrics, when this step ended with an evaluation."""


class Trainer:
    """Everything of a training between two steps; `steps` is the loop.

    What depends on the task are three methods: `start`, `losses` and `measure`.
    """

    def __init__(
        self,
        cfg: Config | PretrainConfig,
        run: Run,
        model: nn.Module,
        loader: StepLoader,
        images: int,
        inputs: dict[str, Any],
    ) -> None:
        """images: of an epoch; inputs: what the run begins with, as `inputs_of` says it."""
        t = cfg.training
        self.cfg, self.run, self.loader, self.inputs = cfg, run, loader, inputs
        self.schedule = Schedule(t, images)
        self.device = pick_device(t.device)
        dtype = torch.float64 if t.precision == "fp64" else torch.float32
        self.model = self.replica = model.to(self.device, dtype).train()
        freeze(self.model, t.freeze)
        if t.compile:
            compile_parts(self.model)
        self.optimizer = build_optimizer(self.model, t)
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=t.precision == "fp16")
        self.signals = StopSignals(at_once=processes.world() == 1)
        self.cpu = time.process_time()
        self.done = 0  # full steps
        self.saved = self.evaluated = -1
        """The step that was saved last, and the one that was evaluated last."""
        self.updating = False
        self.unwritten: dict[str, Any] = {}
        """Row of the last step that is not in the metrics yet."""

    # -------------------------------------------------------------- what the task decides

    def start(self) -> None:
        """Give a fresh run its starting weights and its records; in the first process only."""
        raise NotImplementedError

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The losses of one micro-batch, whose sum is minimised."""
        raise NotImplementedError

    def measure(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the metrics of the model belong to, and the metrics; what else there is to keep, the
        first process writes into the run."""
        raise NotImplementedError

    # -------------------------------------------------------------- one step

    def one_step(self, batches: Iterator[list[Any]]) -> Step:
        """Accumulate the gradients of the step's micro-batches, then update the weights once."""
        start = time.perf_counter()
        rate = self.schedule.factor(self.done + 1)
        with self.whole_or_undone(), self.signals.interruptible():
            micro_batches = next(batches)
            loading = time.perf_counter() - start
            found = []
            for batch in micro_batches:
                with processes.kept_back(self.replica, batch is not micro_batches[-1]):
                    losses = self.forward(batch)
                    self.backward(losses)
                found.append({name: value.detach() for name, value in losses.items()})
            means = self.mean_losses(micro_batches, found)
            grad_norm = self.clip(micro_batches)
        skipped = self.update(rate)
        self.done += 1
        seconds = time.perf_counter() - start
        return Step(
            number=self.done,
            total=self.schedule.total,
            losses=means,
            loss=sum(means.values()),
            grad_norm=grad_norm,
            rate=scaled_rate(self.cfg.training) * rate,
            images=sum(len(batch.images) for batch in micro_batches) * processes.world(),
            seconds=seconds,
            loading=loading / seconds,
            skipped=skipped,
        )

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Losses of one micro-batch, whose random draws depend on nothing else."""
        t = self.cfg.training
        seed_all(t.seed, self.done, batch.number)
        with autocast(self.device, t.precision):
            return self.losses(batch)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of one micro-batch's share of the loss."""
        loss = sum(losses.values(), torch.zeros((), device=self.device))
        self.scaler.scale(loss / self.cfg.training.accumulate).backward()

    def mean_losses(
        self, micro_batches: list[Any], found: list[dict[str, Tensor]]
    ) -> dict[str, float]:
        """Over all micro-batches of all processes. FloatingPointError where one is not finite."""
        share = 1 / self.cfg.training.accumulate
        sums = {name: torch.stack([x[name] for x in found]).sum() * share for name in found[0]}
        processes.sum_in_place(list(sums.values()))
        means = {name: float(value) for name, value in sums.items()}
        if not all(map(math.isfinite, means.values())):
            suspects = [
                batch
                for batch, losses in zip(micro_batches, found, strict=True)
                if not all(value.isfinite() for value in losses.values())
            ]
            raise self.not_finite("loss", str(means), suspects)
        return means

    def clip(self, micro_batches: list[Any]) -> float:
        """Clip the gradients where the configuration asks for it; returns their norm before."""
        self.scaler.unscale_(self.optimizer)
        limit = self.cfg.training.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        # fp16 skips such a step itself.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self.not_finite("gradient", f"norm {norm}", micro_batches)
        return norm

    def update(self, rate: float) -> bool:
        """One optimiser step at this share of the base rates; whether fp16 skipped it."""
        self.updating = True
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updating = False
        return self.scaler.get_scale() < scale

    @contextmanager
    def whole_or_undone(self) -> Iterator[None]:
        """A step that is left in its middle has not been.

        The buffers (BatchNorm statistics) change in every forward pass; they are put back, so that
        what is saved is exactly the state after the last full step.
        """
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            yield
        except BaseException:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
            self.optimizer.zero_grad(set_to_none=True)
            raise

    def not_finite(self, what: str, value: str, batches: list[Any]) -> FloatingPointError:
        """The same error in every process; batches: this one's share of those to blame."""
        ids = processes.gather_lists([i for batch in batches for i in batch.image_ids])
        image_ids = processes.from_first(ids)
        return FloatingPointError(
            f"step {self.done + 1}: the {what} is not finite ({value}) for the images {image_ids}. "
            "The run is saved as it was before this step; running it again repeats the step. Try a "
            "lower training.learning_rate, training.clip_norm=1, or training.precision=fp32, in a "
            "new run."
        )

    # -------------------------------------------------------------- the loop

    def steps(self, announce: bool = False) -> Iterator[Step]:
        """Train to the end; RunInUse where another process trains in the same run.

        announce: say first what `briefing` knows.
        """
        total = self.schedule.total
        with self.run.in_training(total, lambda: self.done):
            self.resume()
            if self.done == total and not self.evaluation_due():
                return
            if announce and processes.rank() == 0:
                print(briefing(self.cfg, self.run.path, self.schedule, self.done, self.model))
            with self.signals.handled(), self.saved_on_leaving():
                if self.evaluation_due():  # stopped between a step and its evaluation
                    self.evaluate()
                batches = iter(self.loader.batches(self.done, total))
                while self.done < total:
                    yield self.finish(self.one_step(batches))
                    self.stop_together()

    @contextmanager
    def saved_on_leaving(self) -> Iterator[None]:
        """Save, however the training ends; what stopped it becomes one TrainingStopped."""
        try:
            yield
        except (GeneratorExit, KeyboardInterrupt):
            self.save()
            raise
        except StepAbandoned:
            self.save()
            raise TrainingStopped(self.done, self.run.path, self.signals.received) from None
        except processes.ProcessLost as lost:
            # First the message: torchrun is about to end the processes that are left.
            print(f"\n{lost}; run the same command again to resume", file=sys.stderr)
            self.save()
            raise TrainingStopped(self.done, self.run.path, signal.SIGTERM) from None
        except Exception as error:  # what went wrong first is what is told
            try:
                if self.done:  # a start that fails leaves its folder to another one
                    self.save()
            except Exception as second:
                error.add_note(f"Nor could step {self.done} be saved: {second}")
            steps = self.run.store.steps()
            last = self.run.store.folder_of(steps[-1]) if steps else "none yet"
            error.add_note(f"The run's last checkpoint: {last}; the same call goes on from it.")
            raise
        self.save()

    def stop_together(self) -> None:
        """With several processes a signal waits for the end of the step, and stops them all."""
        if processes.any_process(self.signals.received > 0, self.device):
            self.signals.received = self.signals.received or signal.SIGTERM
            raise StepAbandoned

    def finish(self, step: Step) -> Step:
        """Write the step's metrics; checkpoint and evaluate when it is time."""
        row: dict[str, Any] = {"step": step.number, "loss": step.loss, **step.losses}
        row |= {"grad_norm": step.grad_norm, "rate": step.rate, "images": step.images}
        if step.skipped:
            row["skipped"] = True
        row["time"] = {
            "seconds": round(step.seconds, 4),
            "images_per_second": round(step.images / step.seconds, 3),
            "loading": round(step.loading, 3),
            "gpu_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),  # 0 on a CPU
            "cpu_seconds": self.cpu_seconds(),
        }
        self.unwritten = row
        self.write_row()
        if step.number % self.schedule.checkpoint_every == 0 or self.evaluation_due():
            self.save()
        if self.evaluation_due():
            step.evaluation = self.evaluate()
        return step

    def write_row(self) -> None:
        """Add the step's row to the metrics, where that has not been done; in the first process."""
        if self.unwritten and processes.rank() == 0:
            self.run.append(self.unwritten)
        self.unwritten = {}

    def cpu_seconds(self) -> float:
        """Of this process since the last line of the metrics; processes of a loader left out."""
        before, self.cpu = self.cpu, time.process_time()
        return round(self.cpu - before, 3)

    def evaluation_due(self) -> bool:
        """True at the steps that ask for one, until the result is recorded."""
        return self.schedule.evaluates(self.done) and self.done != self.evaluated

    def evaluate(self) -> dict[str, Any]:
        """Measure the model and record it."""
        start = time.perf_counter()
        with self.signals.interruptible():
            about, metrics = self.measure()
            self.evaluated = self.done
            if processes.rank() == 0:
                about = {"step": self.done, "data": self.inputs["held_out"]} | about
                write_json(self.run.path / "eval.json", finite(about | metrics))
                seconds = round(time.perf_counter() - start, 2)
                spent = {"seconds": seconds, "cpu_seconds": self.cpu_seconds()}
                # Last: a run that is killed before this line evaluates again when it is resumed.
                self.run.append(about | {"evaluation": metrics, "time": spent})
        return metrics

    # -------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write the state after the last full step, once per step.

        A failure in the middle of an update leaves weights that belong to no step: they are not
        saved, and the last checkpoint stays the newest one.
        """
        if self.updating or self.done == self.saved or processes.rank() != 0:
            return
        self.run.check_owner()
        if self.unwritten:  # the disk failed: no checkpoint without the rows before it
            self.run.forget_after(self.done - 1)
            self.write_row()
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        part = model_part(self.cfg)
        checkpoint = Checkpoint(self.done, self.model.state_dict(), state, part)
        self.run.store.save(checkpoint, self.cfg.training.keep_checkpoints)
        self.saved = self.done

    def resume(self) -> None:
        """Continue from the newest checkpoint, or start fresh."""
        last = self.run.store.load_last()
        if last is None:
            if processes.rank() == 0:
                self.start()
                about = environment(self.cfg) | self.inputs
                write_json(self.run.path / ENVIRONMENT, read_environment(self.run.path) | about)
        else:
            check_model_part(last.model_part, self.cfg, str(self.run.path))
            self.model.load_state_dict(last.weights)
            self.optimizer.load_state_dict(last.optimizer["optimizer"])
            self.scaler.load_state_dict(last.optimizer["scaler"])
            self.done = self.saved = last.step
        processes.wait_for_all()  # every process has read the checkpoint
        if self.done != processes.from_first(self.done):
            raise ValueError(
                f"process {processes.rank()} found step {self.done} in {self.run.path}, the first "
                "process another one: all machines must see the same folder (a shared file system)"
            )
        if processes.rank() == 0:
            self.run.forget_after(self.done)
            self.evaluated = max((row["step"] for row in self.run.evaluations()), default=-1)
        self.evaluated = processes.from_first(self.evaluated)
        self.replica = processes.replicate(self.model)


# ------------------------------------------------------------------------------- stop signals


class StepAbandoned(Exception):
    """Leaves the middle of a step; never seen outside the training loop."""


HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
"""The terminal was closed; Windows has no such signal."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, HANGUP)


class StopSignals:
    """Turns the STOP_SIGNALS into `StepAbandoned`, but only where a step may be abandoned.

    Elsewhere (optimiser step, checkpoint) the signal waits for `check`. Outside the main thread,
    where Python allows no handlers, signals keep their usual meaning. With at_once=False signals
    are only recorded in `received`: several processes must stop at the same place.
    """

    def __init__(self, at_once: bool = True) -> None:
        self.at_once = at_once
        self.received = 0
        self._interruptible = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Install the handlers; put the old ones back on leaving."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # nohup has SIGHUP ignored, and means it.
        heard = [
            n
            for n in STOP_SIGNALS
            if n in STOP_SIGNALS[:2] or signal.getsignal(n) != signal.SIG_IGN
        ]
        old = {number: signal.signal(number, self._handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal abandons the work at once."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
        self.check()

    def check(self) -> None:
        if self.received and self.at_once:
            raise StepAbandoned

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if not self.at_once:
            processes.hurry()
        if self._interruptible and self.at_once:
            self._interruptible = False
            raise StepAbandoned
