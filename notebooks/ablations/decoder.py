"""Is the pre-trained decoder part of the recipe? Claim C6.

    mimdet ablate notebooks/ablations/decoder.py [--dry-run]

All arms start from the encoder of `tiny_mae`; the decoder from it too, or at random, and of one, no
or more blocks. Fifteen trainings of about 4 CPU minutes each. All of this was fixed before any
result was looked at.
"""

from mimdet import presets

base = presets.tiny()
base.training.init_from = "tiny_mae"
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 100
base.training.precision = "bf16"

grid = [
    {"training.init_decoder": "pretrained", "backbone.decoder_depth": 1},
    {"training.init_decoder": "random", "backbone.decoder_depth": 1},
    {"training.init_decoder": "pretrained", "backbone.decoder_depth": 0},
    {"training.init_decoder": "pretrained", "backbone.decoder_depth": 2},
    {"training.init_decoder": "pretrained", "backbone.decoder_depth": 4},
]
seeds = 3
evaluate_ratios = (0.5, 1.0)
draws = 2
