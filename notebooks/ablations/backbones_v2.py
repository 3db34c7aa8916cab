"""The backbones again where objects are larger, and where classes are told apart by what is far away.

    mimdet ablate notebooks/ablations/backbones_v2.py [--dry-run]

`shapes-v2-medium` and `shapes-v2-context`, 6 recipes, 3 seeds, from random weights: 36 trainings of
8 to 12 CPU minutes each. All of this was fixed before any result was looked at.
"""

from mimdet import presets

base = presets.tiny()
base.data.shapes_size = 256
base.training.steps = 1000  # 4 images a step
base.training.evaluate_every_steps = 500
base.training.precision = "bf16"

grid = {
    "data.shapes_level": ["shapes-v2-context", "shapes-v2-medium"],
    "preset": [
        "tiny",  # what others differ from
        "tiny_no_decoder",
        "tiny_patch_stem",
        "tiny_vitdet",
        "tiny_swin",
        "tiny_resnet",
    ],
}
seeds = 3
