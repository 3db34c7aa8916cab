"""Does the batch size matter, and how shall the learning rate follow it? Claim C11.

    mimdet ablate notebooks/ablations/batch.py [--dry-run]

The same 2,000 images in batches of 4 and 16, with a rate that grows with the batch or with its
square root. Nine trainings of about 4 CPU minutes each. All of this was fixed before any result was
looked at.
"""

from mimdet import presets

base = presets.tiny()
base.training.precision = "bf16"
base.training.evaluate_every_steps = 500

images = 2000
grid = [
    {
        "training.batch_size": batch,
        "training.learning_rate_exponent": exponent,
        "training.steps": images // batch,
        "training.warmup_steps": 160 // batch,
    }
    for batch, exponent in [(4, 0.5), (16, 0.5), (16, 1.0)]
]
seeds = 3
evaluate_ratios = (1.0,)
draws = 1
