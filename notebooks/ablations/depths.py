"""How deep an encoder, how deep a decoder, with either fill: does the detector use its encoder?

    mimdet ablate notebooks/ablations/depths.py [--dry-run]

Decoders of 0, 2 and 4 blocks instead of one, encoders of 6 and 8 blocks instead of 4. Twelve
trainings a seed, of about 4 CPU minutes each. All of this was fixed before any result was looked at.
"""

from mimdet import presets

base = presets.tiny()
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 500
base.training.precision = "bf16"

depths = [(4, 1), (4, 0), (4, 2), (4, 4), (6, 1), (8, 1)]
grid = [
    {"backbone.decoder_fill": fill, "backbone.depth": encoder, "backbone.decoder_depth": decoder}
    for fill in ("mask_token", "stem")
    for encoder, decoder in depths
]
seeds = 3
evaluate_ratios = (0.004, 0.25, 1.0)  # the first is one token of 256
draws = 1
