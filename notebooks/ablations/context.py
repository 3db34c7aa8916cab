"""What is the transformer worth where classes are told apart by something far away?

    mimdet ablate notebooks/ablations/context.py [--dry-run]

`shapes-v2-context`, MIMDet against itself with c4 and c5 silenced in training and evaluation: what
is left is the stem, the FPN and the heads, which see an object and little around it. And MIMDet
with one more loss, in which c4 alone must tell the classes (`detector.c4_loss`), by which the
backbone is trained before all else (`training.c4_first`): this arm was added when the first had
left the lamp's colour a guess, and its numbers were chosen on seed 0. Three trainings a seed, of
about 20 CPU minutes each.
"""

from mimdet import presets


def without_transformer(cfg):
    """MIMDet of which only the stem is heard."""
    from mimdet.models.backbones import build_mimdet

    def silent(module, inputs, features):
        return features | {"c4": features["c4"] * 0, "c5": features["c5"] * 0}

    backbone = build_mimdet(cfg)
    backbone.register_forward_hook(silent)
    return backbone


base = presets.tiny()
base.data.shapes_level, base.data.shapes_size = "shapes-v2-context", 256
base.detector.num_classes = 16
base.training.optimizer, base.training.learning_rate = "adamw", 1.6e-3  # `tiny` then
base.training.steps = 2400  # 4 images a step
base.training.evaluate_every_steps = 1200

grid = [
    {"backbone.kind": "mimdet", "detector.c4_loss": 0.0, "training.c4_first": 0},
    {"backbone.kind": without_transformer, "detector.c4_loss": 0.0, "training.c4_first": 0},
    {"backbone.kind": "mimdet", "detector.c4_loss": 2.0, "training.c4_first": 250},
]
seeds = 3
