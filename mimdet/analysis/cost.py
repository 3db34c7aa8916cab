"""What a model costs: parameters, and multiply-adds at a given image size and share of tokens.

Nothing is computed: the model is built on PyTorch's meta device, which knows shapes only, and the
operations of one forward pass are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mimdet.config import Config
from mimdet.models.detector import Detector, autocast, build_detector
from mimdet.models.rcnn import Batch
from mimdet.models.roi_heads import BOX_POOL, MASK_POOL
from mimdet.models.sampling import Sampling
from mimdet.structures import padded_size


@dataclass(frozen=True, slots=True)
class Cost:
    """One image through one model, in evaluation."""

    name: str
    parameters: int
    """All of them, frozen position tables included."""
    trainable: int
    size: tuple[int, int]
    """(height, width) of the padded image in pixels."""
    sample_ratio: float
    """Share of the tokens the encoder sees."""
    backbone_and_neck: int
    """Multiply-adds of matrix products, convolutions and attention. Norms, activations, resizing,
    pooling and sorting are not counted, as usual."""
    heads: int
    """The same of RPN, box head on all proposals and mask head on all detections: the most that an
    image can ask for."""

    @property
    def detector(self) -> int:
        """Multiply-adds of everything."""
        return self.backbone_and_neck + self.heads


def cost_of(
    cfg: Config, size: tuple[int, int] = (800, 1280), sample_ratio: float | None = None
) -> Cost:
    """The cost of a configuration for an image of `size` = (height, width).

    The image is padded as the detector does it: to a multiple of 32, or to the whole canvas where
    it has one, whatever `size` is. sample_ratio: None = `backbone.sample_ratio_eval`.
    """
    ratio = cfg.backbone.sample_ratio_eval if sample_ratio is None else sample_ratio
    height, width = (cfg.detector.canvas,) * 2 if cfg.detector.canvas else padded_size(*size)
    with torch.device("meta"), torch.no_grad():
        model = build_detector(cfg).eval()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.requires_grad_(False)  # PyTorch's counter stumbles over a part that returns a weight
        images = torch.empty(1, 3, height, width)
        batch = Batch(images, [(height, width)], [])
        sampling = Sampling(sample_ratio)
        backbone = multiply_adds(lambda: model.neck(model.features(batch, sampling)))
        heads = multiply_adds(lambda: run_heads(model, height, width))
    return Cost(
        cfg.preset or cfg.backbone.kind,
        sum(p.numel() for p in model.parameters()),
        trainable,
        (height, width),
        ratio,
        backbone,
        heads,
    )


def multiply_adds(run: Callable[[], Any]) -> int:
    """Of whatever `run` does, half of what PyTorch counts: it takes one for two operations."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def transformer_cost(tokens: int, dim: int, depth: int) -> int:
    """Multiply-adds of `depth` ViT blocks of width `dim` on so many tokens, worked out by hand.

    Linear layers: 3 D^2 for query, key and value, D^2 behind the attention, 8 D^2 in the MLP, a
    token. Attention: D for each of K^2 scores, and D again for the weighted sum. Equal to what
    `multiply_adds` counts.
    """
    return depth * (12 * tokens * dim**2 + 2 * tokens**2 * dim)


def run_heads(model: Detector, height: int, width: int) -> None:
    """The heads on as many boxes as an image can have; which boxes they are makes no difference."""
    d = model.config.detector
    boxes, masks = d.rpn_post_nms[1], d.detections_per_image
    if model.training:
        boxes, masks = d.rois_per_image, d.rois_per_image // 4
    levels = [(-(-height // stride), -(-width // stride)) for stride in model.rpn.anchors.strides]
    model.rpn.head([torch.empty(1, d.channels, h, w) for h, w in levels])
    model.roi_heads.box_head(torch.empty(boxes, d.channels, BOX_POOL, BOX_POOL))
    if model.roi_heads.mask_head is not None:
        model.roi_heads.mask_head(torch.empty(masks, d.channels, MASK_POOL, MASK_POOL))


def cost_table(costs: Sequence[Cost]) -> str:
    """A markdown table, one row a cost. Numbers in millions (M) and 10^9 multiply-adds (G)."""
    rows = [
        {
            "model": cost.name,
            "parameters, M": f"{cost.parameters / 1e6:.2f}",
            "trainable, M": f"{cost.trainable / 1e6:.2f}",
            "image": f"{cost.size[0]}x{cost.size[1]}",
            "ratio": f"{cost.sample_ratio:g}",
            "backbone + neck, G": _giga(cost.backbone_and_neck),
            "detector, G": _giga(cost.detector),
        }
        for cost in costs
    ]
    return markdown_table(rows)


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Column -> cell of every row, as Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _giga(count: int) -> str:
    """Four digits at most: 905.2, 12.35, 0.412."""
    value = count / 1e9
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def kept_bytes(run: Callable[[], Any], module: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps while `run` computes, those of `module` left out.

    A storage counts once, however many tensors share it. What is recomputed is not kept.
    """
    own = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its place is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def training_bytes(cfg: Config, size: tuple[int, int] = (800, 1344)) -> tuple[int, int]:
    """What a training takes, by count: (bytes once, bytes per image of a micro-batch).

    Once: weights, gradients and AdamW's two moments, or Muon's one, in float32. An image of `size`
    = (height, width): what autograd keeps for the backward pass, in the configuration's precision
    (`auto` counts as fp32), without maps of attention, which fused kernels never store. Losses,
    workspace and what the allocator wastes come on top. Checkpointing "auto" is counted as "off".
    """
    with FakeTensorMode():  # a CPU's kernels, without their numbers
        model = build_detector(cfg).train()
        batch = Batch(torch.empty(1, 3, *size), [size], [])

        def run() -> None:
            with autocast(torch.device("cpu"), cfg.training.precision):
                model.neck(model.features(batch, Sampling()))
                run_heads(model, *size)

        kept = kept_bytes(run, model)
    of_each = 12 if cfg.training.optimizer == "muon" else 16
    return of_each * sum(p.numel() for p in model.parameters() if p.requires_grad), kept
