"""Pre-train a masked autoencoder, on the same loop as a detector's training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimdet import processes
from mimdet.config import MAEConfig, PretrainConfig
from mimdet.data.pictures import PictureBatch, PictureLoader, build_pictures, held_out_images
from mimdet.files import write_file, write_json
from mimdet.inference import autocast, generator_for
from mimdet.models.mae import MAE
from mimdet.models.rcnn import IMAGENET_MEAN, IMAGENET_STD, pad_and_normalise
from mimdet.models.weights import load_exactly, load_mae_model, save_mae
from mimdet.training.run import MAE_FILE, Run
from mimdet.training.trainer import Step, Trainer, seed_all, use_threads

SHOWN = 6
"""Reconstructions in a picture."""


def build_mae(cfg: MAEConfig) -> MAE:
    """The autoencoder a configuration describes."""
    return MAE(
        cfg.image_size,
        cfg.patch_size,
        cfg.embed_dim,
        cfg.depth,
        cfg.num_heads,
        cfg.decoder_dim,
        cfg.decoder_depth,
        cfg.decoder_heads,
        cfg.norm_pix_loss,
    )


def pretrain(cfg: PretrainConfig, run: str | Path) -> Iterator[Step]:
    """Train and yield after every step, as `mimdet.train` does; resumes what the run holds.

    The run ends with `mae.safetensors`, which `mimdet.load_mae` and `load_mae_model` read, and
    holds a picture of reconstructions of held-out images for every evaluation.
    """
    processes.join()
    seed_all(cfg.training.seed)
    use_threads(cfg.training.threads)
    train_pictures, held_out = build_pictures(cfg.data, cfg.training.seed)
    t = cfg.training
    loader = PictureLoader(
        train_pictures,
        cfg.data,
        cfg.mae.image_size,
        t.batch_size,
        t.accumulate,
        t.seed,
        processes.rank(),
        processes.world(),
    )
    record = processes.in_turn(lambda: Run(run, cfg))
    images = held_out_images(held_out, cfg.mae.image_size)
    yield from PreTrainer(
        cfg, record, build_mae(cfg.mae), loader, train_pictures.version, images
    ).steps()


class PreTrainer(Trainer):
    """What is special to an autoencoder: its loss, and looking at reconstructions."""

    model: MAE

    def __init__(
        self,
        cfg: PretrainConfig,
        run: Run,
        model: MAE,
        loader: PictureLoader,
        data_version: str,
        held_out: list[Tensor],
    ) -> None:
        """held_out: (3, side, side) uint8 images, not trained on."""
        super().__init__(cfg, run, model, loader, loader.length, data_version)
        self.ratio = cfg.mae.sample_ratio
        self.held_out = held_out

    def losses(self, batch: PictureBatch) -> dict[str, Tensor]:
        images = pad_and_normalise(batch.images, self.device).tensors
        return {"loss_mae": self.model(images.to(dtype_of(self.model)), self.ratio).loss}

    def start(self) -> None:
        """A new run may go on from another autoencoder of the same sizes."""
        source = self.cfg.training.init_from
        if not source:
            return
        if (Path(source) / MAE_FILE).exists():  # a run of `mimdet pretrain`
            source = str(Path(source) / MAE_FILE)
        heads = self.model.num_heads, self.model.decoder_heads
        found = load_mae_model(source)
        if (found.num_heads, found.decoder_heads) != heads:
            raise ValueError(
                f"{source} has {found.num_heads} attention heads and {found.decoder_heads} in its "
                f"decoder, this autoencoder {heads[0]} and {heads[1]}: set mae.num_heads and "
                "mae.decoder_heads to those of the file"
            )
        load_exactly(self.model, found.state_dict(), source)

    def evaluate(self) -> dict[str, Any]:
        """Loss of the held-out images, always with the same patches kept; pictures of a few.

        Without held-out images only the weights are written.
        """
        self.evaluated = self.done
        metrics: dict[str, Any] = {"held_out": {}}
        if processes.rank() != 0:
            return metrics
        if self.held_out:
            loss, picture = look(self.model, self.held_out, self.ratio, self.device)
            metrics["held_out"]["loss"] = loss
            folder = self.run.path / "reconstructions"
            write_file(folder / f"{self.done:06d}.png", lambda partial: save_png(picture, partial))
        save_mae(self.model, self.run.path / MAE_FILE)
        write_json(self.run.path / "eval.json", {"step": self.done, **metrics})
        self.run.append({"step": self.done, "data": self.data_version, "evaluation": metrics})
        return metrics


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
        batch = pad_and_normalise(part, device).tensors.to(dtype_of(model))
        draws = [generator_for(start + i, device) for i in range(len(part))]
        with autocast(device, "fp64" if batch.dtype == torch.float64 else "auto"):
            out = model(batch, ratio, generators=draws)
        total += float(out.loss) * len(part)
        if not rows:
            shown = model.reconstruct(
                batch.float(), out._replace(prediction=out.prediction.float())
            )
            rows = [to_pixels(x[:SHOWN]) for x in (batch, shown.visible, shown.pasted)]
    model.train(training)
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return total / len(images), picture


def dtype_of(model: MAE) -> torch.dtype:
    """That of its weights: float64 with training.precision="fp64", else float32."""
    return model.cls_token.dtype


def to_pixels(images: Tensor) -> Tensor:
    """Normalised (B, 3, H, W) -> uint8, on the CPU."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=images.device)[:, None, None]
    return (images.float() * std + mean).round().clamp(0, 255).to(torch.uint8).cpu()


def save_png(picture: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, format="PNG")
