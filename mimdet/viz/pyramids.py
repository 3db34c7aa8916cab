"""One image through a detector: every map it makes, by level."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mimdet.data.augment import resize_image, test_size
from mimdet.models.detector import Detector, on_canvas
from mimdet.models.rcnn import pad_and_normalise
from mimdet.models.sampling import PATCH, Sample
from mimdet.predict import autocast, device_of, generator_for
from mimdet.viz.pixels import UNSAMPLED, Pixels
from mimdet.viz.record import record

LEVELS = ("c2", "c3", "tokens", "c4", "c5", "p2", "p3", "p4", "p5", "p6")
"""Every map of a detector, in the order they are made; "tokens" is what the stem hands on."""
PALE = 0.6  # share of light grey over a token that was dropped


@dataclass(slots=True)
class Pyramid:
    """One image and every map a detector makes of it."""

    image: Tensor
    """uint8 (3, H, W): resized as the detector wants it, padded with black to multiples of 32."""
    size: tuple[int, int]
    """(height, width) of the image before padding."""
    maps: dict[str, Tensor]
    """Level -> (C, h, w) float32 on the CPU, in the order of LEVELS."""
    sample: Sample | None = None
    """Which tokens the encoder saw; None for a backbone that sees all."""

    def only(self, *levels: str) -> dict[str, Tensor]:
        """The maps of these levels. Raises ValueError for one that is not there."""
        missing = [level for level in levels if level not in self.maps]
        if missing:
            raise ValueError(f"this detector has no {missing}; its levels are {list(self.maps)}")
        return {level: self.maps[level] for level in levels}


def pyramid_of(
    model: Detector, image: Tensor, *, sample_ratio: float | None = None, seed: int = 0
) -> Pyramid:
    """The maps c2..c5, tokens and p2..p6 of one image, uint8 (3, H, W), prepared as `predict` does.

    sample_ratio: None = the model's `sample_ratio_eval`; below 1 the tokens are drawn from `seed`.
    The model is run in evaluation mode and left in the mode it was in.
    """
    image = resize_image(image, test_size(model.config.data, *image.shape[1:]))
    if model.canvas:
        image = on_canvas(image, model.canvas)
    device = device_of(model)
    batch = pad_and_normalise([image], device)
    samples = hasattr(model.backbone, "sampler")
    given: dict[str, Any] = {"generators": [generator_for(seed, device)]} if samples else {}
    if samples and sample_ratio is not None:
        given["sample_ratio"] = sample_ratio
    watched = "backbone.stem" if samples else "neck"
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.inference_mode(), autocast(device, "auto"), record(model, watched) as seen:
            maps = model.backbone(batch.tensors, batch.image_sizes, **given)
            maps = {**maps, **model.neck(maps)}
    finally:
        for module, training in modes.items():
            module.training = training
    if samples:
        maps["tokens"] = seen[watched].tokens
    height, width = batch.tensors.shape[2:]
    padded = F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
    ordered = {level: maps[level][0].float().cpu() for level in LEVELS if level in maps}
    return Pyramid(padded, batch.image_sizes[0], ordered, seen.sample)


def pale_dropped(pixels: Pixels, sample: Sample, size: tuple[int, int], index: int = 0) -> Pixels:
    """A picture of the image with the tokens that the encoder does not see pale.

    pixels: uint8 (H, W, 3) of any size that shows the image as fed; size: (height, width) of that
    image in pixels, before padding or after, so that tokens fall on their places.
    """
    kept = torch.zeros(sample.grid[0] * sample.grid[1], dtype=torch.bool)
    kept[sample.keep[index].cpu()] = True
    rows = (torch.arange(pixels.shape[0]) + 0.5) * size[0] / pixels.shape[0] / PATCH
    columns = (torch.arange(pixels.shape[1]) + 0.5) * size[1] / pixels.shape[1] / PATCH
    dropped = ~kept.view(sample.grid)[rows.long()][:, columns.long()].numpy()  # (H, W)
    pale = pixels.copy()
    pale[dropped] = ((1 - PALE) * pixels[dropped] + PALE * np.array(UNSAMPLED)).round()
    return pale
