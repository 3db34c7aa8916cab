"""Multiply-adds, parameters and bytes kept, against sums done by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mimdet.analysis.cost import cost_of, cost_table, kept_bytes, run_heads, training_bytes
from mimdet.config import Config
from mimdet.models.detector import build_detector
from mimdet.models.rcnn import Batch
from mimdet.models.sampling import Sampling
from mimdet.presets import PRESETS


def by_hand(cfg: Config, h: int, w: int, kept: int) -> tuple[int, int]:
    """Backbone and neck, heads, of a mimdet with ConvStem on a grid of h x w tokens."""
    b, d = cfg.backbone, cfg.detector
    places = h * w
    dim, own = b.embed_dim, b.decoder_dim
    stem = 9 * (
        64 * places * 3 * dim // 8
        + 16 * places * dim // 8 * dim // 4
        + 4 * places * dim // 4 * dim // 2
        + places * dim // 2 * dim
    )
    stem += places * dim * dim  # the 1x1 convolution
    encoder = b.depth * (12 * kept * dim**2 + 2 * kept**2 * dim)
    decoder = kept * dim * own  # embed
    decoder += places * dim * own if b.decoder_fill == "stem" else 0  # its projection
    decoder += b.decoder_depth * (12 * places * own**2 + 2 * places**2 * own)
    c = d.channels
    sizes = [16 * places, 4 * places, places, places // 4]
    widths = [dim // 4, dim // 2, own, own]
    neck = sum(n * (width * c + 9 * c * c) for n, width in zip(sizes, widths, strict=True))

    everywhere = sum(sizes) + places // 16
    rpn = everywhere * (d.rpn_convs * 9 * c * c + c * 3 * 5)
    box = 49 * (d.box_convs * 9 * c * c + c * d.box_fc_dim)
    box += d.box_fc_dim * (d.num_classes + 1 + 4 * d.num_classes)
    mask = 196 * d.mask_convs * 9 * c * c + 784 * (c * c + c * d.num_classes)
    heads = rpn + d.rpn_post_nms[1] * box + d.detections_per_image * mask
    return stem + encoder + decoder + neck, heads


@pytest.mark.parametrize(("preset", "ratio"), [("tiny", 0.5), ("mimdet_base", 1.0)])
def test_mimdet_by_hand(preset: str, ratio: float) -> None:
    cfg = PRESETS[preset]()
    cost = cost_of(cfg, (250, 377), ratio)
    assert cost.size == (256, 384) and cost.sample_ratio == ratio
    # The image's own grid is 16 x 24 as well: 250 and 377 pixels touch all of its tokens.
    assert (cost.backbone_and_neck, cost.heads) == by_hand(cfg, 16, 24, int(ratio * 16 * 24))
    assert cost.detector == cost.backbone_and_neck + cost.heads


def test_parameters_canvas_masks_a_baseline_and_the_table() -> None:
    cost = cost_of(PRESETS["tiny"](), (64, 64))
    assert cost.parameters - cost.trainable == 257 * (128 + 96)  # two frozen position tables
    assert cost.sample_ratio == 1.0
    cfg = PRESETS["tiny_benchmarking_vit"]()
    assert cost_of(cfg, (64, 96)) == cost_of(cfg, (200, 100))  # the canvas is seen whole
    assert cost_of(cfg).size == (256, 256)
    cfg = PRESETS["tiny"]()
    cfg.detector.masks, cfg.backbone.decoder_fill = False, "stem"
    other = cost_of(cfg, (64, 64))
    assert other.heads < cost.heads
    assert other.backbone_and_neck - cost.backbone_and_neck == 16 * 128 * 96  # of 16 stem tokens
    with pytest.raises(ValueError, match="samples no tokens"):
        cost_of(PRESETS["tiny_swin"](), (64, 64), 0.5)
    rows = [cost_of(PRESETS[name](), (256, 256)) for name in ("tiny", "tiny_swin")]
    table = cost_table(rows).splitlines()
    assert len(table) == 2 + 2 and all(line.count("|") == 8 for line in table)
    assert table[2].startswith("| tiny | 1.90 | 1.84 | 256x256 | 1 | 0.504 | 1.39 |")


@pytest.mark.parametrize("kind", ["tiny_resnet", "tiny_swin"])
def test_twice_the_area_is_twice_the_cost(kind: str) -> None:
    """Convolutions and windowed attention are linear in the area where windows fit."""
    cfg = PRESETS[kind]()
    once, twice = (cost_of(cfg, size).backbone_and_neck for size in ((256, 256), (256, 512)))
    assert twice == 2 * once


def test_kept_bytes_by_hand() -> None:
    # A linear layer keeps its input, 4 x 8 numbers; the ReLU its output, 4 x 16; the second layer
    # the same tensor, which counts once. Weights do not count.
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    inputs = torch.rand(4, 8)
    assert kept_bytes(lambda: net(inputs), net) == 4 * (4 * 8 + 4 * 16)
    with torch.no_grad():
        assert kept_bytes(lambda: net(inputs), net) == 0
    # Recomputation keeps the inputs only.
    inputs.requires_grad_()
    assert kept_bytes(lambda: checkpoint(net, inputs, use_reentrant=False), net) <= 4 * 4 * 8


@pytest.mark.parametrize("recomputed", ["off", "on"])
def test_bytes_of_a_training(recomputed: str) -> None:
    """Counted without computing, against what autograd keeps of a true forward pass."""
    cfg = PRESETS["tiny"]()
    cfg.backbone.checkpointing = recomputed  # type: ignore[assignment]
    once, image = training_bytes(cfg, (128, 160))
    model = build_detector(cfg).train()
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert once == 12 * numbers  # weights, gradients, Muon's momentum
    cfg.training.optimizer = "adamw"
    assert training_bytes(cfg, (128, 160)) == (16 * numbers, image)
    batch = Batch(torch.rand(1, 3, 128, 160), [(128, 160)], [])

    def forward() -> None:
        model.neck(model.features(batch, Sampling()))
        run_heads(model, 128, 160)

    assert image == pytest.approx(kept_bytes(forward, model), rel=0.001)
