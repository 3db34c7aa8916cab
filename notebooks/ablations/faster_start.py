"""What teaches a small detector most in five minutes of one core? Everything costs the same time.

    mimdet ablate notebooks/ablations/faster_start.py --processes 1 [--dry-run]

`tiny` on new scenes, random weights, judged on 200 held-out scenes. The steps of each arm are those
that 300 CPU seconds hold, measured before (AMD EPYC, one thread, bf16). Arms and steps were fixed
before any result was looked at. Nine trainings a seed, of 5 CPU minutes each.
"""

from mimdet import presets

base = presets.tiny()
base.training.optimizer, base.training.learning_rate = "adamw", 1.6e-3  # `tiny` then
base.training.precision = "bf16"
base.training.evaluate_every_steps = 10_000  # at the end
WHOLE, MIXED = (256,), (160, 192, 224, 256)

grid = [
    {
        "training.batch_size": batch,
        "training.learning_rate_exponent": exponent,
        "data.short_sides": sides,
        "training.init_from": source,
        "training.c4_first": first,
        "detector.c4_loss": 2.0 if first else 0.0,
        "training.steps": steps,
    }
    for batch, exponent, sides, source, first, steps in [
        (4, 0.5, WHOLE, "random", 0, 970),
        (2, 0.5, WHOLE, "random", 0, 1750),
        (2, 0.0, WHOLE, "random", 0, 1750),
        (1, 0.5, WHOLE, "random", 0, 2640),
        (4, 0.5, MIXED, "random", 0, 1100),
        (2, 0.5, MIXED, "random", 0, 1980),
        (4, 0.5, WHOLE, "tiny_mae", 0, 970),
        (2, 0.5, WHOLE, "tiny_mae", 0, 1750),
        (4, 0.5, WHOLE, "random", 150, 900),
    ]
]
seeds = 1
evaluate_ratios = (1.0,)
draws = 1
