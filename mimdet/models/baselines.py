"""Backbones to compare with: ViTDet, Swin and ResNet, on timm's parts. They see every token."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer_sam import (
    VisionTransformerSAM,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from mimdet.config import BackboneConfig
from mimdet.models.batchnorm import SyncedBatchNorm
from mimdet.models.sampling import Grid
from mimdet.models.vit import (
    Checkpointing,
    init_like_mae,
    recompute,
    resize_table,
    run_block,
    sincos_table,
    transformer_block,
)


def global_block_places(depth: int, count: int) -> tuple[int, ...]:
    """Which blocks attend globally: the last one of each of `count` equal parts of the depth."""
    if count < 1 or depth % count:
        raise ValueError(
            f"global_blocks={count} cannot be spread evenly over depth={depth}: use a divisor"
        )
    part = depth // count
    return tuple(range(part - 1, depth, part))


def relative_index(h: int, w: int) -> Tensor:
    """Row of a bias table for every pair of places of a grid: (h*w, h*w) int64.

    The table has one row per offset (rows apart, columns apart), each from -(size-1) to size-1.
    """
    y, x = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
    rows = y[:, None] - y[None, :] + h - 1
    columns = x[:, None] - x[None, :] + w - 1
    return rows * (2 * w - 1) + columns


class RelativePositionBias(nn.Module):
    """A learnt number per head and offset between two tokens, added to their attention logit.

    The index is a stored buffer because the original's checkpoints hold it.
    """

    relative_position_index: Tensor

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.side = side
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_index(side, side))

    def forward(self, grid: Grid) -> Tensor:
        """-> (heads, h*w, h*w). For another grid than its own, the table is resized bicubically."""
        table = self.relative_position_bias_table.T  # (heads, offsets)
        index = self.relative_position_index
        if grid != (self.side, self.side):
            square = table.unflatten(1, (2 * self.side - 1, -1))[None]
            size = (2 * grid[0] - 1, 2 * grid[1] - 1)
            table = F.interpolate(square, size, mode="bicubic", align_corners=False)[0].flatten(1)
            index = relative_index(*grid).to(index.device)
        return table.index_select(1, index.flatten()).unflatten(1, index.shape)


class WindowedEncoder(nn.Module):
    """ViT blocks of which `global_blocks` see the whole grid; learnt absolute and relative places.

    All windowed blocks share one table of relative positions, all global ones another. No class
    token and no final norm.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        drop_path: float = 0.0,
        position_grid: int = 64,
        window_size: int = 16,
        global_blocks: int = 4,
        checkpointing: Checkpointing = "off",
    ) -> None:
        super().__init__()
        rates = [drop_path * block / max(1, depth - 1) for block in range(depth)]
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.pos_embed = nn.Parameter(moco_table(dim, position_grid))
        self.blocks = nn.ModuleList(transformer_block(dim, heads, r, norm) for r in rates)
        self.global_places = global_block_places(depth, global_blocks)
        self.window_size = window_size
        self.window_bias = RelativePositionBias(window_size, heads)
        self.global_bias = RelativePositionBias(position_grid, heads)
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(B, D, h, w) -> the map after each global block, (B, D, h, w) each.

        Whole blocks run on windows, so stochastic depth leaves out a window at a time there.
        """
        grid = (tokens.shape[2], tokens.shape[3])
        with_class_row = F.pad(self.pos_embed, (0, 0, 1, 0))  # as MAE stores its tables
        positions = resize_table(with_class_row, grid).unflatten(1, grid)  # (1, h, w, D)
        x = tokens.permute(0, 2, 3, 1) + positions  # (B, h, w, D)
        window = (self.window_size, self.window_size)
        window_bias, global_bias = self.window_bias(window), self.global_bias(grid)
        maps, start = [], 0
        for place in self.global_places:
            windows, padded = window_partition(x, self.window_size)
            windows = windows.flatten(1, 2)  # (B * n, side * side, D)
            for i in range(start, place):
                windows = self.run(i, windows, window_bias)
            x = window_unpartition(windows, self.window_size, grid, padded)
            x = self.run(place, x.flatten(1, 2), global_bias).unflatten(1, grid)
            maps.append(x.permute(0, 3, 1, 2))
            start = place + 1
        return maps

    def run(self, i: int, x: Tensor, bias: Tensor) -> Tensor:
        """Block i on sequences (N, L, D), with `bias` (heads, L, L) added to its attention."""
        return run_block(partial(self.blocks[i], attn_mask=bias), x, self.checkpointing)


def moco_table(dim: int, side: int) -> Tensor:
    """MoCo v3's sine-cosine table, (1, side*side, dim): MAE's with rows and columns exchanged."""
    square = sincos_table(dim, side)[:, 1:].unflatten(1, (side, side))
    return square.transpose(1, 2).flatten(1, 2).contiguous()


Sizes = Sequence[tuple[int, int]]
LEVELS = ("c2", "c3", "c4", "c5")
MAE_GRID = 14  # ViTDet keeps its absolute positions at the size of pre-training, 224 pixels


class Baseline(nn.Module):
    """A backbone that sees every token, of images (B, 3, H, W) alone; c2..c5, strides 4 to 32.

    H and W are multiples of 32. `image_sizes` belongs to the call of every backbone.
    """

    def __init__(self, channels: dict[str, int]) -> None:
        super().__init__()
        self.channels = channels


class ViTDet(Baseline):
    """Plain ViT of one scale (Li et al. 2022, arXiv 2203.16527): windows, a few global blocks,
    decomposed relative positions; c2, c3 and c5 are made from its last map alone. Absolute
    positions, 14 x 14 as MAE's, are learnt and resized to the image's grid on the fly.

    timm's VisionTransformerSAM is this encoder; its own neck is left out. With the neck
    `simple_pyramid` the detector is the paper's, with `fpn` its ablation.
    """

    def __init__(self, encoder: VisionTransformerSAM, checkpointing: Checkpointing = "off") -> None:
        dim = encoder.embed_dim
        super().__init__({"c2": dim // 4, "c3": dim // 2, "c4": dim, "c5": dim})
        self.encoder = encoder
        self.to_c2 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 2, 2, stride=2),
            LayerNorm2d(dim // 2, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2),
        )
        self.to_c3 = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        self.to_c5 = nn.MaxPool2d(2)
        self.checkpointing = checkpointing

    def forward(self, images: Tensor, image_sizes: Sizes = ()) -> dict[str, Tensor]:
        self.encoder.set_grad_checkpointing(recompute(self.checkpointing, images.device))
        c4 = self.encoder.forward_features(images)
        return {"c2": self.to_c2(c4), "c3": self.to_c3(c4), "c4": c4, "c5": self.to_c5(c4)}


class Swin(Baseline):
    """Swin Transformer (Liu et al. 2021, arXiv 2103.14030); each stage's map gets a LayerNorm."""

    def __init__(self, stages: SwinTransformer, checkpointing: Checkpointing = "off") -> None:
        channels = stage_widths(stages)
        super().__init__(channels)
        self.stages = stages
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels.values())
        self.checkpointing = checkpointing

    def forward(self, images: Tensor, image_sizes: Sizes = ()) -> dict[str, Tensor]:
        self.stages.set_grad_checkpointing(recompute(self.checkpointing, images.device))
        x = self.stages.patch_embed(images)  # (B, H/4, W/4, C): timm's Swin keeps channels last
        maps = {}
        for level, stage, norm in zip(LEVELS, self.stages.layers, self.norms, strict=True):
            x = stage(x)
            maps[level] = norm(x).permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        return maps


class PlainResNet(Baseline):
    """ResNet (He et al. 2016); BatchNorm learns, over all processes' batches."""

    def __init__(self, stages: ResNet) -> None:
        super().__init__(stage_widths(stages))
        self.stages = stages

    def forward(self, images: Tensor, image_sizes: Sizes = ()) -> dict[str, Tensor]:
        net: Any = self.stages
        x = net.maxpool(net.act1(net.bn1(net.conv1(images))))
        c2 = net.layer1(x)
        c3 = net.layer2(c2)
        c4 = net.layer3(c3)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": net.layer4(c4)}


def stage_widths(stages: Any) -> dict[str, int]:
    """Channels of c2..c5, from what timm says of a model's last four outputs."""
    return {level: i["num_chs"] for level, i in zip(LEVELS, stages.feature_info[-4:], strict=True)}


def build_vitdet(cfg: BackboneConfig) -> ViTDet:
    encoder: Any = VisionTransformerSAM(
        img_size=16 * cfg.position_grid,
        num_classes=0,
        embed_dim=cfg.embed_dim,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        drop_path_rate=cfg.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        use_rel_pos=True,
        window_size=cfg.window_size,
        global_attn_indexes=global_block_places(cfg.depth, cfg.global_blocks),
        neck_chans=0,
    )
    encoder.neck = nn.Identity()  # a norm before its classifier; the pyramid has its own
    encoder.apply(init_like_mae)
    table = sincos_table(cfg.embed_dim, MAE_GRID)[:, 1:]
    encoder.pos_embed = nn.Parameter(table.unflatten(1, (MAE_GRID, MAE_GRID)))
    return ViTDet(encoder, cfg.checkpointing)


def build_swin(cfg: BackboneConfig) -> Swin:
    stages = SwinTransformer(
        num_classes=0,
        embed_dim=cfg.embed_dim,
        depths=cfg.stage_depths,
        num_heads=tuple(cfg.num_heads * 2**stage for stage in range(len(LEVELS))),
        window_size=cfg.window_size,
        drop_path_rate=cfg.drop_path,
        strict_img_size=False,
        always_partition=True,  # else the last stage never shifts: at 224 pixels it is one window
    )
    stages.norm = nn.Identity()  # the one before a classifier
    return Swin(stages, cfg.checkpointing)


def build_resnet(cfg: BackboneConfig) -> PlainResNet:
    stages = ResNet(
        Bottleneck if cfg.bottleneck else BasicBlock,  # type: ignore[arg-type]
        cfg.stage_depths,
        num_classes=0,
        channels=tuple(cfg.embed_dim * 2**stage for stage in range(len(LEVELS))),
        norm_layer=lambda channels, **_: SyncedBatchNorm(channels),  # type: ignore[arg-type]
        drop_path_rate=cfg.drop_path,
    )
    return PlainResNet(stages)


class BenchmarkingViT(Baseline):
    """A plain ViT in four equal parts; what each part ends with is brought to one of c2..c5.

    As re-implemented by MIMDet's authors: windows of 16 tokens, one global block a part, biases of
    relative positions that start at zero, position table that starts as MoCo v3's and is learnt, no
    final norm. The early parts give the fine levels: transposed convolutions bring their stride
    16 to 4 and 8.
    """

    def __init__(self, dim: int, encoder: WindowedEncoder) -> None:
        super().__init__(dict.fromkeys(LEVELS, dim))
        self.stem = nn.Sequential(OrderedDict(patchify=nn.Conv2d(3, dim, 16, stride=16)))
        self.encoder = encoder
        to_c2 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            nn.GroupNorm(math.gcd(32, dim), dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
        )
        to_c3 = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.adaptor = nn.ModuleList([to_c2, to_c3, nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, images: Tensor, image_sizes: Sizes = ()) -> dict[str, Tensor]:
        maps = self.encoder(self.stem(images))  # of tokens (B, D, H/16, W/16)
        adapted = [adapt(m) for adapt, m in zip(self.adaptor, maps, strict=True)]
        return dict(zip(LEVELS, adapted, strict=True))


def build_benchmarking_vit(cfg: BackboneConfig) -> BenchmarkingViT:
    if cfg.global_blocks != len(LEVELS):
        raise ValueError(
            f"backbone.global_blocks={cfg.global_blocks}: each of c2..c5 comes from one global "
            "block of a Benchmarking ViT, so it must be 4"
        )
    encoder = WindowedEncoder(
        cfg.embed_dim,
        cfg.depth,
        cfg.num_heads,
        cfg.drop_path,
        cfg.position_grid,
        cfg.window_size,
        cfg.global_blocks,
        cfg.checkpointing,
    )
    encoder.apply(init_like_mae)
    return BenchmarkingViT(cfg.embed_dim, encoder)
