"""What travels between data, model and evaluation: Crops, Target, Record, Detections.

Boxes are xyxy pixels, float32; labels are contiguous 0..N-1 (COCO's own ids appear only where
files are read or written). Nothing here knows files, data sets or models.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAD_MULTIPLE = 32
"""Images are padded to a multiple of this, the stride of c5."""


def padded_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the smallest canvas of multiples of 32 that holds the image."""
    return -(-height // PAD_MULTIPLE) * PAD_MULTIPLE, -(-width // PAD_MULTIPLE) * PAD_MULTIPLE


@dataclass(slots=True)
class Crops:
    """N instance masks, each a small bitmap that covers one box of the image.

    A mask that is moved, resized or cropped with its image keeps its bitmap; only its box changes.
    A full-size bitmap is the special case of a box that is the whole image.
    """

    boxes: Tensor
    """(N, 4) float32 xyxy: the region of the image that bitmap i covers, edge to edge. It may
    reach outside the image, and it need not equal the object's own box."""
    bitmaps: Tensor
    """(N, M, M') uint8, 0 or 1: row 0 is the top of the box, column 0 its left."""

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Any) -> "Crops":
        return Crops(self.boxes[index], self.bitmaps[index])

    def to(self, device: Any) -> "Crops":
        return Crops(self.boxes.to(device), self.bitmaps.to(device))


@dataclass(slots=True)
class Target:
    """The truth of one image, in the pixels of the image it comes with."""

    boxes: Tensor
    """(N, 4) float32 xyxy."""
    labels: Tensor
    """(N,) int64, 0..num_classes-1."""
    masks: Crops | None = None
    """None where the data set has boxes only."""

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: Any) -> "Target":
        masks = None if self.masks is None else self.masks.to(device)
        return Target(self.boxes.to(device), self.labels.to(device), masks)


@dataclass(slots=True)
class Record:
    """One image as a data set stores it, before any augmentation."""

    image: Tensor
    """(3, H, W) uint8 RGB."""
    target: Target
    """Trainable objects only: crowd regions are left out (evaluation reads them itself)."""
    image_id: int | str


@dataclass(slots=True)
class Detections:
    """What the detector found in one image, best score first."""

    boxes: Tensor
    """(N, 4) float32 xyxy, in pixels of `image_size`."""
    scores: Tensor
    """(N,) float32 in 0..1."""
    labels: Tensor
    """(N,) int64."""
    image_size: tuple[int, int]
    """(height, width) the boxes refer to."""
    mask_probabilities: Tensor | None = None
    """(N, 28, 28) float32: the mask of each box, before it is pasted into the image."""

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Any) -> "Detections":
        probabilities = self.mask_probabilities
        if probabilities is not None:
            probabilities = probabilities[index]
        return Detections(
            self.boxes[index],
            self.scores[index],
            self.labels[index],
            self.image_size,
            probabilities,
        )

    def to(self, device: Any) -> "Detections":
        probabilities = self.mask_probabilities
        if probabilities is not None:
            probabilities = probabilities.to(device)
        return Detections(
            self.boxes.to(device),
            self.scores.to(device),
            self.labels.to(device),
            self.image_size,
            probabilities,
        )

    @staticmethod
    def empty(image_size: tuple[int, int], masks: bool) -> "Detections":
        probabilities = torch.zeros(0, 28, 28) if masks else None
        return Detections(
            torch.zeros(0, 4),
            torch.zeros(0),
            torch.zeros(0, dtype=torch.long),
            image_size,
            probabilities,
        )
