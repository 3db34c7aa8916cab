"""c2..c5 -> p2..p6."""

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

LEVELS = ("p2", "p3", "p4", "p5", "p6")


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
        return dict(zip(LEVELS, pyramid.values(), strict=True))


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
        return dict(zip(LEVELS, pyramid, strict=True))


NECKS: dict[str, type[nn.Module]] = {"fpn": FPN, "simple_pyramid": SimplePyramid}
