"""Recipes for a laptop CPU: MIMDet, its variants and every baseline at about the same cost.

The ones called tiny_* differ from `tiny` in the backbone only (ViTDet in the neck and the learning
rate too): same heads, data and training, so that a comparison compares backbones.
"""

from mimdet.config import BackboneConfig, Config, DataConfig, DetectorConfig, TrainingConfig


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
