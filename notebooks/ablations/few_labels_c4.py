"""Is the masked autoencoder worth more where c4 learns classes first?

    mimdet ablate notebooks/ablations/few_labels_c4.py [--dry-run]

As `few_labels.py`, 250 labelled scenes, but the backbone is first trained by its own loss
(`training.c4_first`, as in `context.py`): from random weights, and from `tiny_mae` with an aligned
stem. Two trainings a seed, of about 5 CPU minutes.
"""

from mimdet import presets

base = presets.tiny()
base.data.shapes_train = 250
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 500
base.training.precision = "bf16"
base.training.c4_first, base.detector.c4_loss = 250, 2.0

grid = [
    {"training.init_from": "random", "training.align_stem": 0},
    {"training.init_from": "tiny_mae", "training.align_stem": 300},
]
seeds = 3
evaluate_ratios = (1.0,)
draws = 1
