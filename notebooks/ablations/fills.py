"""Does the detector use its encoder? What stands at the places that the encoder does not see.

    mimdet ablate notebooks/ablations/fills.py [--dry-run]

Version 1 of the paper puts MAE's mask token there, version 2 the stem's own tokens. With the
second, the decoder sees every place without the encoder, which from random weights is then passed
by. Both fills with 0, 1 and 2 decoder blocks, and encoders of 6 and 8 blocks instead of 4; each
training evaluated from one token up to all 256. Eight trainings a seed, of about 7 CPU minutes.
"""

from mimdet import presets

base = presets.tiny()
base.training.steps = 1200  # 4 images a step
base.training.evaluate_every_steps = 1200
base.training.precision = "bf16"

fills = [
    {"backbone.decoder_fill": fill, "backbone.decoder_depth": depth, "backbone.depth": 4}
    for fill in ("mask_token", "stem")
    for depth in (0, 1, 2)
]
encoders = [
    {"backbone.decoder_fill": "mask_token", "backbone.decoder_depth": 1, "backbone.depth": depth}
    for depth in (6, 8)
]
grid = fills + encoders
seeds = 3
evaluate_ratios = (0.004, 0.1, 0.25, 0.5, 1.0)  # the first is one token of 256
draws = 1
