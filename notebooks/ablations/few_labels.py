"""What is the masked autoencoder worth where few scenes have labels?

    mimdet ablate notebooks/ablations/few_labels.py [--dry-run]

The same 250 labelled scenes again and again: from random weights, from `tiny_mae`, and from
`tiny_mae` with a stem that was first fitted to its patch embedding (`training.align_stem`). Three
trainings a seed, of about 4 CPU minutes.
"""

from mimdet import presets

base = presets.tiny()
base.data.shapes_train = 250
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 500
base.training.precision = "bf16"

grid = [
    {"training.init_from": "random", "training.align_stem": 0},
    {"training.init_from": "tiny_mae", "training.align_stem": 0},
    {"training.init_from": "tiny_mae", "training.align_stem": 300},
]
seeds = 3
evaluate_ratios = (1.0,)
draws = 1
