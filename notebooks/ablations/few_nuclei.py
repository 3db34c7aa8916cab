"""What is a masked autoencoder worth where 64 microscope pictures have labels? Claim C5 again.

    mimdet pretrain tiny_mae runs/nuclei_mae --source folder --folder FOLDER/nuclei/train \
        --steps 400 --warmup-steps 40 --batch-size 32 --accumulate 1 --precision bf16 \
        --optimizer muon --learning-rate 0.032 --sample-ratio 0.5
    MIMDET_DATA=FOLDER mimdet ablate notebooks/ablations/few_nuclei.py [--dry-run]

The autoencoder sees all 270 training pictures of FOLDER (DSB2018, as in `fine_tuning.py`) without
labels; two detectors learn from the first 64 with labels, one from random weights. Two trainings a
seed, of about 3 CPU minutes. All of this was fixed before any result was looked at.
"""

import runpy
from pathlib import Path

base = runpy.run_path(str(Path(__file__).with_name("fine_tuning.py")))["base"]
base.data.limit_train = 64
base.training.optimizer, base.training.learning_rate = "muon", 4e-3
base.training.steps = base.training.evaluate_every_steps = 200  # 4 images a step

grid = {"training.init_from": ["random", "runs/nuclei_mae"]}
seeds = 3
