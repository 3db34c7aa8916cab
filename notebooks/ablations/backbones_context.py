"""The backbones again, where classes are told apart by what is far away.

    mimdet ablate notebooks/ablations/backbones_context.py [--dry-run]

As `backbones.py`, on `shapes-v2-context` and without Benchmarking ViT: 6 recipes, 3 seeds, 18
trainings of about 5 CPU minutes each. All of this was fixed before any result was looked at.
"""

import runpy
from pathlib import Path

shared = runpy.run_path(str(Path(__file__).with_name("backbones.py")))
base = shared["base"]
base.data.shapes_level = "shapes-v2-context"
base.training.evaluate_every_steps = 500  # at the end

grid = {"preset": [name for name in shared["grid"]["preset"] if name != "tiny_benchmarking_vit"]}
seeds, evaluate_ratios, draws = (shared[name] for name in ("seeds", "evaluate_ratios", "draws"))
