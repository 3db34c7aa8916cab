"""What a larger canvas changes: `python tools/canvas_effect.py RUN [--out FILE.json]`.

An image batched with a larger one is padded further. GroupNorm in the stem, position tables and
the decoder see the padding (as in the paper), so c4 and the detections move a little. This measures
how much, for one run and three pairs of images; predict and evaluate avoid it by never mixing
padded sizes.
"""

import argparse
from pathlib import Path

import torch
from torchvision.ops import box_iou

from mimdet.data.coco import build_dataset
from mimdet.files import write_json
from mimdet.models.detector import Detector
from mimdet.structures import Detections
from mimdet.training.run import load_detector

LARGER = ((256, 320), (320, 320), (512, 256))
SCORE = 0.3


def c4_and_detections(
    model: Detector, images: list[torch.Tensor]
) -> tuple[torch.Tensor, Detections]:
    """c4 (C, h, w) and detections of the first image, in this company."""
    with torch.inference_mode():
        c4 = model.features(model.batch(images))["c4"][0]
    return c4, model.detect(images)[0]


def surviving(before: Detections, after: Detections) -> tuple[int, int]:
    """(detections with score >= SCORE, those found again: same class, IoU >= 0.9)."""
    sure = before[before.scores >= SCORE]
    again = box_iou(sure.boxes, after.boxes) >= 0.9
    again &= sure.labels[:, None] == after.labels[None]
    return len(sure), int(again.any(dim=1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_detector(options.run)
    dataset = build_dataset(model.config.data, "val")
    rows = []
    for number, canvas in enumerate(LARGER):
        image = model.resize(dataset[number].image)
        filler = torch.zeros(3, *canvas, dtype=torch.uint8)
        c4, alone = c4_and_detections(model, [image])
        c4_moved, together = c4_and_detections(model, [image, filler])
        change = c4_moved[:, : c4.shape[1], : c4.shape[2]] - c4
        sure, again = surviving(alone, together)
        row = {
            "image": list(image.shape[1:]),
            "canvas": list(canvas),
            "c4_relative_change": round(float(change.norm() / c4.norm()), 4),
            "detections": sure,
            "found_again": again,
        }
        rows.append(row)
        print(row)
    if options.out:
        report = {"data": dataset.version, "command": "tools/canvas_effect.py", "pairs": rows}
        write_json(options.out, report)


if __name__ == "__main__":
    main()
