"""Every number of a masked autoencoder's pre-training, and its named recipes.

The counterpart of config.py and presets.py for `mimdet pretrain`; the loop's fields are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mimdet.config import TrainingConfig


@dataclass(slots=True)
class MAEConfig:
    """The autoencoder. MIMDet takes its encoder and the first blocks of its decoder."""

    image_size: int = 224
    """Side of the square training images, pixels."""
    patch_size: int = 16
    embed_dim: int = 768
    """Encoder width."""
    depth: int = 12
    num_heads: int = 12
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    sample_ratio: float = 0.25
    """Share of the patches the encoder sees (the MAE paper: 75 % are masked)."""
    norm_pix_loss: bool = True
    """Predict patches normalised by their own mean and deviation: better features. Without it,
    reconstructions have the right colours."""


@dataclass(slots=True)
class PicturesConfig:
    """Images without annotations, cropped at random to `image_size`."""

    source: Literal["folder", "hub", "shapes"] = "folder"
    """`folder`: all image files under a folder; `hub`: a Hugging Face table with an image column;
    `shapes`: ShapesCOCO scenes, drawn on the fly."""
    folder: str = ""
    """Folder of images, searched with its subfolders."""
    hub_name: str = ""
    """Data set id or local path for `datasets.load_dataset`."""
    hub_split: str = "train"
    hub_column: str = "image"
    shapes_level: str = "shapes-v1-medium"
    shapes_size: int = 128
    shapes_train: int = 100_000
    """Scenes in an epoch of ShapesCOCO."""
    held_out: int = 64
    """Images kept out of training (of a folder or table the last ones): their loss is the
    validation loss, the first of them are the reconstructions one looks at. 0 = neither."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    crop_aspect: float = 4 / 3
    """Largest ratio of the crop's sides."""
    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""


@dataclass(slots=True)
class PretrainConfig:
    """Everything that decides a pre-training's result."""

    preset: str = ""
    mae: MAEConfig = field(default_factory=MAEConfig)
    data: PicturesConfig = field(default_factory=PicturesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def mae_training() -> TrainingConfig:
    """MAE's recipe: AdamW, rate 1.5e-4 for 256 images a step and linear in them, cosine, 40 of 800
    epochs of warm-up, one rate for all parameters."""
    return TrainingConfig(
        epochs=800,
        batch_size=64,
        accumulate=64,
        learning_rate=1.5e-4,
        reference_batch=256,
        learning_rate_exponent=1.0,
        rate_multiplier=1.0,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        schedule="cosine",
        warmup_epochs=40,
        evaluate_every=10,
    )


def mae_base() -> PretrainConfig:
    """MAE ViT-B, the autoencoder of mimdet_base: 111,907,840 parameters.

    800 epochs of ImageNet-1k at batch 4096 in the paper (1,600 for the released weights); nobody
    without a cluster needs to, the released files are public (`mimdet download`).
    """
    return PretrainConfig(preset="mae_base", training=mae_training())


def mae_small() -> PretrainConfig:
    """A ViT-S-like autoencoder for one GPU: width 384, 12 blocks, decoder 256 x 4."""
    cfg = mae_base()
    cfg.preset = "mae_small"
    cfg.mae = MAEConfig(
        embed_dim=384, num_heads=6, decoder_dim=256, decoder_depth=4, decoder_heads=8
    )
    cfg.training.batch_size = 256
    cfg.training.accumulate = 4
    return cfg


def tiny_mae() -> PretrainConfig:
    """The autoencoder of the `tiny` detector, on ShapesCOCO, for a laptop CPU.

    Scenes of 128 pixels are enlarged to 256, as the detector does. No normalised patches, so that
    its reconstructions can be looked at.
    """
    training = mae_training()
    training.epochs = 1.0
    training.batch_size = 32
    training.accumulate = 2
    training.learning_rate = 6e-3
    training.warmup_epochs = 0.05
    training.evaluate_every = 0.1
    training.clip_norm = 1.0
    training.threads = 1
    return PretrainConfig(
        preset="tiny_mae",
        mae=MAEConfig(
            image_size=256,
            embed_dim=128,
            depth=4,
            num_heads=4,
            decoder_dim=96,
            decoder_depth=4,
            decoder_heads=3,
            norm_pix_loss=False,
        ),
        data=PicturesConfig(source="shapes", crop_scale=(0.5, 1.0), workers=0),
        training=training,
    )


PRETRAIN_PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    "mae_base": mae_base,
    "mae_small": mae_small,
    "tiny_mae": tiny_mae,
}
