"""Region proposals: anchors scored and refined at every place of p2..p6."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import nms

from mimdet.models.rcnn import (
    AnchorGrid,
    Batch,
    BoxCoder,
    Losses,
    at_least_float32,
    draw_places,
    match_boxes,
    non_empty,
)
from mimdet.structures import Target


class Proposals(NamedTuple):
    """Candidate boxes of one image, best first."""

    boxes: Tensor
    """(P, 4) float32."""
    logits: Tensor
    """(P,) objectness."""


class RPN(nn.Module):
    """torchvision's head with detectron2's selection and losses.

    Differences to torchvision's RegionProposalNetwork: only the best `pre_nms` anchors of a level
    are decoded; ranking uses logits (their sigmoid saturates, which makes ties); the losses are
    divided by the fixed number of sampled anchors; plain L1.
    """

    def __init__(
        self,
        channels: int,
        anchors: AnchorGrid,
        convs: int = 2,
        pre_nms: tuple[int, int] = (2000, 1000),
        post_nms: tuple[int, int] = (1000, 1000),
        nms: float = 0.7,
        anchors_per_image: int = 256,
        loss: Losses | None = None,
        permute: Callable[..., Tensor] = torch.randperm,
    ) -> None:
        super().__init__()
        self.loss = loss or Losses()
        self.anchors = anchors
        self.head = RPNHead(channels, anchors.per_place, conv_depth=convs)
        self.coder = BoxCoder()
        self.pre_nms = pre_nms
        self.post_nms = post_nms
        self.nms = nms
        self.anchors_per_image = anchors_per_image
        self.permute = permute
        for module in self.head.modules():  # drawn by torchvision, and again: seeds of old runs
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)

    def forward(
        self, batch: Batch, features: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """features: one (B, C, h, w) per level -> proposals of each image, losses when training."""
        anchors = self.anchors([(f.shape[2], f.shape[3]) for f in features])
        logit_maps, delta_maps = self.head(list(features))
        logits = [
            at_least_float32(m.permute(0, 2, 3, 1).flatten(1))  # (B, h*w*A)
            for m in logit_maps
        ]
        deltas = [
            at_least_float32(m.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3))
            for m in delta_maps  # (B, h*w*A, 4)
        ]
        losses = {}
        if targets is not None:
            every_logit, every_delta = torch.cat(logits, 1), torch.cat(deltas, 1)
            losses = self.losses(torch.cat(anchors), every_logit, every_delta, targets)
        with torch.no_grad():
            proposals = self.propose(anchors, logits, deltas, batch.image_sizes)
        return proposals, losses

    def propose(
        self,
        anchors: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Proposals]:
        """The best boxes of each image after NMS within each level.

        Levels are moved apart, so that one NMS an image keeps within them, in float64, which holds
        the moved boxes exactly. The host waits twice, and once for each NMS.
        """
        phase = 0 if self.training else 1
        each_boxes, each_scores, each_level = [], [], []
        for level, (own, logit, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
            count = min(self.pre_nms[phase], logit.shape[1])
            top, index = logit.topk(count, dim=1)  # (B, count)
            chosen = delta.gather(1, index[..., None].expand(-1, -1, 4))
            decoded = self.coder.decode(own[index].flatten(0, 1), chosen.flatten(0, 1))
            each_boxes.append(decoded.unflatten(0, top.shape))
            each_scores.append(top)
            each_level.append(torch.full_like(index, level))
        boxes, scores = torch.cat(each_boxes, 1), torch.cat(each_scores, 1)  # (B, N, 4), (B, N)
        finite = boxes.isfinite().all(dim=2) & scores.isfinite()
        limit = boxes.new_tensor([(w, h, w, h) for h, w in image_sizes])
        boxes = torch.minimum(boxes.clamp(min=0), limit[:, None])
        usable = finite & non_empty(boxes)
        counts = usable.sum(1).tolist()
        chosen = usable.flatten().nonzero()[:, 0]
        boxes, scores = boxes.flatten(0, 1)[chosen], scores.flatten()[chosen]
        longest = max(max(size) for size in image_sizes)
        apart = torch.cat(each_level, 1).flatten()[chosen, None] * 2 * longest
        moved = (boxes.double() + apart).split(counts)
        pairs = zip(moved, scores.double().split(counts), strict=True)
        best = [nms(own, score, self.nms)[: self.post_nms[phase]] for own, score in pairs]
        columns = zip(boxes.split(counts), scores.split(counts), best, strict=True)
        return [Proposals(own[kept], score[kept]) for own, score, kept in columns]

    def losses(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """anchors (N, 4), logits (B, N), deltas (B, N, 4)."""
        truths = [target.boxes for target in targets]
        index, label = match_boxes(truths, anchors[None], 0.3, 0.7, rescue_best=True)
        drawn = draw_places(label, self.anchors_per_image, 0.5, self.permute)
        objects = torch.cat([own for own, _ in drawn])
        sampled = torch.cat([objects, *(others for _, others in drawn)])
        is_object = torch.arange(len(sampled), device=sampled.device) < len(objects)
        loss_cls = F.binary_cross_entropy_with_logits(
            logits.flatten()[sampled], is_object.to(logits.dtype), reduction="sum"
        )
        wanted = self.coder.encode(
            anchors[objects % len(anchors)], torch.cat(truths)[index.flatten()[objects]]
        )
        loss_loc = self.loss.boxes(deltas.flatten(0, 1)[objects], wanted)
        total = self.anchors_per_image * len(targets)
        return {"loss_rpn_cls": loss_cls / total, "loss_rpn_loc": loss_loc / total}
