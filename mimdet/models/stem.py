"""Image -> c2, c3 and the tokens: the compact convolutional stem, and the patchify ablation."""

from typing import NamedTuple

from torch import Tensor, nn


class StemFeatures(NamedTuple):
    """What every stem returns."""

    c2: Tensor
    """(B, D/4, H/4, W/4)"""
    c3: Tensor
    """(B, D/2, H/8, W/8)"""
    tokens: Tensor
    """(B, D, H/16, W/16): takes the place of MAE's 16x16 patch embedding."""


def _check_width(dim: int) -> None:
    if dim % 8:
        raise ValueError(f"embed_dim={dim}: the stem halves it three times; use a multiple of 8")


def conv_norm_gelu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Halve the resolution. GroupNorm with one group = layer norm over (C, H, W), eps as MAE's."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(1, out_channels, eps=1e-6),
        nn.GELU(),
    ]


class ConvStem(nn.Module):
    """The paper's stem: four stride-2 convolutions, D/8, D/4, D/2, D channels, random init.

    Stages 2 and 3 are the pyramid's c2 and c3 at no extra cost; stage 4 ends in a 1x1 convolution
    and gives the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        _check_width(dim)
        self.stage1 = nn.Sequential(*conv_norm_gelu(3, dim // 8))
        self.stage2 = nn.Sequential(*conv_norm_gelu(dim // 8, dim // 4))
        self.stage3 = nn.Sequential(*conv_norm_gelu(dim // 4, dim // 2))
        self.stage4 = nn.Sequential(*conv_norm_gelu(dim // 2, dim), nn.Conv2d(dim, dim, 1))

    def forward(self, images: Tensor) -> StemFeatures:
        """images: (B, 3, H, W) normalised, H and W multiples of 16."""
        c2 = self.stage2(self.stage1(images))
        c3 = self.stage3(c2)
        return StemFeatures(c2, c3, self.stage4(c3))


class PatchStem(nn.Module):
    """Ablation: ViT's 16x16 patchify; c2 and c3 must be won back by transposed convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        _check_width(dim)
        self.patchify = nn.Conv2d(3, dim, 16, stride=16)
        self.up_to_c3 = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        self.up_to_c2 = nn.Sequential(
            nn.GroupNorm(1, dim // 2, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2),
        )

    def forward(self, images: Tensor) -> StemFeatures:
        """images: (B, 3, H, W) normalised, H and W multiples of 16."""
        tokens = self.patchify(images)
        c3 = self.up_to_c3(tokens)
        return StemFeatures(self.up_to_c2(c3), c3, tokens)


STEMS: dict[str, type[nn.Module]] = {"conv": ConvStem, "patch": PatchStem}
