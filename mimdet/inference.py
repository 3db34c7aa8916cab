"""Any image in, Detections out: the test transform, the detector, and back to the file's pixels."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor
from torchvision.ops import batched_nms, box_area, clip_boxes_to_image

from mimdet.images import Resize, Size, to_rgb
from mimdet.models.checkpoint_files import check_finite
from mimdet.models.detector import OVERLAP, Detector, at_size, autocast
from mimdet.models.rcnn import non_empty
from mimdet.models.sampling import DEFAULT, Keep, Sample, Sampling
from mimdet.structures import Detections, padded_size

DEFAULT_BATCH = 4
EDGE = 4
"""Pixels from a border inside the image at which a detection counts as cut by it."""
SMALL_SIDE = 8
"""Pixels of the resized image below which an object can hardly be found."""
Window = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the image."""


def predict(
    model: Detector,
    images: Any,
    *,
    sample_ratio: float | None = None,
    keep: Keep | None = None,
    sample: Sample | None = None,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH,
    short_side: int = 0,
    detections: int = 0,
    tile: int = 0,
    overlap: int = OVERLAP,
) -> Any:
    """Detect in one image or a list of them, of any sizes.

    images: a path, a PIL image, a uint8 array (H, W, 3) or (H, W), a uint8 tensor (3, H, W), or a
    list of these. Returns Detections in the image's own pixels, or a list of them. `sample_ratio`
    is the share of tokens the encoder sees (default: the model's `sample_ratio_eval`); below 1 the
    tokens are drawn from `seed`, the same for an image whatever it is batched with; `sample` gives
    them outright. Only images of equal padded size share a batch, so `predict(model, [a, b])`
    equals `predict(model, a)`, `predict(model, b)`. short_side, detections, tile, overlap: other
    sizes than the model's own, as of `at_size`.
    """
    check_finite(model.state_dict(), "the detector")
    model = at_size(model, short_side, detections, tile, overlap)
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
    sure = [own[own.scores >= 0.5] for own in ordered]
    areas = [area for own in sure for area in box_area(own.boxes).tolist()]
    warn_of_small(areas, [zoom_of(model, own.image_size) for own in sure for _ in range(len(own))])
    return ordered if many else ordered[0]


def detect_originals(
    model: Detector, images: Sequence[Tensor], sizes: Sequence[Size], sampling: Sampling
) -> list[Detections]:
    """One batch of resized images -> Detections in images of their original sizes, on the CPU."""
    if model.tiling is not None:
        return [detect_tiles(model, image, sampling, i) for i, image in enumerate(images)]
    found = run_detector(model, images, sampling)
    return [
        to_original(d, size, image.shape[1:] if model.canvas else None).to("cpu")
        for d, size, image in zip(found, sizes, images, strict=True)
    ]


def zoom_of(model: Detector, size: Size) -> float:
    """Pixels that the detector sees to one of an image of `size` = (height, width)."""
    return model.tiling.zoom if model.tiling else model.resize.size(*size)[0] / size[0]


def warn_of_small(areas: Sequence[float], zooms: Sequence[float]) -> None:
    """areas: of objects, in square pixels of their images; zooms: of these (`zoom_of`)."""
    sides = [z * area**0.5 for area, z in zip(areas, zooms, strict=True) if z < 1]
    if sides and median(sides) < SMALL_SIDE:
        warnings.warn(
            f"most objects shrink below {SMALL_SIDE} pixels at the size that the detector sees and "
            "can hardly be found: give a larger short_side, or a tile (--short-side, --tile)",
            stacklevel=3,
        )


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
    boxes = clip_boxes_to_image(detections.boxes * scale, size)
    moved = Detections(
        boxes, detections.scores, detections.labels, size, detections.mask_probabilities
    )
    return moved[non_empty(boxes)]


def tile_windows(size: Size, tile: int, overlap: int = OVERLAP) -> list[Window]:
    """Windows of at most `tile` pixels a side that cover an image of `size` = (height, width),
    row by row: as few as share at least `overlap` pixels, evenly spread."""
    height, width = size
    return [
        (x, y, min(x + tile, width), min(y + tile, height))
        for y in _starts(height, tile, overlap)
        for x in _starts(width, tile, overlap)
    ]


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles along a side begin."""
    count = max(1, math.ceil((side - overlap) / (tile - overlap)))
    return [round(max(0, side - tile) * i / max(1, count - 1)) for i in range(count)]


def detect_tiles(model: Detector, image: Tensor, sampling: Sampling, index: int) -> Detections:
    """An image (3, H, W), tile by tile -> Detections in its pixels. index: its place in `sampling`.

    The image as a whole is looked at too: for what is larger than the overlap, and so may be whole
    in no tile.
    """
    tiling, size = model.tiling, (image.shape[1], image.shape[2])
    assert tiling is not None
    if sampling.sample is not None:
        raise ValueError("sample= is of one image's tokens: with tiles give a ratio")
    windows, found = tile_windows(size, tiling.side, tiling.overlap), []
    zoomed = None if tiling.zoom == 1 else round(tiling.zoom * min(tiling.side, *size))
    for start in range(0, len(windows), DEFAULT_BATCH):
        some = windows[start : start + DEFAULT_BATCH]
        found += _look(model, Resize(zoomed), image, some, sampling, index)
    if len(windows) > 1:
        windows.append((0, 0, size[1], size[0]))
        (large,) = _look(model, tiling.whole, image, windows[-1:], sampling, index)
        sides = large.boxes[:, 2:] - large.boxes[:, :2]
        found.append(large[sides.amax(1) > tiling.overlap])
    return merge_tiles(found, windows, size, model.roi_heads.nms_threshold)


def _look(
    model: Detector,
    resize: Resize,
    image: Tensor,
    windows: Sequence[Window],
    sampling: Sampling,
    index: int,
) -> list[Detections]:
    """One batch of windows of an image, resized -> Detections in pixels of the windows."""
    pieces = [image[:, y0:y1, x0:x1] for x0, y0, x1, y1 in windows]
    if sampling.generators is not None:
        sampling = sampling._replace(generators=[sampling.generators[index]] * len(pieces))
    plain = copy.copy(model)
    plain.tiling = None
    sizes = [(piece.shape[1], piece.shape[2]) for piece in pieces]
    return detect_originals(plain, [*map(resize, pieces)], sizes, sampling)


def merge_tiles(
    found: Sequence[Detections], windows: Sequence[Window], size: Size, threshold: float = 0.5
) -> Detections:
    """Detections of windows, in their pixels, -> those of the image of `size`, best score first.

    Of detections of one class with an IoU above `threshold` one stays. It is the surest, but where
    a border inside the image cuts a detection, its score counts half: the neighbour may have seen
    the whole object. And one that is cut goes where one that is not, of its class and surer, covers
    more than half of it.
    """
    corners = [own.boxes.new_tensor(w) for own, w in zip(found, windows, strict=True)]
    tile = torch.cat([c.expand(len(own), 4) for own, c in zip(found, corners, strict=True)])
    boxes = torch.cat([own.boxes for own in found]) + tile[:, :2].repeat(1, 2)
    masks = [own.mask_probabilities for own in found if own.mask_probabilities is not None]
    scores, labels = (torch.cat([getattr(own, n) for own in found]) for n in ("scores", "labels"))
    every = Detections(boxes, scores, labels, size, torch.cat(masks) if masks else None)
    inside = tile != tile.new_tensor([0, 0, size[1], size[0]])
    is_cut = (((boxes - tile).abs() < EDGE) & inside).any(1)
    rank = torch.where(is_cut, scores / 2, scores)
    kept = batched_nms(boxes, rank, labels, threshold)
    every, is_cut, rank = every[kept], is_cut[kept], rank[kept]
    parts, wholes = every[is_cut], every[~is_cut]
    low = torch.maximum(parts.boxes[:, None, :2], wholes.boxes[:, :2])  # (P, W, 2)
    high = torch.minimum(parts.boxes[:, None, 2:], wholes.boxes[:, 2:])
    covered = (high - low).clamp(min=0).prod(2) > 0.5 * box_area(parts.boxes)[:, None]
    same, surer = parts.labels[:, None] == wholes.labels, rank[is_cut, None] < rank[~is_cut]
    goes = is_cut.clone()
    goes[is_cut] = (covered & same & surer).any(1)
    every = every[~goes]
    return every[every.scores.argsort(descending=True, stable=True)]


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
