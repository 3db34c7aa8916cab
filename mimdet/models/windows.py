"""A plain ViT encoder with windowed attention: most blocks see a square of tokens, few see all."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimdet.models.posembed import resize_table, sincos_table
from mimdet.models.vit import Checkpointing, run_block, transformer_block

Grid = tuple[int, int]


def to_windows(x: Tensor, side: int) -> Tensor:
    """Tokens (B, h, w, D) -> windows (B * n, side * side, D), n of them an image, row by row.

    Where the grid does not divide by `side`, it is padded with zeros below and on the right.
    """
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, rows, side, columns, side, D)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(windows: Tensor, side: int, grid: Grid) -> Tensor:
    """Undo `to_windows`, without its padding: (B * n, side * side, D) -> (B, h, w, D)."""
    rows, columns = -(-grid[0] // side), -(-grid[1] // side)
    x = windows.unflatten(1, (side, side)).unflatten(0, (-1, rows, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, rows * side, columns * side, D)
    return x[:, : grid[0], : grid[1]]


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
        x = tokens.permute(0, 2, 3, 1) + self.positions(grid)  # (B, h, w, D)
        window = (self.window_size, self.window_size)
        window_bias, global_bias = self.window_bias(window), self.global_bias(grid)
        maps, start = [], 0
        for place in self.global_places:
            windows = to_windows(x, self.window_size)
            for i in range(start, place):
                windows = self.run(i, windows, window_bias)
            x = from_windows(windows, self.window_size, grid)
            x = self.run(place, x.flatten(1, 2), global_bias).unflatten(1, grid)
            maps.append(x.permute(0, 3, 1, 2))
            start = place + 1
        return maps

    def run(self, i: int, x: Tensor, bias: Tensor) -> Tensor:
        """Block i on sequences (N, L, D), with `bias` (heads, L, L) added to its attention."""
        return run_block(partial(self.blocks[i], attn_mask=bias), x, self.checkpointing)

    def positions(self, grid: Grid) -> Tensor:
        """(1, h, w, D)"""
        with_class_row = F.pad(self.pos_embed, (0, 0, 1, 0))  # as MAE stores its tables
        return resize_table(with_class_row, grid).unflatten(1, grid)


def moco_table(dim: int, side: int) -> Tensor:
    """MoCo v3's sine-cosine table, (1, side*side, dim): MAE's with rows and columns exchanged."""
    square = sincos_table(dim, side)[:, 1:].unflatten(1, (side, side))
    return square.transpose(1, 2).flatten(1, 2).contiguous()
