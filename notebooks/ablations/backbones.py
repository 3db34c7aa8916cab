"""Which backbone learns most from few scenes, without pre-training? Claims C4, C8, C9 and C10.

    mimdet ablate notebooks/ablations/backbones.py [--dry-run]

MIMDet, its ablations and the baselines as laptop-sized recipes on the same data and loop:
`shapes-v2-medium`, whose objects are as large against a token as COCO's, 7 recipes, 3 seeds, from
random weights. 21 trainings of about 6 CPU minutes each. All of this was fixed before any result was
looked at; the learning rates of the baselines were chosen before, on another seed.
"""

from mimdet import presets

base = presets.tiny()
base.data.shapes_level, base.data.shapes_size = "shapes-v2-medium", 256
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 100  # the curve: a fifth, two fifths ...
base.training.precision = "bf16"

grid = {
    "preset": [
        "tiny",  # what others differ from
        "tiny_no_decoder",
        "tiny_patch_stem",
        "tiny_benchmarking_vit",
        "tiny_vitdet",
        "tiny_swin",
        "tiny_resnet",
    ]
}
seeds = 3
evaluate_ratios = (1.0,)
draws = 1
