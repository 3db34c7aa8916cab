"""Second stage: classify, refine and segment every proposal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import batched_nms, roi_align

from mimdet.models.rcnn import (
    AlignedRoIPool,
    Batch,
    BoxCoder,
    Losses,
    at_least_float32,
    clip_boxes,
    match_boxes,
    subsample,
)
from mimdet.structures import Crops, Detections, Target

BOX_POOL = 7
MASK_POOL = 14
MASK_SIDE = 28


class SampledBoxes(NamedTuple):
    """Proposals of one image drawn for the loss, with their truth."""

    boxes: Tensor
    """(S, 4), objects first."""
    labels: Tensor
    """(S,) class, num_classes = background."""
    truth: Tensor
    """(S,) index of the true box each was matched to; meaningful for objects only."""


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
            sampled = [self.sample(p, t) for p, t in zip(proposals, targets, strict=True)]
        logits, deltas = self.box_head(self.box_pool(features, [s.boxes for s in sampled]))
        losses = self.box_losses(logits, deltas, sampled, targets)
        if self.mask_head is not None:
            losses["loss_mask"] = self.mask_loss(features, sampled, targets)
        return losses

    def sample(self, proposals: Tensor, target: Target) -> SampledBoxes:
        """Draw proposals for the loss, a quarter of them objects; the true boxes take part too."""
        boxes = torch.cat([proposals, target.boxes])
        index, label = match_boxes(target.boxes, boxes, 0.5, 0.5)
        positive, negative = subsample(
            (label == 1).nonzero()[:, 0],
            (label == 0).nonzero()[:, 0],
            self.rois_per_image,
            0.25,
            self.permute,
        )
        chosen = torch.cat([positive, negative])
        labels = torch.full_like(chosen, self.num_classes)
        labels[: len(positive)] = target.labels[index[positive]]
        return SampledBoxes(boxes[chosen], labels, index[chosen])

    def box_losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        sampled: Sequence[SampledBoxes],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        labels = torch.cat([s.labels for s in sampled])
        boxes = torch.cat([s.boxes for s in sampled])
        pairs = zip(sampled, targets, strict=True)
        matched = [t.boxes[s.truth] if len(t) else s.boxes for s, t in pairs]
        objects = (labels < self.num_classes).nonzero()[:, 0]
        wanted = self.coder.encode(boxes[objects], torch.cat(matched)[objects])
        loss_box = self.loss.boxes(deltas[objects, labels[objects]], wanted) / max(1, len(labels))
        loss_cls = self.loss.classes(logits, labels) if len(labels) else logits.sum()
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box}

    def mask_loss(
        self, features: Sequence[Tensor], sampled: Sequence[SampledBoxes], targets: Sequence[Target]
    ) -> Tensor:
        """Binary cross-entropy on the true class's map of the sampled objects only.

        The head runs without objects too: its norms wait for all processes (SyncedBatchNorm).
        """
        assert self.mask_head is not None
        boxes, labels, wanted = [], [], []
        for s, target in zip(sampled, targets, strict=True):
            objects = s.labels < self.num_classes
            boxes.append(s.boxes[objects])
            labels.append(s.labels[objects])
            if target.masks is None:
                raise ValueError("a target has no masks: set detector.masks=False for boxes only")
            wanted.append(mask_targets(target.masks, s.truth[objects], s.boxes[objects]))
        label = torch.cat(labels)
        logits = self.mask_head(self.mask_pool(features, boxes))
        own = logits[torch.arange(len(label), device=label.device), label]  # (N, 28, 28)
        if len(label) == 0:
            return own.sum()  # 0, with zero gradients for everything above; an empty mean is NaN
        return self.loss.masks(own, torch.cat(wanted).to(own.dtype))

    # -------------------------------------------------------------- evaluation

    def detect(
        self, batch: Batch, features: Sequence[Tensor], proposals: Sequence[Tensor]
    ) -> list[Detections]:
        """Detections in the pixels of the network input, best first."""
        logits, deltas = self.box_head(self.box_pool(features, proposals))
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
        boxes, scores = clip_boxes(boxes[finite], size), scores[finite]
        proposal, label = (scores > self.score_threshold).nonzero(as_tuple=True)
        boxes, scores = boxes[proposal, label], scores[proposal, label]
        kept = batched_nms(boxes, scores, label, self.nms_threshold)[: self.detections_per_image]
        return Detections(boxes[kept], scores[kept], label[kept], size)

    def add_masks(self, features: Sequence[Tensor], found: list[Detections]) -> list[Detections]:
        """The mask head sees the final boxes, and only those."""
        assert self.mask_head is not None
        label = torch.cat([d.labels for d in found])
        if len(label):
            logits = self.mask_head(self.mask_pool(features, [d.boxes for d in found]))
            own = logits[torch.arange(len(label), device=label.device), label].sigmoid().float()
        else:
            own = torch.zeros(0, MASK_SIDE, MASK_SIDE, device=label.device, dtype=torch.float32)
        for d, masks in zip(found, own.split([len(d) for d in found]), strict=True):
            d.mask_probabilities = masks
        return found


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
