"""Windows against masked attention over the whole grid, and relative positions counted by hand."""

import pytest
import torch
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor

from mimdet.models.baselines import (
    RelativePositionBias,
    WindowedEncoder,
    global_block_places,
    relative_index,
)
from mimdet.models.vit import transformer_block


def test_windowed_blocks_are_attention_masked_to_the_window() -> None:
    """Where windows fit the grid, a block on windows is the block on all tokens, with minus
    infinity between different windows and the window's bias within."""
    grid, side, heads = (4, 6), 2, 2
    torch.manual_seed(0)
    block = transformer_block(8, heads).eval()
    bias = RelativePositionBias(side, heads)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    x = torch.randn(3, *grid, 8)

    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    window = (rows // side * 100 + columns // side).flatten()
    place = (rows % side * side + columns % side).flatten()
    mask = bias((side, side))[:, place[:, None], place[None, :]]
    mask = mask.masked_fill(window[:, None] != window[None, :], float("-inf"))
    expected = block(x.flatten(1, 2), attn_mask=mask).unflatten(1, grid)

    windows, padded = window_partition(x, side)
    inside = block(windows.flatten(1, 2), attn_mask=bias((side, side)))
    ours = window_unpartition(inside, side, grid, padded)
    torch.testing.assert_close(ours, expected)


def test_relative_positions_by_hand() -> None:
    """Two rows of three: the index is (rows apart + 1) * 5 + columns apart + 2."""
    index = relative_index(2, 3)
    for a in range(6):
        for b in range(6):
            rows, columns = a // 3 - b // 3, a % 3 - b % 3
            assert index[a, b] == (rows + 1) * 5 + columns + 2


def test_bias_depends_on_the_offset_alone() -> None:
    bias = RelativePositionBias(3, 2)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    values = bias((3, 3))
    assert values.shape == (2, 9, 9)
    # one place to the right, wherever it starts: 1 -> 0, 2 -> 1, 5 -> 4, 8 -> 7
    assert torch.equal(values[:, 1, 0], values[:, 2, 1])
    assert torch.equal(values[:, 1, 0], values[:, 8, 7])
    assert not torch.equal(values[:, 1, 0], values[:, 0, 1])  # to the left is another number


@pytest.mark.parametrize("grid", [(5, 2), (2, 2), (7, 3)])
def test_bias_of_another_grid(grid: tuple[int, int]) -> None:
    """A table that rises with the rows apart still does after resizing; no offset stays at 0."""
    bias = RelativePositionBias(3, 1)
    rising = torch.arange(-2.0, 3).repeat_interleave(5)[:, None]  # 5 x 5 offsets
    bias.relative_position_bias_table.data = rising
    values = bias(grid)[0]
    h, w = grid
    assert values.shape == (h * w, h * w)
    torch.testing.assert_close(values.diagonal(), torch.zeros(h * w), atol=1e-6, rtol=0)
    down = values.unflatten(0, (h, w)).unflatten(2, (h, w))[:, 0, 0, 0]  # from the first place
    assert (down.diff() > 0).all()
    torch.testing.assert_close(values, -values.T)


def test_global_blocks_end_equal_parts() -> None:
    assert global_block_places(12, 4) == (2, 5, 8, 11)
    assert global_block_places(4, 4) == (0, 1, 2, 3)
    assert global_block_places(24, 4) == (5, 11, 17, 23)
    assert global_block_places(6, 1) == (5,)
    for depth, count in ((12, 5), (12, 0), (3, 4)):
        with pytest.raises(ValueError, match=f"global_blocks={count} cannot be spread evenly"):
            global_block_places(depth, count)


def reached(encoder: WindowedEncoder, grid: tuple[int, int]) -> list[Tensor]:
    """Which places of each map change when the first token does: one (h, w) bool a map."""
    x = torch.randn(1, 16, *grid, dtype=torch.float64)
    moved = x.clone()
    moved[:, :, 0, 0] += torch.randn(16)
    with torch.no_grad():
        pairs = zip(encoder(x), encoder(moved), strict=True)
        return [((a - b).abs() > 1e-9).any(dim=1)[0] for a, b in pairs]


def test_a_token_reaches_its_window_first_and_all_others_by_global_blocks() -> None:
    torch.manual_seed(0)
    encoder = WindowedEncoder(16, 4, 2, 0.0, 6, window_size=4, global_blocks=2).double().eval()
    assert all(m.all() for m in reached(encoder, (6, 6)))
    encoder.blocks[1] = torch.nn.Identity()  # the first global block
    encoder.blocks[1].forward = lambda x, attn_mask=None: x  # type: ignore[method-assign]
    first_map, second_map = reached(encoder, (6, 6))
    window = torch.zeros(6, 6, dtype=torch.bool)
    window[:4, :4] = True
    assert torch.equal(first_map, window)
    assert second_map.all()
