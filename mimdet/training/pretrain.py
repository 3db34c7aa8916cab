"""Pre-train a masked autoencoder, on the same loop as a detector's training."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mimdet import processes
from mimdet.config import RANDOM, MAEConfig, PretrainConfig
from mimdet.data.loader import MicroBatch
from mimdet.data.pictures import ImageLoader, Images, build_images, held_out_images
from mimdet.files import write_file
from mimdet.inference import generator_for
from mimdet.models.checkpoint_files import read_checkpoint
from mimdet.models.detector import Detector, autocast
from mimdet.models.mae import MAE
from mimdet.models.rcnn import pad_and_normalise, to_uint8
from mimdet.models.weights import load_exactly, load_mae_model, save_mae
from mimdet.processes import set_up
from mimdet.training.checkpoints import MAE_FILE, weights_of
from mimdet.training.run import Run, inputs_of, load_detector
from mimdet.training.trainer import Step, Trainer

SHOWN = 6
"""Reconstructions in a picture."""


def build_mae(cfg: MAEConfig) -> MAE:
    """The autoencoder a configuration describes."""
    sizes = asdict(cfg)
    del sizes["sample_ratio"]  # it is that of each call
    return MAE(**sizes)


def load_model(source: str | Path, **options: Any) -> Detector | MAE:
    """The detector or the autoencoder of a run, a file or shipped weights, in evaluation mode.

    options: those of `load_detector`, which an autoencoder has none of.
    """
    weights = weights_of(source)
    own = Path(source, "config.json").exists() and Path(weights) != Path(source, MAE_FILE)
    if own or read_checkpoint(weights).is_detector:
        return load_detector(source, **options)
    return load_mae_model(weights)


def pretrain(cfg: PretrainConfig, run: str | Path, announce: bool = False) -> Iterator[Step]:
    """Train and yield after every step, as `mimdet.train` does; resumes what the run holds.

    The run ends with `mae.safetensors`, which `mimdet.load_mae` and `load_mae_model` read, and
    holds a picture of reconstructions of held-out images for every evaluation.
    """
    set_up(cfg.training)
    images, held_out = build_images(cfg.data, cfg.training.seed)
    inputs = inputs_of(cfg, Path(run), data=images.version, held_out=images.version)
    record = processes.in_turn(lambda: Run(run, cfg))
    record.keep({})
    yield from PreTrainer(cfg, record, images, held_out, inputs).steps(announce)


class PreTrainer(Trainer):
    """What is special to an autoencoder: its loss, and looking at reconstructions."""

    cfg: PretrainConfig
    model: MAE

    def __init__(
        self,
        cfg: PretrainConfig,
        run: Run,
        images: Images,
        held_out: Images,
        inputs: dict[str, Any],
    ) -> None:
        t, side = cfg.training, cfg.mae.image_size
        rank, world = processes.rank(), processes.world()
        loader = ImageLoader(
            images, cfg.data, side, t.batch_size, t.accumulate, t.seed, rank, world
        )
        super().__init__(cfg, run, build_mae(cfg.mae), loader, len(images), inputs)
        self.held_out_images = held_out_images(held_out, side)

    def losses(self, batch: MicroBatch) -> dict[str, Tensor]:
        images = pad_and_normalise(batch.images, self.model).tensors
        return {"loss_mae": self.replica(images, self.cfg.mae.sample_ratio).loss}

    def start(self) -> None:
        """A new run may go on from another autoencoder of the same sizes."""
        source = self.cfg.training.init_from
        if source in ("", RANDOM):
            return
        heads = self.model.num_heads, self.model.decoder_heads
        found = load_mae_model(weights_of(source))
        if (found.num_heads, found.decoder_heads) != heads:
            raise ValueError(
                f"{source} has {found.num_heads} attention heads and {found.decoder_heads} in its "
                f"decoder, this autoencoder {heads[0]} and {heads[1]}: set mae.num_heads and "
                "mae.decoder_heads to those of the file"
            )
        load_exactly(self.model, found.state_dict(), source)

    def measure(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Loss of the held-out images, always with the same patches kept; pictures of a few.

        Without held-out images only the weights are written.
        """
        if processes.rank() != 0:
            return {}, {"held_out": {}}
        save_mae(self.model, self.run.path / MAE_FILE)
        if not self.held_out_images:
            return {}, {"held_out": {}}
        ratio = self.cfg.mae.sample_ratio
        loss, picture = look(self.model, self.held_out_images, ratio, self.device)
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        file = self.run.path / "reconstructions" / f"{self.done:06d}.png"
        write_file(file, lambda partial: image.save(partial, format="PNG"))
        return {}, {"held_out": {"loss": loss}}


@torch.inference_mode()
def look(
    model: MAE, images: list[Tensor], ratio: float, device: torch.device, batch_size: int = 32
) -> tuple[float, Tensor]:
    """(mean loss, picture (3, H, W) uint8): a row each of originals, what is kept, what is painted.

    images: (3, side, side) uint8, at least one. Each image's patches are drawn from its number, so
    that two evaluations differ by the weights alone.
    """
    training = model.training
    model.eval()
    total = 0.0
    rows: list[Tensor] = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        batch = pad_and_normalise(part, model).tensors
        draws = [generator_for(start + i, device) for i in range(len(part))]
        with autocast(device, "fp64" if batch.dtype == torch.float64 else "auto"):
            out = model(batch, ratio, generators=draws)
        total += float(out.loss) * len(part)
        if not rows:
            shown = model.reconstruct(batch.float(), out)
            rows = [to_uint8(x[:SHOWN]) for x in (batch, shown.visible, shown.pasted)]
    model.train(training)
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return total / len(images), picture
