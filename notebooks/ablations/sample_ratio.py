"""Is a share of the tokens enough, in training and at evaluation? Claims C1, C2 and C3.

    mimdet ablate notebooks/ablations/sample_ratio.py [--dry-run]

The paper trains with 25 % or 50 % of the tokens and evaluates with all of them. Here `tiny` is
trained with all, 50 % and 25 %, and each training is evaluated with 25 % to all: a matrix of 3 x 4.
Nine trainings of about 5 CPU minutes each. All of this was fixed before any result was looked at.
"""

from mimdet import presets

base = presets.tiny()  # from random weights, on shapes-v1-medium
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 100
base.training.precision = "bf16"

grid = {"backbone.sample_ratio": [1.0, 0.5, 0.25]}  # the first one is what others differ from
seeds = 3
evaluate_ratios = (0.25, 0.5, 0.75, 1.0)
draws = 2
