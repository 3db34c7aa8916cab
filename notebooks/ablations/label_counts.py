"""The autoencoder's worth by the number of labelled scenes: 1,000.

    mimdet ablate notebooks/ablations/label_counts.py [--dry-run]

As `few_labels.py`, which has 250. Six trainings of about 3 CPU minutes. All of this was fixed
before any result was looked at.
"""

import runpy
from pathlib import Path

base = runpy.run_path(str(Path(__file__).with_name("few_labels.py")))["base"]

grid = {"data.shapes_train": [1000], "training.init_from": ["random", "tiny_mae"]}
seeds = 3
evaluate_ratios = (1.0,)
draws = 1
