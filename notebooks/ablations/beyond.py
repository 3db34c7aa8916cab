"""Beyond the paper: three ways to sample, each at the cost of the paper's or close to it.

    mimdet ablate notebooks/ablations/beyond.py [--dry-run]

- `any_ratio`: each step draws its ratio anew, 25 % to 75 %, half on average: one detector for every
  ratio.
- `whole_at_end`: 40 % of the tokens, and all of them in the last sixth of the training, half on
  average: no gap between training and evaluation at the end.
- `grid`: tokens in a regular pattern instead of at random.

Twelve trainings of about 4 CPU minutes each, evaluated at 25 %, 50 % and all. All of this was fixed
before any result was looked at.
"""

import torch

from mimdet import presets


def any_ratio(cfg):
    """A MIMDet whose ratio in training is drawn anew each step."""
    from mimdet.models.backbones import build_mimdet

    def redraw(backbone, inputs):
        if backbone.training:
            backbone.sample_ratio = 0.25 + 0.5 * float(torch.rand(()))

    backbone = build_mimdet(cfg)
    backbone.register_forward_pre_hook(redraw)
    return backbone


base = presets.tiny()
base.training.steps = 500  # 4 images a step
base.training.evaluate_every_steps = 500
base.training.precision = "bf16"

grid = [
    {
        "backbone.kind": kind,
        "backbone.sampler": sampler,
        "backbone.sample_ratio": ratio,
        "training.whole_at_end": whole,
    }
    for kind, sampler, ratio, whole in [
        ("mimdet", "random", 0.5, 0.0),  # the paper's way
        (any_ratio, "random", 0.5, 0.0),
        ("mimdet", "random", 0.4, 1 / 6),
        ("mimdet", "grid", 0.5, 0.0),
    ]
]
seeds = 3
evaluate_ratios = (0.25, 0.5, 1.0)
draws = 1
