"""The detector parts torchvision lacks or does differently; each says what differs and why.

Released MIMDet weights were trained with detectron2, so where the two differ ours follows
detectron2.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from mimdet.models.batchnorm import SyncedBatchNorm
from mimdet.structures import padded_size

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# exp() of a size delta beyond this would make a box 62.5 times its anchor.
MAX_SIZE_DELTA = math.log(1000 / 16)


class Batch(NamedTuple):
    tensors: Tensor
    """(B, 3, H, W) float32, normalised; H and W multiples of 32."""
    image_sizes: list[tuple[int, int]]
    """(height, width) of each image before padding."""
    images: Sequence[Tensor]
    """The images themselves, uint8 (3, h, w)."""


def pad_and_normalise(images: Sequence[Tensor], model: nn.Module) -> Batch:
    """uint8 (3, h, w) RGB images -> one batch: normalised, then padded with zeros below and right.

    Device and dtype are those of the weights of `model`, which will take it.

    torchvision's transform would resize again, and without antialiasing; sizes are decided by the
    data pipeline, so here nothing is resized.
    """
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = padded_size(max(h for h, _ in sizes), max(w for _, w in sizes))
    weight = next(model.parameters())
    exact = at_least_float32(weight[:0])
    mean, std = exact.new_tensor([IMAGENET_MEAN, IMAGENET_STD])[..., None, None]
    batch = mean.expand(len(images), 3, height, width).clone()  # the mean becomes 0
    for canvas, image, (h, w) in zip(batch, images, sizes, strict=True):
        canvas[:, :h, :w].copy_(image, non_blocking=True)
    return Batch(batch.sub_(mean).div_(std).to(weight.dtype), sizes, images)


def to_uint8(images: Tensor) -> Tensor:
    """Normalised images (..., 3, H, W), as models take them -> uint8 on the CPU, to be shown."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])[..., None, None]
    return (images.float().cpu() * std + mean).clamp(0, 255).round().to(torch.uint8)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float64 stays (training.precision="fp64")."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_norm(name: str) -> Callable[[int], nn.Module]:
    """A norm layer for convolutional maps: batch, group or (channel-wise) layer norm."""
    if name == "BN":
        return SyncedBatchNorm
    if name == "GN":
        return lambda channels: nn.GroupNorm(math.gcd(32, channels), channels)
    if name == "LN":
        return partial(LayerNorm2d, eps=1e-6)
    raise ValueError(f"norm={name!r}: use 'BN', 'GN' or 'LN'")


class AnchorGrid(nn.Module):
    """Anchors of every level, centred on multiples of the stride (offset 0), float32.

    torchvision derives the stride as image // grid (61 instead of 64 on p6 at height 800), rounds
    the anchors and gives them the features' dtype; all three move boxes.
    """

    def __init__(
        self, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[int]
    ) -> None:
        super().__init__()
        if len(sizes) != len(strides):
            raise ValueError(
                f"{len(sizes)} anchor sizes for {len(strides)} pyramid levels: give one per level"
            )
        self.strides = tuple(strides)
        self.per_place = len(ratios)
        for i, size in enumerate(sizes):
            ratio = torch.tensor(ratios, dtype=torch.float64)
            width = (size**2 / ratio).sqrt()
            half = torch.stack([width, width * ratio], dim=1) / 2  # ratio = height / width
            cell = torch.cat([-half, half], dim=1).float()  # (A, 4) around the origin
            self.register_buffer(f"cell{i}", cell, persistent=False)

    def forward(self, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """(h, w) of each level -> its anchors (h * w * A, 4), ordered by row, column, A."""
        anchors = []
        for i, ((h, w), stride) in enumerate(zip(grids, self.strides, strict=True)):
            cell = self.get_buffer(f"cell{i}").float()  # a float64 model has converted it
            y = torch.arange(h, device=cell.device, dtype=torch.float32) * stride
            x = torch.arange(w, device=cell.device, dtype=torch.float32) * stride
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            shift = torch.stack([columns, rows, columns, rows], dim=-1).reshape(-1, 1, 4)
            anchors.append((shift + cell).reshape(-1, 4))
        return anchors


class BoxCoder(NamedTuple):
    """Boxes <-> (dx, dy, dw, dh) relative to reference boxes, always in float32."""

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def encode(self, reference: Tensor, boxes: Tensor) -> Tensor:
        """(N, 4), (N, 4) -> (N, 4)."""
        centre, size = _centre_and_size(reference)
        box_centre, box_size = _centre_and_size(boxes)
        weights = reference.new_tensor(self.weights)
        deltas = torch.cat([(box_centre - centre) / size, (box_size / size).log()], dim=-1)
        return deltas * weights

    def decode(self, reference: Tensor, deltas: Tensor) -> Tensor:
        """(N, 4) references and (N, ..., 4) deltas -> boxes shaped as the deltas."""
        deltas = deltas.float()
        deltas = deltas / deltas.new_tensor(self.weights)
        reference = reference.view(reference.shape[0], *[1] * (deltas.dim() - 2), 4)
        centre, size = _centre_and_size(reference)
        centre = centre + deltas[..., :2] * size
        half = deltas[..., 2:].clamp(max=MAX_SIZE_DELTA).exp() * size / 2
        return torch.cat([centre - half, centre + half], dim=-1)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + size / 2, size


class AlignedRoIPool(nn.Module):
    """Pools each box from the level that fits its size.

    torchvision's MultiScaleRoIAlign has no aligned=True (its samples sit half a pixel off) and a
    fixed sampling ratio of 2; MIMDet uses aligned sampling with an adaptive ratio.
    """

    def __init__(self, size: int, strides: Sequence[int], canonical_size: float = 224.0) -> None:
        super().__init__()
        self.size = size
        self.strides = tuple(strides)
        self.canonical_size = canonical_size

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """features: one (B, C, h, w) a stride; rois: (N, 5), see `rois_of` -> (N, C, s, s).

        The result is float32, or float64 where the features are. There may be no boxes at all.
        """
        dtype = torch.promote_types(features[0].dtype, torch.float32)
        level = self.level_of(rois[:, 1:])
        order = level.argsort(stable=True)
        counts = level.bincount(minlength=len(self.strides)).tolist()
        parts = zip(features, rois.to(dtype)[order].split(counts), self.strides, strict=True)
        pooled = torch.cat(
            [
                roi_align(f.to(dtype), own, self.size, 1 / stride, sampling_ratio=0, aligned=True)
                for f, own, stride in parts
            ]
        )
        return torch.empty_like(pooled).index_copy(0, order, pooled)

    def level_of(self, boxes: Tensor) -> Tensor:
        """Index of the level of each box: a canonical-size box belongs to the third one (p4)."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        level = torch.floor(2 + torch.log2(side / self.canonical_size + 1e-8))
        return level.clamp(0, len(self.strides) - 1).long()


def rois_of(boxes: Sequence[Tensor]) -> Tensor:
    """(N_i, 4) boxes of each image -> (sum N_i, 5): which image, and the box."""
    image = torch.cat([torch.full_like(own[:, :1], i) for i, own in enumerate(boxes)])
    return torch.cat([image, torch.cat(list(boxes))], dim=1)


MATCHED_WHOLE, MATCHED_AT_ONCE = 1 << 23, 1 << 18
"""Pairs of a true box and a candidate, of 40 bytes for a moment: more than the first are matched in
parts, on the CPU of the second size, because the C library keeps freed memory of larger ones."""


def match_boxes(
    truths: Sequence[Tensor], boxes: Tensor, low: float, high: float, rescue_best: bool = False
) -> tuple[Tensor, Tensor]:
    """Assign each candidate box the true box of its image that it overlaps most.

    truths: (G_i, 4) of each of B images; boxes: candidates (B, N, 4), or (1, N, 4) for all alike.
    Returns (index (B, N) of the true box in torch.cat(truths), label (B, N): 1 object, 0
    background, -1 ignored). IoU < low is background, >= high an object, between them ignored. With
    rescue_best the best candidates of every true box count as objects too, however small their
    overlap.
    """
    counts = [len(truth) for truth in truths]
    truth = torch.cat(list(truths))[:, None]  # (G, 1, 4)
    image = torch.arange(len(truths)).repeat_interleave(torch.tensor(counts)).to(boxes.device)
    pairs, parts = len(truth) * boxes.shape[1], boxes.shape[1]
    if pairs > MATCHED_WHOLE:
        parts = (MATCHED_WHOLE if boxes.is_cuda else MATCHED_AT_ONCE) // len(truth)
    candidates = boxes.split(max(1, parts), dim=1)

    numbers = range(len(candidates))

    @lru_cache(maxsize=1)  # the one table is kept; of several each is computed where it is used
    def table(i: int) -> Tensor:  # (G, n)
        part = candidates[i]
        return overlaps(truth, part[image] if len(part) > 1 else part)

    most = None
    if rescue_best:
        most = torch.stack([table(i).amax(1, keepdim=True) for i in numbers]).amax(0)
    columns = [match(table(i), counts, low, high, most) for i in numbers]
    index, label = (torch.cat(column, dim=1) for column in zip(*columns, strict=True))
    return index, label


def overlaps(truth: Tensor, boxes: Tensor) -> Tensor:
    """IoU of (G, 1, 4) with (G or 1, N, 4) -> (G, N); torchvision's knows no row of one's own."""
    low = torch.maximum(truth[..., :2], boxes[..., :2])
    high = torch.minimum(truth[..., 2:], boxes[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (truth, boxes)]
    return shared / (areas[0] + areas[1] - shared)


def match(
    overlap: Tensor, counts: list[int], low: float, high: float, most: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`match_boxes` of a table: overlap (G, N), of whose rows counts[i] belong to the i-th image.

    most: (G, 1), the overlap that makes a candidate an object, however small.
    """
    nothing = overlap.new_zeros(1, overlap.shape[1])
    found = [(own if len(own) else nothing).max(dim=0) for own in overlap.split(counts)]
    best, index = (torch.stack(column) for column in zip(*found, strict=True))
    first = torch.tensor([0, *counts[:-1]]).cumsum(0).to(index.device)
    index += first[:, None]
    label = (best >= high).long() - ((best >= low) & (best < high)).long()
    if most is not None:
        rescued = [own.any(0) for own in (overlap == most).split(counts)]
        label.masked_fill_(torch.stack(rescued), 1)
    return index, label


def draw_places(
    label: Tensor, total: int, share: float, permute: Callable[..., Tensor] = torch.randperm
) -> list[tuple[Tensor, Tensor]]:
    """Draw at most `total` places of each image, at most a `share` of objects, the rest background.

    label: (B, N), 1 object, 0 background. Returns (objects, background) of each image, places in
    label.flatten(). `permute(n, device=)` is a parameter so that stored draws can be reproduced.
    However many the images, the host waits three times.
    """
    kinds = [label == 1, label == 0]
    counts = torch.stack([kind.sum(1) for kind in kinds]).tolist()
    objects, background = (
        kind.flatten().nonzero()[:, 0].split(count)
        for kind, count in zip(kinds, counts, strict=True)
    )
    drawn = []
    for positive, negative in zip(objects, background, strict=True):
        chosen = permute(len(positive), device=label.device)[: int(total * share)]
        others = permute(len(negative), device=label.device)[: total - len(chosen)]
        drawn.append((positive[chosen], negative[others]))
    return drawn


def non_empty(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...) bool: boxes of positive width and height."""
    return (boxes[..., 2:] > boxes[..., :2]).all(-1)


class Losses:
    """What a detector is trained on. Override a method to try another loss.

    As detectron2: plain L1 for boxes, where torchvision's are smooth L1 with beta 1/9.
    """

    def boxes(self, deltas: Tensor, truth: Tensor) -> Tensor:
        """(N, 4) predicted and wanted offsets, of anchors and of proposals -> their summed loss."""
        return F.l1_loss(deltas, truth, reduction="sum")

    def classes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(N, classes + 1) and (N,), N > 0, the last class is background -> mean loss."""
        return F.cross_entropy(logits, labels)

    def masks(self, logits: Tensor, truth: Tensor) -> Tensor:
        """(N, 28, 28) of the true class and 0 or 1, N > 0 -> mean loss."""
        return F.binary_cross_entropy_with_logits(logits, truth)


LOSSES: dict[str, type[Losses]] = {"mask_rcnn": Losses}


# ------------------------------------------------------------------ necks: c2..c5 -> p2..p6

PYRAMID = ("p2", "p3", "p4", "p5", "p6")


class FPN(nn.Module):
    """Feature pyramid: 1x1 lateral and 3x3 output convolutions, each followed by a norm, no bias.

    torchvision's network as it is; only its level names become p2..p6 (strides 4..64). p6 is p5
    with every second row and column left out.
    """

    def __init__(
        self, in_channels: dict[str, int], channels: int, norm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.levels = tuple(in_channels)
        self.pyramid = FeaturePyramidNetwork(
            list(in_channels.values()), channels, LastLevelMaxPool(), norm_layer=norm
        )

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"c2": (B, C2, H/4, W/4), ...} -> {"p2": (B, channels, H/4, W/4), ..., "p6"}."""
        pyramid = self.pyramid(OrderedDict((level, maps[level]) for level in self.levels))
        return dict(zip(PYRAMID, pyramid.values(), strict=True))


class SimplePyramid(nn.Module):
    """ViTDet's neck (arXiv 2203.16527, section 3): every level by itself, none told of another.

    1x1 and 3x3 convolutions, each followed by a norm, no bias; p6 as in the FPN. The paper's
    strided convolutions before them, one map -> four scales, belong to the `vitdet` backbone.
    """

    def __init__(
        self, in_channels: dict[str, int], channels: int, norm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.levels = tuple(in_channels)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, channels, 1, bias=False),
                norm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                norm(channels),
            )
            for width in in_channels.values()
        )

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"c2": (B, C2, H/4, W/4), ...} -> {"p2": (B, channels, H/4, W/4), ..., "p6"}."""
        levels = zip(self.levels, self.branches, strict=True)
        pyramid = [branch(maps[level]) for level, branch in levels]
        pyramid.append(F.max_pool2d(pyramid[-1], 1, stride=2))
        return dict(zip(PYRAMID, pyramid, strict=True))


NECKS: dict[str, type[nn.Module]] = {"fpn": FPN, "simple_pyramid": SimplePyramid}
