"""Backbones to compare with: ViTDet, Swin and ResNet, on timm's parts. They see every token."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Generator, Tensor, nn

from mimdet.config import BackboneConfig
from mimdet.models.batchnorm import SyncedBatchNorm
from mimdet.models.posembed import sincos_table
from mimdet.models.sampling import Keep, Sample
from mimdet.models.vit import Checkpointing, init_like_mae, small_gpu
from mimdet.models.windows import global_block_places

LEVELS = ("c2", "c3", "c4", "c5")
MAE_GRID = 14  # ViTDet keeps its absolute positions at the size of pre-training, 224 pixels


class Baseline(nn.Module):
    """A backbone that samples no tokens; a subclass writes `features`."""

    def __init__(self, channels: dict[str, int]) -> None:
        super().__init__()
        self.channels = channels

    def forward(
        self,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        *,
        sample: Sample | None = None,
        sample_ratio: float | None = None,
        keep: Keep | None = None,
        generators: Sequence[Generator] | None = None,
    ) -> dict[str, Tensor]:
        """images: (B, 3, H, W) normalised, H and W multiples of 32 -> c2..c5, strides 4 to 32.

        The keyword arguments are those of `MIMDetBackbone`; ValueError for a `sample`, or a
        `sample_ratio` below 1.
        """
        if sample is not None or (sample_ratio is not None and sample_ratio != 1):
            asked = "a sample" if sample is not None else f"sample_ratio={sample_ratio}"
            raise ValueError(
                f"{asked} was asked for, but a {type(self).__name__} backbone sees every token: "
                'leave it out, or use backbone.kind="mimdet"'
            )
        return self.features(images)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must say how images become c2..c5")


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

    def features(self, images: Tensor) -> dict[str, Tensor]:
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

    def features(self, images: Tensor) -> dict[str, Tensor]:
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

    def features(self, images: Tensor) -> dict[str, Tensor]:
        net: Any = self.stages
        x = net.maxpool(net.act1(net.bn1(net.conv1(images))))
        c2 = net.layer1(x)
        c3 = net.layer2(c2)
        c4 = net.layer3(c3)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": net.layer4(c4)}


def stage_widths(stages: Any) -> dict[str, int]:
    """Channels of c2..c5, from what timm says of a model's last four outputs."""
    return {level: i["num_chs"] for level, i in zip(LEVELS, stages.feature_info[-4:], strict=True)}


def recompute(mode: Checkpointing, device: torch.device) -> bool:
    """Whether timm's models shall recompute activations in this forward pass."""
    return torch.is_grad_enabled() and (mode == "on" or (mode == "auto" and small_gpu(device)))


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
        norm_layer=batch_norm,  # type: ignore[arg-type]
        drop_path_rate=cfg.drop_path,
    )
    return PlainResNet(stages)


def batch_norm(channels: int, **placement: Any) -> nn.Module:
    """For timm, which passes a device and dtype along since 1.0.21."""
    return SyncedBatchNorm(channels)
