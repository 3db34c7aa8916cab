"""A configuration that trains in seconds with every part of the real one."""

from mimdet import presets
from mimdet.config import Config


def small(steps: int = 4) -> Config:
    """A training of a few seconds with every part of the real one."""
    cfg = presets.tiny()
    cfg.backbone.embed_dim = 32
    cfg.backbone.depth = 2
    cfg.backbone.drop_path = 0.2
    cfg.backbone.num_heads = 2
    cfg.backbone.decoder_dim = 32
    cfg.backbone.decoder_depth = 1
    cfg.backbone.decoder_heads = 2
    cfg.detector.channels = 16
    cfg.detector.box_fc_dim = 32
    cfg.data.shapes_size = 64
    cfg.data.short_sides = (64, 96)
    cfg.data.test_short_side = 64
    cfg.data.shapes_train = 10
    cfg.data.shapes_val = 3
    cfg.training.steps = steps
    cfg.training.batch_size = 2
    cfg.training.accumulate = 2
    cfg.training.warmup_steps = 2
    cfg.training.checkpoint_every_steps = 2
    cfg.training.evaluate_every_steps = 3
    cfg.training.keep_checkpoints = 9
    return cfg
