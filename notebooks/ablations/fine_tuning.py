"""What is a detector of drawn scenes worth as a start on real pictures, few or many of them?

    MIMDET_DATA=FOLDER mimdet ablate notebooks/ablations/fine_tuning.py [--dry-run]

Nuclei (DSB2018) as COCO files in FOLDER/nuclei, the first 16, 64 or all 270 training images, each
from random weights, from `tiny`, and from `tiny` with stem and encoder as they are. Everything else
is as `mimdet start` proposes for them, at 256 pixels and in 100 steps; judged on the first 30
held-out images. Nine trainings a seed, of about 2 CPU minutes.
"""

import os
from pathlib import Path

from mimdet import presets
from mimdet.config import change

folder = Path(os.environ.get("MIMDET_DATA", "data")) / "nuclei"

base = presets.tiny()
for split in ("train", "val"):
    setattr(base.data, f"{split}_json", f"{folder}/annotations/instances_{split}.json")
    setattr(base.data, f"{split}_images", f"{folder}/{split}")
change(base.data, source="coco", flips="dihedral", limit_val=30)
change(base.data, short_sides=(224, 256, 288), test_short_side=256, max_side=512)
change(base.detector, anchor_sizes=(8, 16, 32, 64, 128), canonical_size=112 * 8 / 12)
change(base.detector, num_classes=1, norm="GN", rpn_pre_nms=(600, 600), rpn_post_nms=(300, 300))
change(base.detector, rpn_anchors_per_image=256, rois_per_image=128, detections_per_image=100)
base.training.optimizer, base.training.learning_rate = "adamw", 1.6e-3  # `tiny` then
change(base.training, steps=100, warmup_steps=10, evaluate_every_steps=100)  # 4 images a step

grid = [
    {"data.limit_train": images, "training.init_from": source, "training.freeze": frozen}
    for images in (16, 64, 270)
    for source, frozen in (("random", ()), ("tiny", ()), ("tiny", ("stem", "encoder")))
]
seeds = 3
