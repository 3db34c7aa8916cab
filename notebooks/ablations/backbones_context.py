"""The backbones again, where classes are told apart by what is far away.

    mimdet ablate notebooks/ablations/backbones_context.py [--dry-run]

As `backbones.py`, on `shapes-v2-context`: 6 recipes, 3 seeds, 18 trainings of about 5 CPU minutes
each. All of this was fixed before any result was looked at.
"""

from mimdet import presets

base = presets.tiny()
base.data.shapes_level, base.data.shapes_size = "shapes-v2-context", 256
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 500
base.training.precision = "bf16"

grid = {
    "preset": [
        "tiny",  # what others differ from
        "tiny_no_decoder",
        "tiny_patch_stem",
        "tiny_vitdet",
        "tiny_swin",
        "tiny_resnet",
    ]
}
seeds = 3
evaluate_ratios = (1.0,)
draws = 1
