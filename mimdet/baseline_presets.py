"""Published recipes of the baselines, on MIMDet's heads, data and training loop."""

from mimdet.config import BackboneConfig, Config, DataConfig, DetectorConfig, TrainingConfig


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
