"""Fixed 2-D sine-cosine position tables, and their resizing to any grid."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_table(dim: int, side: int) -> Tensor:
    """MAE's position table of a square grid: (1, 1 + side*side, dim) float32.

    The first half of the channels encodes the column, the second half the row. Row 0 belongs to
    MAE's class token; MIMDet has none, but the released checkpoints store the row, so we do too.
    """
    if dim % 4:
        raise ValueError(f"position tables need a width divisible by 4, not {dim}")
    steps = torch.arange(side, dtype=torch.float64)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    places = torch.cat([_sincos(columns, dim // 2), _sincos(rows, dim // 2)], dim=1)  # (side², dim)
    return torch.cat([torch.zeros(1, dim), places.float()])[None]


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """One coordinate of every place -> (places, dim): sines, then cosines, of falling frequency."""
    frequency = 1 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = positions.flatten()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def resize_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A stored table (1, 1 + side*side, D) -> the positions of `grid` = (h, w): (1, h*w, D).

    Bicubic without antialiasing, as the original does on every forward; the stored size itself is
    returned unchanged.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    places = table[:, 1:]
    if grid == (side, side):
        return places
    square = places.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
    resized = F.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)  # (1, h*w, D)
