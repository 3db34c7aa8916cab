"""Second stage: classify, refine and segment every proposal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

from mimdet.models.rcnn import (
    AlignedRoIPool,
    Batch,
    BoxCoder,
    Losses,
    at_least_float32,
    draw_places,
    match_boxes,
    rois_of,
)
from mimdet.structures import Crops, Detections, Target

BOX_POOL = 7
MASK_POOL = 14
MASK_SIDE = 28


class SampledBoxes(NamedTuple):
    """Proposals drawn for the loss with their truth: image after image, objects first in each."""

    rois: Tensor
    """(S, 5): which image, and the box."""
    labels: Tensor
    """(S,) class, num_classes = background."""
    objects: Tensor
    """(O,) places of the objects among them."""
    truth: Tensor
    """(O,) index of the true box that each object was matched to, in those of all images."""
    counts: list[int]
    """Objects of each image."""


class BoxHead(nn.Module):
    """Pooled box features -> class logits (background last) and one box per class."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        convs: int,
        fc_dim: int,
        norm: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.features = FastRCNNConvFCHead(
            (channels, BOX_POOL, BOX_POOL), [channels] * convs, [fc_dim], norm_layer=norm
        )
        self.cls_score = nn.Linear(fc_dim, num_classes + 1)
        self.bbox_pred = nn.Linear(fc_dim, num_classes * 4)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, 7, 7) -> logits (N, classes + 1) and deltas (N, classes, 4), not below float32."""
        features = self.features(pooled)
        deltas = at_least_float32(self.bbox_pred(features)).unflatten(1, (-1, 4))
        return at_least_float32(self.cls_score(features)), deltas


class MaskHead(nn.Module):
    """Pooled mask features -> one 28x28 logit map per class."""

    def __init__(
        self, channels: int, num_classes: int, convs: int, norm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.features = MaskRCNNHeads(channels, [channels] * convs, 1, norm_layer=norm)
        self.predictor = MaskRCNNPredictor(channels, channels, num_classes)
        nn.init.normal_(self.predictor.mask_fcn_logits.weight, std=0.001)
        nn.init.zeros_(self.predictor.mask_fcn_logits.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C, 14, 14) -> (N, classes, 28, 28), not below float32."""
        return at_least_float32(self.predictor(self.features(pooled)))


class RoIHeads(nn.Module):
    """Box and mask heads with detectron2's sampling, losses and test-time selection.

    Differences to torchvision's RoIHeads: background is the last class; plain L1 divided by all
    sampled boxes; mask targets are aligned and binary; no minimum box size.
    """

    def __init__(
        self,
        box_head: BoxHead,
        mask_head: MaskHead | None,
        strides: Sequence[int] = (4, 8, 16, 32),
        canonical_size: float = 224.0,
        rois_per_image: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        loss: Losses | None = None,
        permute: Callable[..., Tensor] = torch.randperm,
    ) -> None:
        super().__init__()
        self.loss = loss or Losses()
        self.box_head = box_head
        self.mask_head = mask_head
        self.box_pool = AlignedRoIPool(BOX_POOL, strides, canonical_size)
        self.mask_pool = AlignedRoIPool(MASK_POOL, strides, canonical_size)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.num_classes = box_head.cls_score.out_features - 1
        self.rois_per_image = rois_per_image
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image
        self.permute = permute

    # -------------------------------------------------------------- training

    def losses(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """features: p2..p5; proposals: per image (P_i, 4) -> loss_cls, loss_box_reg, loss_mask."""
        with torch.no_grad():
            sampled = self.sample(proposals, targets)
        logits, deltas = self.box_head(self.box_pool(features, sampled.rois))
        losses = self.box_losses(logits, deltas, sampled, targets)
        if self.mask_head is not None:
            losses["loss_mask"] = self.mask_loss(features, sampled, targets)
        return losses

    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> SampledBoxes:
        """Draw proposals for the loss, a quarter of them objects; the true boxes take part too."""
        truths = [target.boxes for target in targets]
        own = [torch.cat(pair) for pair in zip(proposals, truths, strict=True)]
        boxes = pad_sequence(own, batch_first=True)  # (B, N, 4)
        index, label = match_boxes(truths, boxes, 0.5, 0.5)
        counts = torch.tensor([len(b) for b in own])[:, None]
        label[(torch.arange(boxes.shape[1]) >= counts).to(label.device)] = -1  # padding
        drawn = draw_places(label, self.rois_per_image, 0.25, self.permute)
        chosen = torch.cat([torch.cat(pair) for pair in drawn])  # places in (B, N)
        kinds = [(len(objects), len(others)) for objects, others in drawn]
        is_object = torch.tensor([True, False]).repeat(len(kinds))
        is_object = is_object.repeat_interleave(torch.tensor(kinds).flatten())
        objects = is_object.nonzero()[:, 0].to(chosen.device)
        truth = index.flatten()[chosen[objects]]
        labels = torch.full_like(chosen, self.num_classes)
        labels[objects] = torch.cat([target.labels for target in targets])[truth]
        image = torch.div(chosen, boxes.shape[1], rounding_mode="floor")
        rois = torch.cat([image[:, None].to(boxes), boxes.flatten(0, 1)[chosen]], dim=1)
        return SampledBoxes(rois, labels, objects, truth, [own for own, _ in kinds])

    def box_losses(
        self, logits: Tensor, deltas: Tensor, sampled: SampledBoxes, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        rois, labels, objects = sampled.rois, sampled.labels, sampled.objects
        matched = torch.cat([target.boxes for target in targets])[sampled.truth]
        wanted = self.coder.encode(rois[objects, 1:], matched)
        loss_box = self.loss.boxes(deltas[objects, labels[objects]], wanted) / max(1, len(labels))
        loss_cls = self.loss.classes(logits, labels) if len(labels) else logits.sum()
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box}

    def mask_loss(
        self, features: Sequence[Tensor], sampled: SampledBoxes, targets: Sequence[Target]
    ) -> Tensor:
        """Binary cross-entropy on the true class's map of the sampled objects only.

        The head runs without objects too: its norms wait for all processes (SyncedBatchNorm).
        """
        assert self.mask_head is not None
        rois, label = sampled.rois[sampled.objects], sampled.labels[sampled.objects]
        logits = self.mask_head(self.mask_pool(features, rois))
        own = logits[torch.arange(len(label), device=label.device), label]  # (N, 28, 28)
        if len(label) == 0:
            return own.sum()  # 0, with zero gradients for everything above; an empty mean is NaN
        masks, wanted, first = masks_of(targets), [], 0
        counts = sampled.counts if len(masks) > 1 else [len(label)]
        parts = zip(masks, sampled.truth.split(counts), rois[:, 1:].split(counts), strict=True)
        for crops, truth, boxes in parts:
            wanted.append(mask_targets(crops, truth - first, boxes))
            first += len(crops)
        return self.loss.masks(own, torch.cat(wanted).to(own.dtype))

    # -------------------------------------------------------------- evaluation

    def detect(
        self, batch: Batch, features: Sequence[Tensor], proposals: Sequence[Tensor]
    ) -> list[Detections]:
        """Detections in the pixels of the network input, best first."""
        logits, deltas = self.box_head(self.box_pool(features, rois_of(proposals)))
        boxes = self.coder.decode(torch.cat(list(proposals)), deltas)  # (N, classes, 4)
        scores = logits.softmax(dim=1)[:, :-1].float()  # (N, classes)
        counts = [len(p) for p in proposals]
        found = [
            self.best_boxes(image_boxes, image_scores, size)
            for image_boxes, image_scores, size in zip(
                boxes.split(counts), scores.split(counts), batch.image_sizes, strict=True
            )
        ]
        return found if self.mask_head is None else self.add_masks(features, found)

    def best_boxes(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Threshold, then NMS within each class, then the best ones of the image."""
        finite = boxes.isfinite().all(dim=2).all(dim=1) & scores.isfinite().all(dim=1)
        boxes, scores = clip_boxes_to_image(boxes[finite], size), scores[finite]
        proposal, label = (scores > self.score_threshold).nonzero(as_tuple=True)
        boxes, scores = boxes[proposal, label], scores[proposal, label]
        kept = batched_nms(boxes, scores, label, self.nms_threshold)[: self.detections_per_image]
        return Detections(boxes[kept], scores[kept], label[kept], size)

    def add_masks(self, features: Sequence[Tensor], found: list[Detections]) -> list[Detections]:
        """The mask head sees the final boxes, and only those."""
        assert self.mask_head is not None
        label = torch.cat([d.labels for d in found])
        logits = self.mask_head(self.mask_pool(features, rois_of([d.boxes for d in found])))
        own = logits[torch.arange(len(label), device=label.device), label].sigmoid().float()
        for d, masks in zip(found, own.split([len(d) for d in found]), strict=True):
            d.mask_probabilities = masks
        return found


def masks_of(targets: Sequence[Target]) -> list[Crops]:
    """The masks of each image; joined to one where bitmaps are of one size, as crops are."""
    masks = [target.masks for target in targets if target.masks is not None]
    if len(masks) < len(targets):
        raise ValueError("a target has no masks: set detector.masks=False for boxes only")
    filled = [own for own in masks if len(own)]
    if len({own.bitmaps.shape[1:] for own in filled}) > 1:
        return masks
    return [Crops(torch.cat([m.boxes for m in filled]), torch.cat([m.bitmaps for m in filled]))]


def mask_targets(masks: Crops, index: Tensor, boxes: Tensor, side: int = MASK_SIDE) -> Tensor:
    """What true mask `index[i]` looks like inside boxes[i]: (N, side, side) float32, 0 or 1.

    One aligned roi_align serves box-local crops and full-size bitmaps alike: the box is expressed
    in the crop's own pixels.
    """
    origin = masks.boxes[index, :2].repeat(1, 2)
    extent = masks.boxes[index, 2:] - masks.boxes[index, :2]
    bitmaps = masks.bitmaps
    if len(bitmaps) > len(index):  # of 10,000 objects only those that are asked for become floats
        bitmaps, index = bitmaps[index], torch.arange(len(index), device=index.device)
    bitmaps = bitmaps.float()[:, None]  # (G, 1, M, M')
    cells = extent.new_tensor([bitmaps.shape[3], bitmaps.shape[2]])
    local = (boxes - origin) * (cells / extent).repeat(1, 2)
    rois = torch.cat([index[:, None].to(local.dtype), local], dim=1)
    return (roi_align(bitmaps, rois, side, 1.0, 0, aligned=True)[:, 0] >= 0.5).float()


class C4Classes(nn.Module):
    """In training alone, one more loss: c4 by itself must tell the classes (deep supervision).

    Without it a small detector reads classes from c2 and c3, and its c4 says little more than that
    something is there. The paper has no such loss.
    """

    def __init__(self, channels: int, num_classes: int, weight: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, num_classes)
        self.weight = weight

    def loss(self, c4: Tensor, targets: Sequence[Target]) -> Tensor:
        """c4: (B, C, H / 16, W / 16) -> scalar: `weight` times the mean cross-entropy of one linear
        layer on the mean of c4 in every true box."""
        boxes = [target.boxes for target in targets]
        labels = torch.cat([target.labels for target in targets])
        inside = roi_align(at_least_float32(c4), boxes, 1, 1 / 16, 2, True).flatten(1)
        logits = self.linear(self.norm(inside))
        return self.weight * (F.cross_entropy(logits, labels) if len(labels) else logits.sum())
