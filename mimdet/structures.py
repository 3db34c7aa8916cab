"""What travels between data, model and evaluation: Crops, Target, Record, Detections; their masks.

Boxes are xyxy pixels, float32; labels are contiguous 0..N-1 (COCO's own ids appear only where
files are read or written). Nothing here knows files, data sets or models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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
        return self._each(lambda part: part[index])

    def to(self, device: Any) -> "Detections":
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Detections":
        masks = self.mask_probabilities
        return Detections(
            change(self.boxes),
            change(self.scores),
            change(self.labels),
            self.image_size,
            None if masks is None else change(masks),
        )


# ------------------------------------------------------------------ masks in the image's pixels
#
# The mask head answers with 28 x 28 probabilities over each box. `probabilities_to_rle` turns them
# into COCO run lengths (RLE) without making an image-sized picture: pasting full-size masks and
# encoding them afterwards takes most of a naive evaluation's time. `paste` says the same thing in
# the plain way, for drawings and as the reference in the tests.
#
# Geometry (detectron2's `paste_masks_in_image`): cell (i, j) is a sample at its own centre, pixels
# are read at theirs by bilinear interpolation relative to the float box, everything outside the
# 28 x 28 cells counts as 0, and a pixel belongs to the mask at >= 0.5. torchvision's function
# of the same name rounds the box to whole pixels first, which moves edges by up to a pixel.


def probabilities_to_rle(
    probabilities: Tensor, boxes: Tensor, height: int, width: int
) -> list[dict[str, Any]]:
    """COCO run lengths of N pasted masks, equal to encoding `paste`.

    probabilities: (N, M, M') float in 0..1; boxes: (N, 4) xyxy pixels, may reach outside the image;
    a box without width or height has an empty mask. Returns N dictionaries
    {"size": [height, width], "counts": compressed str}, ready for json and pycocotools.
    """
    from pycocotools import mask as coco_mask

    if len(boxes) == 0:
        return []  # pycocotools fails on an empty list
    maps = probabilities.detach().float().cpu().numpy()
    rows, columns = maps.shape[1:]
    runs = []
    for cells, (x0, y0, x1, y1) in zip(maps, boxes.tolist(), strict=True):
        left, across = _bilinear_weights(x0, x1, columns, width)  # (w, M')
        top, down = _bilinear_weights(y0, y1, rows, height)  # (h, M)
        inside = across @ cells.T @ down.T >= 0.5  # (w, h): column by column, as RLE runs
        counts = _run_lengths(inside, left, top, height, width)
        runs.append({"size": [height, width], "counts": counts})
    compressed = coco_mask.frPyObjects(runs, height, width)
    return [{"size": [height, width], "counts": rle["counts"].decode()} for rle in compressed]


def paste(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """(N, height, width) bool bitmaps of N masks, on the device of `probabilities`.

    Same arguments as `probabilities_to_rle`; takes N x height x width bytes.
    """
    bitmaps = probabilities.new_zeros((len(boxes), height, width), dtype=torch.bool)
    x = torch.arange(width, device=probabilities.device) + 0.5
    y = torch.arange(height, device=probabilities.device) + 0.5
    for bitmap, cells, (x0, y0, x1, y1) in zip(bitmaps, probabilities, boxes.tolist(), strict=True):
        if x1 <= x0 or y1 <= y0:
            continue
        across = (x - x0) / (x1 - x0) * 2 - 1  # the box is -1..1
        down = (y - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)  # (H, W, 2)
        pixels = F.grid_sample(cells[None, None].float(), grid[None], align_corners=False)
        bitmap.copy_(pixels[0, 0] >= 0.5)
    return bitmaps


def bitmap_to_rle(bitmap: Tensor | NDArray[Any]) -> dict[str, Any]:
    """(H, W) bool or 0/1 bitmap -> compressed COCO run lengths with a str of counts."""
    from pycocotools import mask as coco_mask

    pixels = np.asfortranarray(np.asarray(bitmap), dtype=np.uint8)
    rle = coco_mask.encode(pixels)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def as_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO segmentation (polygons, or run lengths of any form) as compressed run lengths."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def rle_to_bitmap(rle: dict[str, Any]) -> NDArray[np.bool_]:
    """COCO run lengths, compressed (str, bytes) or a plain list of counts -> (H, W) bool."""
    from pycocotools import mask as coco_mask

    return coco_mask.decode(as_rle(rle, *rle["size"])).astype(bool)


def _bilinear_weights(
    low: float, high: float, cells: int, pixels: int
) -> tuple[int, NDArray[np.float32]]:
    """How much each cell of a box side low..high counts at each pixel of an image side.

    Returns (first, weights (n, cells)) for pixels first..first+n-1, the only ones where any weight
    is positive: half a cell beyond the box the interpolation has faded to 0.
    """
    if high <= low:
        return 0, np.zeros((0, cells), dtype=np.float32)
    margin = (high - low) / (2 * cells)
    first = max(0, math.ceil(low - margin - 0.5))
    last = min(pixels - 1, math.floor(high + margin - 0.5))
    centres = np.arange(first, last + 1) + 0.5
    positions = (centres - low) * (cells / (high - low)) - 0.5  # in cells; 0 = centre of cell 0
    weights = positions[:, None] - np.arange(cells)
    np.subtract(1, np.abs(weights, out=weights), out=weights)
    return first, weights.clip(0).astype(np.float32)


def _run_lengths(
    inside: NDArray[np.bool_], left: int, top: int, height: int, width: int
) -> NDArray[np.int64]:
    """Counts of alternating background and mask pixels, down the columns of the whole image.

    inside: (w, h) bool, the part of the image whose first column is `left` and first row `top`.
    """
    band = np.zeros(len(inside) * height + 2, dtype=bool)  # these columns and a pixel either side
    band[1:-1].reshape(len(inside), height)[:, top : top + inside.shape[1]] = inside
    edges = np.flatnonzero(band[1:] != band[:-1]) + left * height
    counts = np.diff(np.concatenate(([0], edges, [height * width])))
    return counts[:-1] if counts[-1] == 0 else counts  # as pycocotools: no empty run at the end


def crops_to_bitmaps(crops: Crops, height: int, width: int) -> Tensor:
    """(N, height, width) bool: the pixels of N masks, read from their crops as `paste` does.

    What a crop has outside the image is left out; a crop without width or height is empty.
    """
    return paste(crops.bitmaps, crops.boxes, height, width)


def generic_names(count: int) -> list[str]:
    """Of classes whose names nobody knows."""
    return [f"class {i + 1}" for i in range(count)]
