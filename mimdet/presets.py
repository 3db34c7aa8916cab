"""Every named recipe: a function that returns a fresh Config and states its cost and its result.

`PRESETS` maps the names used on the command line to these functions.
"""

from collections.abc import Callable

from mimdet.config import BackboneConfig, Config, DataConfig, DetectorConfig, TrainingConfig


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
            batch_size=2,
            accumulate=2,
            learning_rate=3e-3,
            reference_batch=4,
            rate_multiplier=1.0,
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
    cfg.training.learning_rate = 2e-3
    cfg.training.warmup_steps = 50
    cfg.training.evaluate_every = 2
    return cfg


PRESETS: dict[str, Callable[[], Config]] = {
    "mimdet_base": mimdet_base,
    "mimdet_large": mimdet_large,
    "mimdet_v1_base": mimdet_v1_base,
    "mimdet_v1_large": mimdet_v1_large,
    "tiny": tiny,
    "nuclei": nuclei,
}
