"""Every named recipe: a function that returns a fresh configuration and states cost and result.

`PRESETS` and `PRETRAIN_PRESETS` map the names used on the command line to these functions.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from mimdet.config import (
    BackboneConfig,
    Config,
    DataConfig,
    DetectorConfig,
    MAEConfig,
    PicturesConfig,
    PretrainConfig,
    TrainingConfig,
    change,
)

AnyConfig = TypeVar("AnyConfig", Config, PretrainConfig)
PRESETS: dict[str, Callable[[], Config]] = {}
PRETRAIN_PRESETS: dict[str, Callable[[], PretrainConfig]] = {}
STARTS_FROM_MAE = (
    "mimdet_base",
    "mimdet_large",
    "mimdet_v1_base",
    "mimdet_v1_large",
    "mimdet_patch_stem",
    "mimdet_no_decoder",
    "benchmarking_vit_base",
    "vitdet_base",
)
"""Recipes that mean `training.init_from` to be given."""


def listed(
    presets: dict[str, Callable[[], AnyConfig]],
) -> Callable[[Callable[[], AnyConfig]], Callable[[], AnyConfig]]:
    """List a recipe under its function's name, which becomes its configuration's `preset`."""

    def decorate(make: Callable[[], AnyConfig]) -> Callable[[], AnyConfig]:
        @functools.wraps(make)
        def recipe() -> AnyConfig:
            cfg = make()
            cfg.preset = make.__name__
            return cfg

        presets[make.__name__] = recipe
        return recipe

    return decorate


# ------------------------------------------------------------------------------- MIMDet


@listed(PRESETS)
def mimdet_base() -> Config:
    """MIMDet ViT-B, version 2 of the paper: the published recipe for COCO.

    127,954,768 parameters; 1.13 T multiply-adds at 800x1280 and sample ratio 1.
    36 epochs, batch 64, sampling half of the tokens. Published: 51.7 box / 46.2 mask AP at
    sample_ratio_eval=1.0 (reproduced by others: 50.0-50.8). Needs COCO and a MAE checkpoint.
    """
    return Config(data=DataConfig(source="coco", workers=8))


@listed(PRESETS)
def mimdet_large() -> Config:
    """MIMDet ViT-L, version 2: 349,332,080 parameters; 2.51 T multiply-adds at ratio 1.

    36 epochs, batch 64. Published: 54.3 box / 48.2 mask AP.
    """
    cfg = mimdet_base()
    change(cfg.backbone, embed_dim=1024, depth=24, num_heads=16, drop_path=0.4)
    change(cfg.training, rate_multiplier=3.5, batch_size=4, accumulate=16)
    return cfg


@listed(PRESETS)
def mimdet_v1_base() -> Config:
    """MIMDet ViT-B, version 1 of the paper: mask tokens at unsampled places.

    127,561,552 parameters (the released file holds 50x50 position tables). Published: 51.5 box /
    46.0 mask AP at ratio 0.5 and 49.9 / 44.7 at ratio 0.25, 36 epochs, batch 64.
    """
    cfg = mimdet_base()
    cfg.backbone.decoder_fill = "mask_token"
    return cfg


@listed(PRESETS)
def mimdet_v1_large() -> Config:
    """MIMDet ViT-L, version 1 (14x14 position tables): 345,268,848 parameters.

    Published: 53.3 box / 47.5 mask AP, called under-tuned by its authors.
    """
    cfg = mimdet_large()
    change(cfg.backbone, decoder_fill="mask_token", position_grid=14)
    cfg.training.rate_multiplier = 2.0
    return cfg


@listed(PRESETS)
def mimdet_patch_stem() -> Config:
    """Ablation: the pre-trained 16x16 patchify stem instead of the ConvStem.

    125,941,552 parameters. c2 and c3 are won back from its tokens by transposed convolutions.
    """
    cfg = mimdet_base()
    cfg.backbone.stem = "patch"
    return cfg


@listed(PRESETS)
def mimdet_no_decoder() -> Config:
    """Ablation: no decoder blocks. 115,345,232 parameters.

    c4 holds projected encoder tokens at sampled places and projected stem tokens at the others,
    plus positions, normed: what the paper's code does with a depth of 0.
    """
    cfg = mimdet_base()
    cfg.backbone.decoder_depth = 0
    return cfg


# ------------------------------------------------------------------------------- baselines


@listed(PRESETS)
def benchmarking_vit_base() -> Config:
    """Benchmarking ViT-B (Li et al. 2021) as MIMDet's authors re-implemented it, 25 epochs.

    118,674,184 parameters; 592.7 G multiply-adds of backbone and neck at 1024x1024. Published by
    them: 48.0 box / 43.0 mask AP; 50.2 / 44.9 with 50 epochs and 50.4 / 44.9 with 100. Starts from
    a MAE encoder. The original's warm-up starts at a thousandth of the rate, ours at 0.
    """
    cfg = Config(data=_large_scale_jitter(), detector=DetectorConfig(canvas=1024))
    cfg.backbone = _baseline("benchmarking_vit", position_grid=64)
    change(cfg.training, epochs=25, rate_multiplier=1.0, schedule="cosine", decay_biases=True)
    return cfg


@listed(PRESETS)
def vitdet_base() -> Config:
    """ViTDet-B (Li et al. 2022): simple feature pyramid, LayerNorm in neck and heads, 100 epochs.

    110,895,024 parameters. Published by detectron2: 51.6 box / 45.9 mask AP from a MAE encoder.
    Ours has one rate for all blocks, where the paper's falls by 0.7 from block to block.
    """
    cfg = Config(data=_large_scale_jitter())
    cfg.backbone = _baseline("vitdet", position_grid=64, window_size=14)
    cfg.detector = DetectorConfig(neck="simple_pyramid", norm="LN", canvas=1024)
    change(cfg.training, epochs=100, milestones=(0.8889, 0.9630))
    change(cfg.training, learning_rate=1e-4, rate_multiplier=1.0, decay_biases=True)
    return cfg


@listed(PRESETS)
def swin_base() -> Config:
    """Swin-B (Liu et al. 2021) with MIMDet's augmentation, 36 epochs of 16 images.

    109,046,696 parameters. Published for Mask R-CNN by MIMDet's authors: 49.2 box / 43.5 mask AP
    from ImageNet-1k weights.
    """
    cfg = Config(data=DataConfig(source="coco", workers=8), training=_sixteen_images())
    cfg.backbone = _baseline("swin", embed_dim=128, num_heads=4, window_size=7, drop_path=0.3)
    cfg.training.decay_biases = True
    return cfg


@listed(PRESETS)
def resnet50() -> Config:
    """ResNet-50 with FPN and MIMDet's heads, augmentation and optimiser, 36 epochs of 16 images.

    46,301,232 parameters.
    """
    cfg = Config(data=DataConfig(source="coco", workers=8), training=_sixteen_images())
    cfg.backbone = _baseline("resnet", embed_dim=64, stage_depths=(3, 4, 6, 3), drop_path=0.0)
    return cfg


def _baseline(kind: str, **fields: Any) -> BackboneConfig:
    """A baseline's backbone, which sees every token."""
    return BackboneConfig(kind=kind, sample_ratio=1.0, sample_ratio_eval=1.0, **fields)


def _large_scale_jitter() -> DataConfig:
    """COCO on a square of 1024 pixels, scaled by 0.1 to 2 in training."""
    return DataConfig(
        source="coco", augment="lsj", lsj_size=1024, test_short_side=1024, max_side=1024, workers=8
    )


def _sixteen_images() -> TrainingConfig:
    return TrainingConfig(
        batch_size=4,
        accumulate=4,
        learning_rate=1e-4,
        reference_batch=16,
        rate_multiplier=1.0,
        weight_decay=0.05,
    )


# ------------------------------------------------------------------------------- for a laptop


@listed(PRESETS)
def tiny() -> Config:
    """A MIMDet for a laptop CPU and ShapesCOCO at 128 pixels: all the parts, small numbers.

    2,023,192 parameters. `mimdet demo` trains it for minutes; README.md has its results.
    """
    cfg = Config(data=DataConfig(source="shapes", augment="multiscale", workers=0))
    change(cfg.backbone, embed_dim=128, depth=4, num_heads=4, drop_path=0.0, position_grid=16)
    change(cfg.backbone, decoder_dim=96, decoder_depth=2, decoder_heads=3)
    change(cfg.detector, num_classes=12, channels=48, anchor_sizes=(12, 24, 48, 96, 192))
    change(cfg.detector, rpn_convs=1, rpn_pre_nms=(300, 300), rpn_post_nms=(150, 150))
    change(cfg.detector, rpn_anchors_per_image=128, rois_per_image=64, canonical_size=112.0)
    change(cfg.detector, box_convs=1, box_fc_dim=256, mask_convs=2)
    cfg.detector.detections_per_image = 50  # of at most 10 objects
    change(cfg.data, short_sides=(256,), test_short_side=256)
    change(cfg.training, steps=800, warmup_steps=40, schedule="cosine")
    change(cfg.training, batch_size=4, accumulate=1, reference_batch=4, threads=1)
    cfg.training.learning_rate = 1.6e-3  # 2.4e-3: 4 box AP less after 700 steps
    cfg.training.rate_multiplier = 1.5  # at 1, with 3e-3, the encoder of one short run collapsed
    change(cfg.training, betas=(0.9, 0.99), weight_decay=0.05, clip_norm=1.0)
    return cfg


@listed(PRESETS)
def tiny_patch_stem() -> Config:
    """`tiny` with a patchify stem: c2 and c3 are won back by transposed convolutions.

    2,048,616 parameters.
    """
    cfg = tiny()
    cfg.backbone.stem = "patch"
    return cfg


@listed(PRESETS)
def tiny_no_decoder() -> Config:
    """`tiny` without decoder blocks: dropped places of c4 hold projected stem tokens.

    1,799,512 parameters.
    """
    cfg = tiny()
    cfg.backbone.decoder_depth = 0
    return cfg


@listed(PRESETS)
def tiny_benchmarking_vit() -> Config:
    """Benchmarking ViT for a laptop: windows of 4 x 4 tokens, four global blocks of eight.

    1,921,278 parameters.
    """
    cfg = _tiny_baseline("benchmarking_vit", embed_dim=96, num_heads=3, depth=8)
    change(cfg.backbone, position_grid=16, window_size=4)
    cfg.detector.canvas = 256
    cfg.data.max_side = 256
    return cfg


@listed(PRESETS)
def tiny_vitdet() -> Config:
    """ViTDet for a laptop: as many blocks as `tiny` and as wide, windowed and global in turn.

    1,808,008 parameters. Windows of 4 x 4 tokens, simple pyramid. Every level hangs on the last
    block, so from random weights it learns late.
    """
    cfg = _tiny_baseline("vitdet", embed_dim=128, num_heads=4, depth=4, global_blocks=2)
    change(cfg.backbone, position_grid=16, window_size=4)
    cfg.detector.neck = "simple_pyramid"
    cfg.training.learning_rate = 5e-4  # 1e-3: 4 box AP less after 1,200 steps
    return cfg


@listed(PRESETS)
def tiny_swin() -> Config:
    """Swin for a laptop: widths 24 to 192, two blocks a stage, windows of 8 x 8 tokens.

    2,104,110 parameters.
    """
    stages = (2, 2, 2, 2)
    return _tiny_baseline("swin", embed_dim=24, num_heads=1, stage_depths=stages, window_size=8)


@listed(PRESETS)
def tiny_resnet() -> Config:
    """ResNet-18 with widths 20 to 160 instead of 64 to 512, for a laptop.

    1,921,360 parameters.
    """
    return _tiny_baseline("resnet", embed_dim=20, stage_depths=(2, 2, 2, 2), bottleneck=False)


def _tiny_baseline(kind: str, **fields: Any) -> Config:
    """`tiny` with another kind of backbone."""
    cfg = tiny()
    cfg.backbone = _baseline(kind, drop_path=0.0, **fields)
    return cfg


@listed(PRESETS)
def nuclei() -> Config:
    """The tiny MIMDet for microscopy on a CPU: one class, dozens of small objects an image.

    Images are enlarged (short side 448), turned and mirrored. Trains from scratch on DSB2018's 270
    images; point --train-json, --train-images, --val-json and --val-images at a COCO-format copy.
    """
    cfg = tiny()
    cfg.detector.num_classes = 1
    cfg.detector.norm = "GN"  # two stainings: BatchNorm's running means fit neither
    change(cfg.detector, rpn_pre_nms=(600, 600), rpn_post_nms=(300, 300))
    change(cfg.detector, rpn_anchors_per_image=256, rois_per_image=128, detections_per_image=100)
    cfg.data = DataConfig(source="coco", augment="multiscale", flips="dihedral", workers=1)
    change(cfg.data, short_sides=(384, 448, 512), test_short_side=448)
    change(cfg.training, steps=0, epochs=5, warmup_steps=50, evaluate_every=2)
    change(cfg.training, batch_size=2, accumulate=2)
    change(cfg.training, learning_rate=2e-3, rate_multiplier=1.0, betas=(0.9, 0.999))
    return cfg


# ------------------------------------------------------------------------------- autoencoders


@listed(PRETRAIN_PRESETS)
def mae_base() -> PretrainConfig:
    """MAE ViT-B, the autoencoder of mimdet_base: 111,907,840 parameters.

    800 epochs of ImageNet-1k at batch 4096 in the paper (1,600 for the released weights); nobody
    without a cluster needs to, the released files are public (`mimdet download`). AdamW, rate
    1.5e-4 for 256 images a step and linear in them, cosine, one rate for all parameters.
    """
    cfg = PretrainConfig()
    change(cfg.training, epochs=800, warmup_epochs=40, evaluate_every=10, schedule="cosine")
    change(cfg.training, batch_size=64, accumulate=64, reference_batch=256)
    change(cfg.training, learning_rate=1.5e-4, learning_rate_exponent=1.0, rate_multiplier=1.0)
    change(cfg.training, weight_decay=0.05, betas=(0.9, 0.95))
    return cfg


@listed(PRETRAIN_PRESETS)
def mae_small() -> PretrainConfig:
    """A ViT-S-like autoencoder for one GPU: width 384, 12 blocks, decoder 256 x 4."""
    cfg = mae_base()
    change(cfg.mae, embed_dim=384, num_heads=6, decoder_dim=256, decoder_depth=4, decoder_heads=8)
    change(cfg.training, batch_size=256, accumulate=4)
    return cfg


@listed(PRETRAIN_PRESETS)
def tiny_mae() -> PretrainConfig:
    """The autoencoder of the `tiny` detector, on ShapesCOCO, for a laptop CPU.

    Scenes of 128 pixels are enlarged to 256, as the detector does. No normalised patches, so that
    its reconstructions can be looked at.
    """
    cfg = mae_base()
    cfg.mae = MAEConfig(image_size=256, embed_dim=128, depth=4, num_heads=4, norm_pix_loss=False)
    change(cfg.mae, decoder_dim=96, decoder_depth=4, decoder_heads=3)
    cfg.data = PicturesConfig(source="shapes", crop_scale=(0.5, 1.0), workers=0)
    change(cfg.training, epochs=1.0, warmup_epochs=0.05, evaluate_every=0.1)
    change(cfg.training, batch_size=32, accumulate=2, threads=1)
    change(cfg.training, learning_rate=6e-3, clip_norm=1.0)
    return cfg
