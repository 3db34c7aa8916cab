"""Any image in, Detections out: the test transform, the detector, and back to the file's pixels."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from mimdet.data.augment import resize_image, test_size
from mimdet.data.images import pil_to_rgb, read_image
from mimdet.models.detector import Detector
from mimdet.models.rcnn import clip_boxes, non_empty
from mimdet.models.sampling import Keep, Sample
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
    many = isinstance(images, list | tuple)
    sizes: list[tuple[int, int]] = []
    resized: list[Tensor] = []
    for image in images if many else [images]:
        picture = as_tensor(image)  # only its resized copy is kept
        sizes.append((picture.shape[1], picture.shape[2]))
        resized.append(resize_image(picture, test_size(model.config.data, *sizes[-1])))
    found: dict[int, Detections] = {}
    for members in equal_padded_size(resized, len(resized) if sample is not None else batch_size):
        generators = [generator_for(seed, device_of(model)) for _ in members]
        detections = run_detector(
            model,
            [resized[i] for i in members],
            sample_ratio=sample_ratio,
            keep=keep,
            sample=sample,
            generators=generators,
        )
        for i, d in zip(members, detections, strict=True):
            on_canvas = resized[i].shape[1:] if model.canvas else None
            found[i] = to_original(d, sizes[i], on_canvas).to("cpu")
    ordered = [found[i] for i in range(len(resized))]
    return ordered if many else ordered[0]


def run_detector(model: Detector, images: Sequence[Tensor], **sampling: Any) -> list[Detections]:
    """One batch of resized images in evaluation mode, at the precision of the device.

    With training.precision="fp32" a GPU computes in float32 here too.
    """
    weights = next(model.parameters())
    asked = "fp32" if model.config.training.precision == "fp32" else "auto"
    precision = "fp64" if weights.dtype == torch.float64 else asked
    with autocast(weights.device, precision):
        return model.detect(images, **sampling)


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


def equal_padded_size(images: Sequence[Tensor], batch_size: int) -> Iterator[list[int]]:
    """Indices of images that need the same canvas, at most `batch_size` at a time."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        groups[padded_size(image.shape[1], image.shape[2])].append(i)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]


def as_tensor(image: Any) -> Tensor:
    """A path, PIL image, uint8 array or uint8 tensor -> uint8 (3, H, W) RGB."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, np.ndarray):
        channels = image.shape[2] if image.ndim == 3 else int(image.ndim == 2)
        if image.dtype != np.uint8 or channels not in (1, 3, 4):
            raise ValueError(
                f"an array image must be uint8 of shape (H, W, 3) or (H, W), not {image.dtype} "
                f"{image.shape}; floats in 0..1 become (array * 255).astype('uint8'), and "
                "(3, H, W) becomes array.transpose(1, 2, 0)"
            )
        pixels = image[:, :, None] if image.ndim == 2 else image[:, :, :3]  # without alpha
        colours = pixels.repeat(3, axis=2) if channels == 1 else pixels
        return torch.from_numpy(np.ascontiguousarray(colours)).permute(2, 0, 1).contiguous()
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"a tensor image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}"
            )
        return image
    if hasattr(image, "convert"):
        return pil_to_rgb(image)
    raise ValueError(
        f"cannot read an image from {type(image).__name__}: give a path, a PIL image, an array "
        "or a tensor"
    )


def generator_for(seed: int, device: torch.device) -> Generator:
    return Generator(device=device).manual_seed(seed)


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Mixed precision as configured; `auto` is bf16 on CUDA and fp32 elsewhere.

    `fp64` makes new tensors float64, as the weights of the model have to be already.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    context = (
        torch.autocast(device.type, dtypes[precision]) if precision in dtypes else nullcontext()
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if precision == "fp64" else default)
    try:
        with context:
            yield
    finally:
        torch.set_default_dtype(default)
