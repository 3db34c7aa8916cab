"""Is a share of the tokens enough, in training and at evaluation?

    mimdet ablate notebooks/ablations/sample_ratio.py [--dry-run]

The paper trains with 25 % or 50 % of the tokens and evaluates with all of them. Here the tiny
detector starts from the shipped autoencoder, as the paper's do, is trained with 25 %, 50 % and all,
and each training is evaluated with 25 % to all: a matrix of 3 x 4, with 3 seeds. Nine trainings of
at most 12 CPU minutes each. All of this was fixed before any result was looked at.
"""

from mimdet import presets

base = presets.tiny()
base.data.shapes_level = "shapes-v1-medium"
base.training.init_from = "tiny_mae"
# These three were `tiny`'s when this was fixed.
base.backbone.decoder_fill, base.backbone.decoder_depth = "stem", 2
base.training.learning_rate = 2.4e-3
base.training.steps = 900  # 4 images a step
base.training.evaluate_every_steps = 450  # the curve has two points

grid = {"backbone.sample_ratio": [1.0, 0.5, 0.25]}  # the first one is what others differ from
seeds = 3
evaluate_ratios = (0.25, 0.5, 0.75, 1.0)
draws = 2
