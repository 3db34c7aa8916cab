"""Every named recipe: a function that returns a fresh Config and states its cost and its result.

`PRESETS` maps the names used on the command line to these functions. MIMDet's own stand here, the
baselines' in baseline_presets.py, those for a laptop in tiny_presets.py.
"""

from collections.abc import Callable

from mimdet.config import (
    BackboneConfig,
    Config,
    DataConfig,
    DetectorConfig,
    MAEConfig,
    PicturesConfig,
    PretrainConfig,
    TrainingConfig,
)


def benchmarking_vit_base() -> Config:
    """Benchmarking ViT-B (Li et al. 2021) as MIMDet's authors re-implemented it, 25 epochs.

    118,674,184 parameters; 592.7 G multiply-adds of backbone and neck at 1024x1024. Published by
    them: 48.0 box / 43.0 mask AP; 50.2 / 44.9 with 50 epochs and 50.4 / 44.9 with 100. Starts from
    a MAE encoder. The original's warm-up starts at a thousandth of the rate, ours at 0.
    """
    return Config(
        preset="benchmarking_vit_base",
        backbone=BackboneConfig(
            kind="benchmarking_vit", position_grid=64, sample_ratio=1.0, sample_ratio_eval=1.0
        ),
        detector=DetectorConfig(canvas=1024),
        data=_large_scale_jitter(),
        training=TrainingConfig(
            epochs=25, rate_multiplier=1.0, schedule="cosine", decay_biases=True
        ),
    )


def vitdet_base() -> Config:
    """ViTDet-B (Li et al. 2022): simple feature pyramid, LayerNorm in neck and heads, 100 epochs.

    110,895,024 parameters. Published by detectron2: 51.6 box / 45.9 mask AP from a MAE encoder.
    Ours has one rate for all blocks, where the paper's falls by 0.7 from block to block.
    """
    return Config(
        preset="vitdet_base",
        backbone=BackboneConfig(
            kind="vitdet",
            position_grid=64,
            window_size=14,
            sample_ratio=1.0,
            sample_ratio_eval=1.0,
        ),
        detector=DetectorConfig(neck="simple_pyramid", norm="LN", canvas=1024),
        data=_large_scale_jitter(),
        training=TrainingConfig(
            epochs=100,
            learning_rate=1e-4,
            rate_multiplier=1.0,
            milestones=(0.8889, 0.9630),
            decay_biases=True,
        ),
    )


def swin_base() -> Config:
    """Swin-B (Liu et al. 2021) with MIMDet's augmentation, 36 epochs of 16 images.

    109,046,696 parameters. Published for Mask R-CNN by MIMDet's authors: 49.2 box / 43.5 mask AP
    from ImageNet-1k weights.
    """
    return Config(
        preset="swin_base",
        backbone=BackboneConfig(
            kind="swin",
            embed_dim=128,
            num_heads=4,
            stage_depths=(2, 2, 18, 2),
            window_size=7,
            drop_path=0.3,
            sample_ratio=1.0,
            sample_ratio_eval=1.0,
        ),
        data=DataConfig(source="coco", workers=8),
        training=TrainingConfig(
            batch_size=4,
            accumulate=4,
            learning_rate=1e-4,
            reference_batch=16,
            rate_multiplier=1.0,
            weight_decay=0.05,
            decay_biases=True,
        ),
    )


def resnet50() -> Config:
    """ResNet-50 with FPN and MIMDet's heads, augmentation and optimiser, 36 epochs of 16 images.

    46,301,232 parameters.
    """
    return Config(
        preset="resnet50",
        backbone=BackboneConfig(
            kind="resnet",
            embed_dim=64,
            stage_depths=(3, 4, 6, 3),
            drop_path=0.0,
            sample_ratio=1.0,
            sample_ratio_eval=1.0,
        ),
        data=DataConfig(source="coco", workers=8),
        training=TrainingConfig(
            batch_size=4,
            accumulate=4,
            learning_rate=1e-4,
            reference_batch=16,
            rate_multiplier=1.0,
            weight_decay=0.05,
        ),
    )


def _large_scale_jitter() -> DataConfig:
    """COCO on a square of 1024 pixels, scaled by 0.1 to 2 in training."""
    return DataConfig(
        source="coco", augment="lsj", lsj_size=1024, test_short_side=1024, max_side=1024, workers=8
    )


def tiny() -> Config:
    """A MIMDet for a laptop CPU and ShapesCOCO at 128 pixels: all the parts, small numbers.

    2,023,192 parameters. `mimdet demo` trains it for minutes; README.md has its results.
    """
    return Config(
        preset="tiny",
        backbone=BackboneConfig(
            embed_dim=128,
            depth=4,
            num_heads=4,
            decoder_dim=96,
            decoder_depth=2,
            decoder_heads=3,
            drop_path=0.0,
            position_grid=16,
        ),
        detector=DetectorConfig(
            num_classes=12,
            channels=48,
            anchor_sizes=(12, 24, 48, 96, 192),
            rpn_convs=1,
            rpn_pre_nms=(300, 300),
            rpn_post_nms=(150, 150),
            rpn_anchors_per_image=128,
            rois_per_image=64,
            canonical_size=112.0,
            box_convs=1,
            box_fc_dim=256,
            mask_convs=2,
            detections_per_image=50,  # of at most 10 objects
        ),
        data=DataConfig(
            source="shapes",
            augment="multiscale",
            short_sides=(256,),
            test_short_side=256,
            workers=0,
        ),
        training=TrainingConfig(
            steps=800,
            batch_size=4,
            accumulate=1,
            learning_rate=1.6e-3,  # 2.4e-3: 4 box AP less after 700 steps
            reference_batch=4,
            rate_multiplier=1.5,  # at 1, with 3e-3, the encoder of one short run collapsed
            betas=(0.9, 0.99),
            weight_decay=0.05,
            schedule="cosine",
            warmup_steps=40,
            clip_norm=1.0,
            threads=1,
        ),
    )


def nuclei() -> Config:
    """The tiny MIMDet for microscopy on a CPU: one class, dozens of small objects an image.

    Images are enlarged (short side 448), turned and mirrored. Trains from scratch on DSB2018's 270
    images; point --train-json, --train-images, --val-json and --val-images at a COCO-format copy.
    """
    cfg = tiny()
    cfg.preset = "nuclei"
    cfg.detector.num_classes = 1
    cfg.detector.norm = "GN"  # two stainings: BatchNorm's running means fit neither
    cfg.detector.rpn_pre_nms = (600, 600)
    cfg.detector.rpn_post_nms = (300, 300)
    cfg.detector.rpn_anchors_per_image = 256
    cfg.detector.rois_per_image = 128
    cfg.detector.detections_per_image = 100
    cfg.data = DataConfig(
        source="coco",
        augment="multiscale",
        flips="dihedral",
        short_sides=(384, 448, 512),
        test_short_side=448,
        workers=1,
    )
    cfg.training.steps = 0
    cfg.training.epochs = 5
    cfg.training.batch_size = 2
    cfg.training.accumulate = 2
    cfg.training.learning_rate = 2e-3
    cfg.training.rate_multiplier = 1.0
    cfg.training.betas = (0.9, 0.999)
    cfg.training.warmup_steps = 50
    cfg.training.evaluate_every = 2
    return cfg


def tiny_patch_stem() -> Config:
    """`tiny` with a patchify stem: c2 and c3 are won back by transposed convolutions.

    2,048,616 parameters.
    """
    cfg = tiny()
    cfg.preset = "tiny_patch_stem"
    cfg.backbone.stem = "patch"
    return cfg


def tiny_no_decoder() -> Config:
    """`tiny` without decoder blocks: dropped places of c4 hold projected stem tokens.

    1,799,512 parameters.
    """
    cfg = tiny()
    cfg.preset = "tiny_no_decoder"
    cfg.backbone.decoder_depth = 0
    return cfg


def tiny_benchmarking_vit() -> Config:
    """Benchmarking ViT for a laptop: windows of 4 x 4 tokens, four global blocks of eight.

    1,921,278 parameters.
    """
    cfg = _baseline("tiny_benchmarking_vit", "benchmarking_vit")
    cfg.backbone.embed_dim = 96
    cfg.backbone.num_heads = 3
    cfg.backbone.depth = 8
    cfg.backbone.position_grid = 16
    cfg.backbone.window_size = 4
    cfg.detector.canvas = 256
    cfg.data.max_side = 256
    return cfg


def tiny_vitdet() -> Config:
    """ViTDet for a laptop: as many blocks as `tiny` and as wide, windowed and global in turn.

    1,808,008 parameters. Windows of 4 x 4 tokens, simple pyramid. Every level hangs on the last
    block, so from random weights it learns late.
    """
    cfg = _baseline("tiny_vitdet", "vitdet")
    cfg.backbone.embed_dim = 128
    cfg.backbone.num_heads = 4
    cfg.backbone.depth = 4
    cfg.backbone.global_blocks = 2
    cfg.backbone.position_grid = 16
    cfg.backbone.window_size = 4
    cfg.detector.neck = "simple_pyramid"
    cfg.training.learning_rate = 5e-4  # 1e-3: 4 box AP less after 1,200 steps
    return cfg


def tiny_swin() -> Config:
    """Swin for a laptop: widths 24 to 192, two blocks a stage, windows of 8 x 8 tokens.

    2,104,110 parameters.
    """
    cfg = _baseline("tiny_swin", "swin")
    cfg.backbone.embed_dim = 24
    cfg.backbone.num_heads = 1
    cfg.backbone.stage_depths = (2, 2, 2, 2)
    cfg.backbone.window_size = 8
    return cfg


def tiny_resnet() -> Config:
    """ResNet-18 with widths 20 to 160 instead of 64 to 512, for a laptop.

    1,921,360 parameters.
    """
    cfg = _baseline("tiny_resnet", "resnet")
    cfg.backbone.embed_dim = 20
    cfg.backbone.stage_depths = (2, 2, 2, 2)
    cfg.backbone.bottleneck = False
    return cfg


def _baseline(preset: str, kind: str) -> Config:
    """`tiny` with another kind of backbone, whose sizes are still to be set."""
    cfg = tiny()
    cfg.preset = preset
    cfg.backbone = BackboneConfig(kind=kind, sample_ratio=1.0, sample_ratio_eval=1.0, drop_path=0.0)
    return cfg


def mimdet_base() -> Config:
    """MIMDet ViT-B, version 2 of the paper: the published recipe for COCO.

    127,954,768 parameters; 1.13 T multiply-adds at 800x1280 and sample ratio 1.
    36 epochs, batch 64, sampling half of the tokens. Published: 51.7 box / 46.2 mask AP at
    sample_ratio_eval=1.0 (reproduced by others: 50.0-50.8). Needs COCO and a MAE checkpoint.
    """
    return Config(preset="mimdet_base", data=DataConfig(source="coco", workers=8))


def mimdet_large() -> Config:
    """MIMDet ViT-L, version 2: 349,332,080 parameters; 2.51 T multiply-adds at ratio 1.

    36 epochs, batch 64. Published: 54.3 box / 48.2 mask AP.
    """
    cfg = mimdet_base()
    cfg.preset = "mimdet_large"
    cfg.backbone = BackboneConfig(embed_dim=1024, depth=24, num_heads=16, drop_path=0.4)
    cfg.training.rate_multiplier = 3.5
    cfg.training.batch_size = 4
    cfg.training.accumulate = 16
    return cfg


def mimdet_v1_base() -> Config:
    """MIMDet ViT-B, version 1 of the paper: mask tokens at unsampled places.

    127,561,552 parameters (the released file holds 50x50 position tables). Published: 51.5 box /
    46.0 mask AP at ratio 0.5 and 49.9 / 44.7 at ratio 0.25, 36 epochs, batch 64.
    """
    cfg = mimdet_base()
    cfg.preset = "mimdet_v1_base"
    cfg.backbone.decoder_fill = "mask_token"
    return cfg


def mimdet_v1_large() -> Config:
    """MIMDet ViT-L, version 1 (14x14 position tables): 345,268,848 parameters.

    Published: 53.3 box / 47.5 mask AP, called under-tuned by its authors.
    """
    cfg = mimdet_large()
    cfg.preset = "mimdet_v1_large"
    cfg.backbone.decoder_fill = "mask_token"
    cfg.backbone.position_grid = 14
    cfg.training.rate_multiplier = 2.0
    return cfg


def mimdet_patch_stem() -> Config:
    """Ablation: the pre-trained 16x16 patchify stem instead of the ConvStem.

    125,941,552 parameters. c2 and c3 are won back from its tokens by transposed convolutions.
    """
    cfg = mimdet_base()
    cfg.preset = "mimdet_patch_stem"
    cfg.backbone.stem = "patch"
    return cfg


def mimdet_no_decoder() -> Config:
    """Ablation: no decoder blocks. 115,345,232 parameters.

    c4 holds projected encoder tokens at sampled places and projected stem tokens at the others,
    plus positions, normed: what the paper's code does with a depth of 0.
    """
    cfg = mimdet_base()
    cfg.preset = "mimdet_no_decoder"
    cfg.backbone.decoder_depth = 0
    return cfg


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


PRESETS: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        mimdet_base,
        mimdet_large,
        mimdet_v1_base,
        mimdet_v1_large,
        mimdet_patch_stem,
        mimdet_no_decoder,
        benchmarking_vit_base,
        vitdet_base,
        swin_base,
        resnet50,
        tiny,
        tiny_patch_stem,
        tiny_no_decoder,
        tiny_benchmarking_vit,
        tiny_vitdet,
        tiny_swin,
        tiny_resnet,
        nuclei,
    )
}
PRETRAIN_PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe for recipe in (mae_base, mae_small, tiny_mae)
}
