"""What is the masked autoencoder worth where few scenes have labels?

    mimdet pretrain tiny_mae runs/mae_400 --steps 400 --warmup-steps 40 --batch-size 32 \
        --accumulate 1 --precision bf16 --optimizer muon --learning-rate 0.032 --sample-ratio 0.5
    mimdet ablate notebooks/ablations/few_labels.py [--dry-run]

The same 250 labelled scenes again and again: from random weights, from `tiny_mae` (1,562 steps of
64 scenes), from `tiny_mae` with a stem that was first fitted to its patch embedding
(`training.align_stem`). Three trainings a seed, of about 4 CPU minutes. All of this was fixed
before any result was looked at. Added when these were known: an autoencoder of 400 steps, which
learnt by Muon, 32 scenes a step, half of the patches seen. Other numbers of labels:
`label_counts.py`.
"""

from mimdet import presets

base = presets.tiny()
base.data.shapes_train = 250
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 500
base.training.precision = "bf16"

grid = [
    {"training.init_from": "random", "training.align_stem": 0},
    {"training.init_from": "tiny_mae", "training.align_stem": 0},
    {"training.init_from": "tiny_mae", "training.align_stem": 300},
    {"training.init_from": "runs/mae_400", "training.align_stem": 0},
]
seeds = 3
evaluate_ratios = (1.0,)
draws = 1
