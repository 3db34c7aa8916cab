"""Any image in, Detections out: the test transform, the detector, and back to the file's pixels."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from mimdet.images import Size, to_rgb
from mimdet.models.checkpoint_files import check_finite
from mimdet.models.detector import Detector, autocast
from mimdet.models.rcnn import clip_boxes, non_empty
from mimdet.models.sampling import DEFAULT, Keep, Sample, Sampling
from mimdet.structures import Detections, padded_size

DEFAULT_BATCH = 4


def predict(
    model: Detector,
    images: Any,
    *,
    sample_ratio: float | None = None,
    keep: Keep | None = None,
    sample: Sample | None = None,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH,
) -> Any:
    """Detect in one image or a list of them, of any sizes.

    images: a path, a PIL image, a uint8 array (H, W, 3) or (H, W), a uint8 tensor (3, H, W), or a
    list of these. Returns Detections in the image's own pixels, or a list of them. `sample_ratio`
    is the share of tokens the encoder sees (default: the model's `sample_ratio_eval`); below 1 the
    tokens are drawn from `seed`, the same for an image whatever it is batched with; `sample` gives
    them outright. Only images of equal padded size share a batch, so `predict(model, [a, b])`
    equals `predict(model, a)`, `predict(model, b)`.
    """
    check_finite(model.state_dict(), "the detector")
    many = isinstance(images, list | tuple)
    sizes: list[Size] = []
    resized: list[Tensor] = []
    for image in images if many else [images]:
        picture = to_rgb(image)  # only its resized copy is kept
        sizes.append((picture.shape[1], picture.shape[2]))
        resized.append(model.resize(picture))
    together = len(resized) if sample is not None else batch_size
    found: dict[int, Detections] = {}
    for members in equal_padded_size([picture.shape[1:] for picture in resized], together):
        generators = [generator_for(seed, device_of(model)) for _ in members]
        sampling = Sampling(sample_ratio, keep, sample, generators)
        images, own_sizes = [resized[i] for i in members], [sizes[i] for i in members]
        found |= zip(members, detect_originals(model, images, own_sizes, sampling), strict=True)
    ordered = [found[i] for i in range(len(resized))]
    return ordered if many else ordered[0]


def detect_originals(
    model: Detector, images: Sequence[Tensor], sizes: Sequence[Size], sampling: Sampling
) -> list[Detections]:
    """One batch of resized images -> Detections in images of their original sizes, on the CPU."""
    found = run_detector(model, images, sampling)
    return [
        to_original(d, size, image.shape[1:] if model.canvas else None).to("cpu")
        for d, size, image in zip(found, sizes, images, strict=True)
    ]


def run_detector(
    model: Detector, images: Sequence[Tensor], sampling: Sampling = DEFAULT
) -> list[Detections]:
    """One batch of resized images in evaluation mode, at the precision of the device.

    With training.precision="fp32" a GPU computes in float32 here too.
    """
    weights = next(model.parameters())
    asked = "fp32" if model.config.training.precision == "fp32" else "auto"
    precision = "fp64" if weights.dtype == torch.float64 else asked
    with autocast(weights.device, precision):
        return model.detect(images, sampling=sampling)


def to_original(
    detections: Detections, size: tuple[int, int], on_canvas: Sequence[int] | None = None
) -> Detections:
    """Boxes in the resized image -> in the original of (height, width); empty ones drop out.

    on_canvas: (height, width) of the resized image where it was placed on a canvas; then the factor
    of the longer side is that of both axes, as in the original code.
    """
    height, width = detections.image_size
    factors = size[1] / width, size[0] / height
    if on_canvas is not None:
        factors = (max(size) / max(on_canvas),) * 2
    scale = detections.boxes.new_tensor(factors).repeat(2)
    boxes = clip_boxes(detections.boxes * scale, size)
    moved = Detections(
        boxes, detections.scores, detections.labels, size, detections.mask_probabilities
    )
    return moved[non_empty(boxes)]


def equal_padded_size(sizes: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of images, by their (height, width), that need the same canvas.

    At most `batch_size` at a time, the largest first: memory runs out at once or not at all.
    Padding changes a detector's output a little (GroupNorm, positions, decoder), so padded sizes
    are never mixed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one image at a time")
    groups: dict[Size, list[int]] = defaultdict(list)
    for i, (height, width) in enumerate(sizes):
        groups[padded_size(height, width)].append(i)
    return [
        groups[size][start : start + batch_size]
        for size in sorted(groups, key=lambda size: (-size[0] * size[1], size))
        for start in range(0, len(groups[size]), batch_size)
    ]


def generator_for(seed: int, device: torch.device) -> Generator:
    return Generator(device=device).manual_seed(seed % (1 << 63))


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
