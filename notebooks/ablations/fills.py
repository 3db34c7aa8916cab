"""What stands at the places that the encoder does not see, and does it use the encoder? Claim C7.

    mimdet ablate notebooks/ablations/fills.py [--dry-run]

Version 1 of the paper puts MAE's mask token there, version 2 the stem's own tokens. With the
second, the decoder sees every place without the encoder, which from random weights is then passed
by. Both, trained with half and a quarter of the tokens; each training evaluated from one token up to
all 256. Twelve trainings of about 4 CPU minutes each. All of this was fixed before any result was
looked at.
"""

from mimdet import presets

base = presets.tiny()
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 100  # as sample_ratio.py: two arms are the same runs
base.training.precision = "bf16"

grid = {
    "backbone.decoder_fill": ["mask_token", "stem"],
    "backbone.sample_ratio": [0.5, 0.25],
}
seeds = 3
evaluate_ratios = (0.004, 0.25, 0.5, 1.0)  # the first is one token of 256
draws = 1
