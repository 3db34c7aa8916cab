"""Every named recipe, with its cost and result: `tiny()` returns a fresh configuration.

A recipe is written as what it changes in another one.

`PRESETS` and `PRETRAIN_PRESETS` map the names used on the command line to these functions.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from mimdet.config import (
    BackboneConfig,
    Config,
    DataConfig,
    MAEConfig,
    PicturesConfig,
    PretrainConfig,
    change,
)

AnyConfig = TypeVar("AnyConfig", Config, PretrainConfig)
PRESETS: dict[str, Callable[[], Config]] = {}
PRETRAIN_PRESETS: dict[str, Callable[[], PretrainConfig]] = {}
STARTS_FROM_MAE = ("mimdet_", "benchmarking_vit_", "vitdet_")
"""Beginnings of the names of recipes that mean `training.init_from` to be given."""
STEPS_FOR = {
    "epochs": "steps",
    "warmup_epochs": "warmup_steps",
    "evaluate_every": "evaluate_every_steps",
}
"""Fields of a training in epochs -> the ones in steps, which decide where they are not 0."""


def recipe(
    presets: dict[str, Callable[[], AnyConfig]], base: Callable[[], AnyConfig]
) -> Callable[[Callable[[AnyConfig], None]], Callable[[], AnyConfig]]:
    """Make a function that changes a fresh `base()` a recipe: it is called without arguments, and
    listed under its name, which becomes its configuration's `preset`."""

    def decorate(alter: Callable[[AnyConfig], None]) -> Callable[[], AnyConfig]:
        def make() -> AnyConfig:
            cfg = base()
            alter(cfg)
            cfg.preset = alter.__name__
            return cfg

        make.__name__ = make.__qualname__ = alter.__name__
        make.__doc__ = alter.__doc__
        presets[alter.__name__] = make
        return make

    return decorate


# ------------------------------------------------------------------------------- MIMDet


@recipe(PRESETS, Config)
def mimdet_base(cfg: Config) -> None:
    """MIMDet ViT-B, version 2 of the paper: the published recipe for COCO.

    127,954,768 parameters; 1.13 T multiply-adds at 800x1280 and sample ratio 1.
    36 epochs, batch 64, sampling half of the tokens. Published: 51.7 box / 46.2 mask AP at
    sample_ratio_eval=1.0 (reproduced by others: 50.0-50.8). Needs COCO and a MAE checkpoint.
    """
    change(cfg.data, source="coco", workers=8)


@recipe(PRESETS, mimdet_base)
def mimdet_large(cfg: Config) -> None:
    """MIMDet ViT-L, version 2: 349,332,080 parameters; 2.51 T multiply-adds at ratio 1.

    36 epochs, batch 64. Published: 54.3 box / 48.2 mask AP.
    """
    change(cfg.backbone, embed_dim=1024, depth=24, num_heads=16, drop_path=0.4)
    change(cfg.training, rate_multiplier=3.5, batch_size=4, accumulate=16)


@recipe(PRESETS, mimdet_base)
def mimdet_v1_base(cfg: Config) -> None:
    """MIMDet ViT-B, version 1 of the paper: mask tokens at unsampled places.

    127,561,552 parameters (the released file holds 50x50 position tables). Published: 51.5 box /
    46.0 mask AP at ratio 0.5 and 49.9 / 44.7 at ratio 0.25, 36 epochs, batch 64.
    """
    cfg.backbone.decoder_fill = "mask_token"


@recipe(PRESETS, mimdet_large)
def mimdet_v1_large(cfg: Config) -> None:
    """MIMDet ViT-L, version 1 (14x14 position tables): 345,268,848 parameters.

    Published: 53.3 box / 47.5 mask AP, called under-tuned by its authors.
    """
    change(cfg.backbone, decoder_fill="mask_token", position_grid=14)
    cfg.training.rate_multiplier = 2.0


@recipe(PRESETS, mimdet_base)
def mimdet_patch_stem(cfg: Config) -> None:
    """Ablation: the pre-trained 16x16 patchify stem instead of the ConvStem.

    125,941,552 parameters. c2 and c3 are won back from its tokens by transposed convolutions.
    """
    cfg.backbone.stem = "patch"


@recipe(PRESETS, mimdet_base)
def mimdet_no_decoder(cfg: Config) -> None:
    """Ablation: no decoder blocks. 115,345,232 parameters.

    c4 holds projected encoder tokens at sampled places and projected stem tokens at the others,
    plus positions, normed: what the paper's code does with a depth of 0.
    """
    cfg.backbone.decoder_depth = 0


# ------------------------------------------------------------------------------- baselines


@recipe(PRESETS, mimdet_base)
def benchmarking_vit_base(cfg: Config) -> None:
    """Benchmarking ViT-B (Li et al. 2021) as MIMDet's authors re-implemented it, 25 epochs.

    118,674,184 parameters; 592.7 G multiply-adds of backbone and neck at 1024x1024. Published by
    them: 48.0 box / 43.0 mask AP; 50.2 / 44.9 with 50 epochs and 50.4 / 44.9 with 100. Starts from
    a MAE encoder. The original's warm-up starts at a thousandth of the rate, ours at 0.
    """
    cfg.backbone = _baseline("benchmarking_vit", position_grid=64)
    cfg.detector.canvas = 1024
    # A square of 1024 pixels, scaled by 0.1 to 2 in training.
    change(cfg.data, augment="lsj", lsj_size=1024, test_short_side=1024, max_side=1024)
    change(cfg.training, epochs=25, rate_multiplier=1.0, schedule="cosine", decay_biases=True)


@recipe(PRESETS, benchmarking_vit_base)
def vitdet_base(cfg: Config) -> None:
    """ViTDet-B (Li et al. 2022): simple feature pyramid, LayerNorm in neck and heads, 100 epochs.

    110,895,024 parameters. Published by detectron2: 51.6 box / 45.9 mask AP from a MAE encoder.
    Ours has one rate for all blocks, where the paper's falls by 0.7 from block to block.
    """
    cfg.backbone = _baseline("vitdet", position_grid=64, window_size=14)
    change(cfg.detector, neck="simple_pyramid", norm="LN")
    change(cfg.training, epochs=100, schedule="multistep", milestones=(0.8889, 0.9630))
    cfg.training.learning_rate = 1e-4


@recipe(PRESETS, mimdet_base)
def swin_base(cfg: Config) -> None:
    """Swin-B (Liu et al. 2021) with MIMDet's augmentation, 36 epochs of 16 images.

    109,046,696 parameters. Published for Mask R-CNN by MIMDet's authors: 49.2 box / 43.5 mask AP
    from ImageNet-1k weights.
    """
    cfg.backbone = _baseline("swin", embed_dim=128, num_heads=4, window_size=7, drop_path=0.3)
    change(cfg.training, batch_size=4, accumulate=4, reference_batch=16, learning_rate=1e-4)
    change(cfg.training, rate_multiplier=1.0, weight_decay=0.05, decay_biases=True)


@recipe(PRESETS, swin_base)
def resnet50(cfg: Config) -> None:
    """ResNet-50 with FPN and MIMDet's heads, augmentation and optimiser, 36 epochs of 16 images.

    46,301,232 parameters.
    """
    cfg.backbone = _baseline("resnet", embed_dim=64, stage_depths=(3, 4, 6, 3), drop_path=0.0)
    cfg.training.decay_biases = False


def _baseline(kind: str, **fields: Any) -> BackboneConfig:
    """A baseline's backbone, which sees every token."""
    return BackboneConfig(kind=kind, sample_ratio=1.0, sample_ratio_eval=1.0, **fields)


# ------------------------------------------------------------------------------- for a laptop


@recipe(PRESETS, Config)
def tiny(cfg: Config) -> None:
    """A MIMDet for a laptop CPU and ShapesCOCO at 128 pixels: all the parts, small numbers.

    1,899,064 parameters. `mimdet demo` trains it for minutes; README.md has its results. Unsampled
    places hold mask tokens, as in version 1 of the paper: with the stem's tokens there, a detector
    that starts at random learns to do without its encoder (notebooks/ablations/fills.py).
    """
    change(cfg.data, source="shapes", augment="multiscale", workers=0)
    change(cfg.data, short_sides=(256,), test_short_side=256)
    change(cfg.backbone, embed_dim=128, depth=4, num_heads=4, drop_path=0.0, position_grid=16)
    change(cfg.backbone, decoder_dim=96, decoder_depth=1, decoder_heads=3)
    cfg.backbone.decoder_fill = "mask_token"
    change(cfg.detector, num_classes=12, channels=48, anchor_sizes=(12, 24, 48, 96, 192))
    change(cfg.detector, rpn_convs=1, rpn_pre_nms=(300, 300), rpn_post_nms=(150, 150))
    change(cfg.detector, rpn_anchors_per_image=128, rois_per_image=64, canonical_size=112.0)
    change(cfg.detector, box_convs=1, box_fc_dim=256, mask_convs=2)
    cfg.detector.detections_per_image = 50  # of at most 10 objects
    change(cfg.training, steps=800, warmup_steps=40, schedule="cosine")
    change(cfg.training, batch_size=4, accumulate=1, reference_batch=4, threads=1)
    # After 500 steps 1.6e-3 and 8e-3 have 2 to 3 box AP less than 4e-3 (muon_tried.json).
    change(cfg.training, optimizer="muon", learning_rate=4e-3, rate_multiplier=1.5)
    change(cfg.training, betas=(0.9, 0.99), weight_decay=0.05, clip_norm=1.0)


@recipe(PRESETS, tiny)
def tiny_patch_stem(cfg: Config) -> None:
    """`tiny` with a patchify stem: c2 and c3 are won back by transposed convolutions.

    1,924,488 parameters.
    """
    cfg.backbone.stem = "patch"


@recipe(PRESETS, tiny)
def tiny_no_decoder(cfg: Config) -> None:
    """`tiny` without decoder blocks: dropped places of c4 hold the mask token and their position.

    1,787,224 parameters.
    """
    cfg.backbone.decoder_depth = 0


@recipe(PRESETS, tiny)
def tiny_benchmarking_vit(cfg: Config) -> None:
    """Benchmarking ViT for a laptop: windows of 4 x 4 tokens, four global blocks of eight.

    1,921,278 parameters.
    """
    cfg.backbone = _baseline("benchmarking_vit", embed_dim=96, num_heads=3, depth=8)
    change(cfg.backbone, position_grid=16, window_size=4, drop_path=0.0)
    cfg.detector.canvas = cfg.data.max_side = 256
    # After 500 steps 4e-3 has 0.8 box AP less and 1.1 mask AP more (baseline_rates.json).
    cfg.training.learning_rate = 1.6e-3


@recipe(PRESETS, tiny)
def tiny_vitdet(cfg: Config) -> None:
    """ViTDet for a laptop: as many blocks as `tiny` and as wide, windowed and global in turn.

    1,808,008 parameters. Windows of 4 x 4 tokens, simple pyramid. Every level hangs on the last
    block, so from random weights it learns late.
    """
    cfg.backbone = _baseline("vitdet", embed_dim=128, num_heads=4, depth=4, global_blocks=2)
    change(cfg.backbone, position_grid=16, window_size=4, drop_path=0.0)
    cfg.detector.neck = "simple_pyramid"
    cfg.training.learning_rate = 3e-3  # 5e-4: 10 box AP less after 500 steps


@recipe(PRESETS, tiny)
def tiny_swin(cfg: Config) -> None:
    """Swin for a laptop: widths 24 to 192, two blocks a stage, windows of 8 x 8 tokens.

    2,104,110 parameters.
    """
    cfg.backbone = _baseline("swin", embed_dim=24, num_heads=1, window_size=8, drop_path=0.0)
    cfg.backbone.stage_depths = (2, 2, 2, 2)


@recipe(PRESETS, tiny)
def tiny_resnet(cfg: Config) -> None:
    """ResNet-18 with widths 20 to 160 instead of 64 to 512, for a laptop.

    1,921,360 parameters.
    """
    cfg.backbone = _baseline("resnet", embed_dim=20, bottleneck=False, drop_path=0.0)
    cfg.backbone.stage_depths = (2, 2, 2, 2)


@recipe(PRESETS, tiny)
def nuclei(cfg: Config) -> None:
    """The tiny MIMDet for microscopy on a CPU: one class, dozens of small objects an image.

    1,884,390 parameters. Begins as `tiny` and trains on the microscope picture that comes with the
    package or, with --source coco and --train-json, --train-images, --val-json, --val-images, on
    DSB2018 or your own. Images are enlarged (short side 448), turned and mirrored.
    """
    cfg.detector.num_classes = 1
    cfg.detector.norm = "GN"  # two stainings: BatchNorm's running means fit neither
    change(cfg.detector, rpn_pre_nms=(600, 600), rpn_post_nms=(300, 300))
    change(cfg.detector, rpn_anchors_per_image=256, rois_per_image=128, detections_per_image=100)
    cfg.data = DataConfig(source="nuclei", augment="multiscale", flips="dihedral", workers=1)
    change(cfg.data, short_sides=(384, 448, 512), test_short_side=448)
    change(cfg.training, steps=300, warmup_steps=50, evaluate_every_steps=100)
    change(cfg.training, batch_size=2, accumulate=2, init_from="tiny")


# ------------------------------------------------------------------------------- autoencoders


@recipe(PRETRAIN_PRESETS, PretrainConfig)
def mae_base(cfg: PretrainConfig) -> None:
    """MAE ViT-B, the autoencoder of mimdet_base: 111,907,840 parameters.

    800 epochs of ImageNet-1k at batch 4096 in the paper (1,600 for the released weights); nobody
    without a cluster needs to, the released files are public (`mimdet download`). AdamW, rate
    1.5e-4 for 256 images a step and linear in them, cosine, one rate for all parameters.
    """
    change(cfg.training, epochs=800, warmup_epochs=40, evaluate_every=10, schedule="cosine")
    change(cfg.training, batch_size=64, accumulate=64, reference_batch=256)
    change(cfg.training, learning_rate=1.5e-4, learning_rate_exponent=1.0, rate_multiplier=1.0)
    change(cfg.training, weight_decay=0.05, betas=(0.9, 0.95))


@recipe(PRETRAIN_PRESETS, mae_base)
def mae_small(cfg: PretrainConfig) -> None:
    """A ViT-S-like autoencoder for one GPU: width 384, 12 blocks, decoder 256 x 4."""
    change(cfg.mae, embed_dim=384, num_heads=6, decoder_dim=256, decoder_depth=4, decoder_heads=8)
    change(cfg.training, batch_size=256, accumulate=4)


@recipe(PRETRAIN_PRESETS, mae_base)
def tiny_mae(cfg: PretrainConfig) -> None:
    """The autoencoder of the `tiny` detector, on ShapesCOCO, for a laptop CPU.

    Scenes of 128 pixels are enlarged to 256, as the detector does. No normalised patches, so that
    its reconstructions can be looked at.
    """
    cfg.mae = MAEConfig(image_size=256, embed_dim=128, depth=4, num_heads=4, norm_pix_loss=False)
    change(cfg.mae, decoder_dim=96, decoder_depth=4, decoder_heads=3)
    cfg.data = PicturesConfig(source="shapes", crop_scale=(0.5, 1.0), workers=0)
    change(cfg.training, epochs=1.0, warmup_epochs=0.05, evaluate_every=0.1)
    change(cfg.training, batch_size=32, accumulate=2, threads=1)
    change(cfg.training, learning_rate=6e-3, clip_norm=1.0)
