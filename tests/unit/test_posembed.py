"""Position tables: numbers by hand, axes, resizing, and MAE's own tables."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mimdet.models.vit import resize_table, sincos_table


def test_a_table_of_2x2_by_hand() -> None:
    # Four channels a coordinate: frequencies 1 and 1/100, sines before cosines.
    zero = [0.0, 0.0, 1.0, 1.0]
    one = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    expected = [
        [0.0] * 8,  # MAE's class token
        zero + zero,
        one + zero,  # row 0, column 1: the first half is the column
        zero + one,  # row 1, column 0
        one + one,
    ]
    table = sincos_table(8, 2)
    assert table.shape == (1, 5, 8) and table.dtype == torch.float32
    torch.testing.assert_close(table[0], torch.tensor(expected))


def test_first_half_is_the_column_second_half_the_row() -> None:
    square = sincos_table(16, 5)[0, 1:].view(5, 5, 16)
    columns, rows = square[..., :8], square[..., 8:]
    assert torch.equal(columns, columns[:1].expand_as(columns))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns[0], rows[:, 0])
    assert len(columns[0].unique(dim=0)) == 5  # every place has a code of its own


def test_a_width_that_cannot_be_split_in_four() -> None:
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        sincos_table(6, 2)


def test_the_stored_grid_is_returned_unchanged() -> None:
    table = torch.randn(1, 1 + 49, 8)
    assert torch.equal(resize_table(table, (7, 7)), table[:, 1:])


def test_resizing_keeps_axes_apart() -> None:
    """A value that depends on the row alone still does so on a wide grid, and the other way."""
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = torch.stack([row, column], dim=-1).view(1, 16, 2)
    table = torch.cat([torch.full((1, 1, 2), 1e6), places], dim=1)  # class row: must not leak in
    resized = resize_table(table, (3, 8)).view(3, 8, 2)

    assert resized.abs().max() < 4
    for i in range(3):
        torch.testing.assert_close(resized[i, :, 0], resized[i, :1, 0].expand(8))
    for j in range(8):
        torch.testing.assert_close(resized[:, j, 1], resized[:1, j, 1].expand(3))
    assert (resized[:, 0, 0].diff() > 0).all() and (resized[0, :, 1].diff() > 0).all()


@given(st.integers(1, 12), st.integers(1, 90), st.integers(1, 90))
def test_resizing_keeps_a_constant(side: int, height: int, width: int) -> None:
    resized = resize_table(torch.full((1, 1 + side * side, 4), 2.5), (height, width))
    assert resized.shape == (1, height * width, 4)
    torch.testing.assert_close(resized, torch.full_like(resized, 2.5))


def test_resizing_is_bicubic_without_antialiasing() -> None:
    """By hand: PyTorch's cubic kernel (a = -0.75) halfway between 0, 0, 1, 1 and its neighbours."""
    table = torch.tensor([0.0, 0, 1, 1]).repeat(4)[None, :, None]  # a step from column 1 to 2
    resized = resize_table(torch.cat([torch.zeros(1, 1, 1), table], dim=1), (4, 2))
    half = torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375])  # weights of the four neighbours
    left = (half * torch.tensor([0.0, 0, 0, 1])).sum()  # places -1, 0, 1, 2; the edge repeats
    right = (half * torch.tensor([0.0, 1, 1, 1])).sum()
    torch.testing.assert_close(resized.view(4, 2), torch.stack([left, right]).expand(4, 2))


def test_the_table_of_mae(golden: Path) -> None:
    """The reference holds MAE's table plus noise of 0.02; a wrong axis or frequency is off by 1."""
    weights = load_file(golden / "mae_small" / "mae_model.safetensors")
    for name in ("pos_embed", "decoder_pos_embed"):
        expected = weights[name]
        side = math.isqrt(expected.shape[1] - 1)
        ours = sincos_table(expected.shape[2], side)
        assert (ours - expected).abs().max() < 0.1
        assert (ours - expected).std().item() == pytest.approx(0.02, rel=0.05)


def test_resizing_as_the_official_loader(golden: Path) -> None:
    before = load_file(golden / "mae_to_mimdet" / "mae_full.safetensors")
    after = load_file(golden / "mae_to_mimdet" / "expected_bottom_up_after_load.safetensors")
    ours = resize_table(before["pos_embed"], (14, 14))
    torch.testing.assert_close(ours, after["encoder.pos_embed"][:, 1:], rtol=0, atol=1e-6)
