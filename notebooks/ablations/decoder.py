"""Is the pre-trained decoder part of the recipe? Claim C6.

    mimdet ablate notebooks/ablations/decoder.py [--dry-run]

Both arms start from the encoder of `tiny_mae`; the decoder's one block from it too, or at random
(other depths: `depths.py`). Six trainings of about 4 CPU minutes each. All of this was fixed before
any result was looked at.
"""

from mimdet import presets

base = presets.tiny()
base.training.init_from = "tiny_mae"
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 500
base.training.precision = "bf16"

grid = {"training.init_decoder": ["pretrained", "random"]}
seeds = 3
evaluate_ratios = (0.5, 1.0)
draws = 1
