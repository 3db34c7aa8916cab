"""Benchmarking ViT (Li et al. 2021, arXiv 2111.11429), the baseline of the MIMDet paper."""

import math

from torch import Tensor, nn

from mimdet.config import BackboneConfig
from mimdet.models.baselines import LEVELS, Baseline
from mimdet.models.vit import init_like_mae
from mimdet.models.windows import WindowedEncoder


class Patchify(nn.Module):
    """The ViT's own stem: one convolution of 16x16 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, dim, 16, stride=16)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H/16, W/16)."""
        return self.patchify(images)


class BenchmarkingViT(Baseline):
    """A plain ViT in four equal parts; what each part ends with is brought to one of c2..c5.

    As re-implemented by MIMDet's authors: windows of 16 tokens, one global block a part, biases of
    relative positions that start at zero, position table that starts as MoCo v3's and is learnt, no
    final norm. The early parts give the fine levels: transposed convolutions bring their stride
    16 to 4 and 8.
    """

    def __init__(self, dim: int, encoder: WindowedEncoder) -> None:
        super().__init__(dict.fromkeys(LEVELS, dim))
        self.stem = Patchify(dim)
        self.encoder = encoder
        to_c2 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            nn.GroupNorm(math.gcd(32, dim), dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
        )
        to_c3 = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.adaptor = nn.ModuleList([to_c2, to_c3, nn.Identity(), nn.MaxPool2d(2)])

    def features(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.encoder(self.stem(images))
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
