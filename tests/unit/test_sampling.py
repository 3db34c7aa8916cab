"""Samplers, the two keep rules, and the movement of tokens against the original's way."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from mimdet.config import BackboneConfig
from mimdet.models.backbones import build_backbone
from mimdet.models.rcnn import padded_size
from mimdet.models.sampling import (
    SAMPLERS,
    Sample,
    Sampling,
    block_sampler,
    gather,
    grid_sampler,
    padded_places,
    random_sampler,
    scatter,
    select,
    token_grid,
)

SMALL = BackboneConfig(
    embed_dim=8, depth=1, num_heads=1, decoder_dim=8, decoder_depth=1, decoder_heads=1
)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def kept_map(scores: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """(h, w) bool: the tokens that `select` keeps of one unpadded image."""
    kept = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    kept[select([scores], [grid], grid, ratio).keep[0]] = True
    return kept.view(grid)


# ------------------------------------------------------------------ samplers


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_a_function_of_its_generator(name: str) -> None:
    tokens, grid = torch.zeros(54, 3), (6, 9)
    draws = [SAMPLERS[name](tokens, grid, seeded(seed)) for seed in (1, 1, 2, 3, 4)]
    assert draws[0].shape == (54,)
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], other) for other in draws[2:])
    assert SAMPLERS[name](tokens, grid, None).shape == (54,)


def test_random_sampler_has_no_favourite_place() -> None:
    grid, tokens, generator = (4, 5), torch.zeros(20, 1), seeded(0)
    counts = torch.zeros(grid)
    for _ in range(2000):
        counts += kept_map(random_sampler(tokens, grid, generator), grid, 0.25)
    assert counts.sum() == 2000 * 5
    assert (counts - 500).abs().max() < 100  # 5 standard deviations of a binomial


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_grid_sampler_keeps_every_second_row_and_column(rows: int, columns: int, seed: int) -> None:
    grid = (2 * rows, 2 * columns)
    scores = grid_sampler(torch.zeros(grid[0] * grid[1], 1), grid, seeded(seed))
    kept = kept_map(scores, grid, 0.25)
    row, column = kept.nonzero()[0].tolist()
    assert row < 2 and column < 2
    lattice = torch.zeros(grid, dtype=torch.bool)
    lattice[row::2, column::2] = True
    assert torch.equal(kept, lattice)


def test_grid_sampler_at_one_half_is_a_chessboard() -> None:
    kept = kept_map(grid_sampler(torch.zeros(48, 1), (6, 8), seeded(0)), (6, 8), 0.5)
    assert torch.equal(kept[:, 1:], ~kept[:, :-1]) and torch.equal(kept[1:], ~kept[:-1])


def test_grid_sampler_moves_from_draw_to_draw() -> None:
    corners = {
        tuple(
            kept_map(grid_sampler(torch.zeros(16, 1), (4, 4), seeded(s)), (4, 4), 0.25)
            .nonzero()[0]
            .tolist()
        )
        for s in range(30)
    }
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.05, 1), st.integers(0, 1000))
def test_block_sampler_keeps_whole_squares(
    height: int, width: int, ratio: float, seed: int
) -> None:
    scores = block_sampler(torch.zeros(height * width, 1), (height, width), seeded(seed))
    kept = kept_map(scores, (height, width), ratio)
    squares = [s for rows in kept.split(4, 0) for s in rows.split(4, 1)]
    partial = [s for s in squares if s.any() and not s.all()]
    assert len(partial) <= 1  # the one at the threshold


# ------------------------------------------------------------------ select


def test_must_hold_over_1000_pairs_of_image_sizes() -> None:
    """A sample holds valid places only, each once, and as many as the image's own size says."""
    backbone = build_backbone(SMALL)
    draw = random.Random(0)
    for _ in range(1000):
        sizes = [(draw.randint(1, 700), draw.randint(1, 700)) for _ in range(2)]
        ratio = draw.choice([0.25, 0.5, 0.75, 1.0, draw.uniform(0.001, 1)])
        height, width = padded_size(max(h for h, _ in sizes), max(w for _, w in sizes))
        grid = (height // 16, width // 16)
        tokens = torch.zeros(2, grid[0] * grid[1], 1)

        sample = backbone.draw(tokens, grid, sizes, Sampling(ratio))

        assert sample.grid == grid
        for keep, (h, w) in zip(sample.keep, sizes, strict=True):
            own_h, own_w = -(-h // 16), -(-w // 16)
            assert len(keep) == max(1, int(ratio * own_h * own_w))
            assert len(keep.unique()) == len(keep)
            rows, columns = keep // grid[1], keep % grid[1]
            assert rows.min() >= 0 and columns.min() >= 0
            assert rows.max() < own_h and columns.max() < own_w


def test_token_grid_counts_touched_tokens() -> None:
    assert token_grid(16, 17) == (1, 2)
    assert token_grid(800, 1333) == (50, 84)


def test_padded_places_by_hand() -> None:
    assert padded_places((2, 3), (4, 5), torch.device("cpu")).tolist() == [0, 1, 2, 5, 6, 7]


def test_select_keeps_the_highest_scores() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8])  # a 2 x 2 image in the corner of a 2 x 3 batch
    sample = select([scores], [(2, 2)], (2, 3), 0.5)
    assert sample.keep[0].tolist() == [1, 4]
    assert sample.grid == (2, 3)


def test_padded_rule_counts_the_padded_grid_and_puts_padding_last() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8])
    three_quarters = select([scores], [(2, 2)], (2, 4), 0.75, "padded").keep[0]
    assert three_quarters.tolist() == [1, 5, 4, 0, 2, 3]  # best first, then padding row by row
    half = select([scores], [(2, 2)], (2, 4), 0.5, "padded").keep[0]
    assert half.tolist() == [1, 5, 4, 0]


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.floats(0.01, 1)
)
def test_padded_rule(height: int, width: int, below: int, right: int, ratio: float) -> None:
    grid = (height + below, width + right)
    length = grid[0] * grid[1]
    keep = select([torch.rand(height * width)], [(height, width)], grid, ratio, "padded").keep[0]
    assert len(keep) == max(1, int(length * ratio))
    assert len(keep.unique()) == len(keep)
    valid = torch.isin(keep, padded_places((height, width), grid, keep.device))
    assert valid[: height * width].all() and not valid[height * width :].any()


def test_at_ratio_1_the_draw_does_not_matter() -> None:
    draws = [select([torch.rand(6)], [(2, 3)], (2, 4), 1.0).keep[0].tolist() for _ in range(5)]
    assert draws == [[0, 1, 2, 4, 5, 6]] * 5


def test_both_rules_agree_without_padding() -> None:
    scores = torch.rand(20)
    valid, padded = (
        select([scores], [(4, 5)], (4, 5), 0.3, keep).keep[0] for keep in ("valid", "padded")
    )
    assert torch.equal(valid, padded)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan")])
def test_a_ratio_outside_0_to_1(ratio: float) -> None:
    with pytest.raises(ValueError, match="share of tokens kept"):
        select([torch.rand(4)], [(2, 2)], (2, 2), ratio)


def test_an_unknown_keep_rule() -> None:
    with pytest.raises(ValueError, match="'valid' or 'padded'"):
        select([torch.rand(4)], [(2, 2)], (2, 2), 0.5, "own")  # type: ignore[arg-type]


# ------------------------------------------------------------------ gather and scatter


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.floats(0.01, 1))
def test_gather_and_scatter_are_the_originals_shuffle_bit_for_bit(
    images: int, height: int, width: int, ratio: float
) -> None:
    """Original: argsort noise, gather; concatenate dropped tokens, gather by ids_restore."""
    length = height * width
    noise = torch.rand(images, length)
    tokens, fill = torch.randn(images, length, 5), torch.randn(images, length, 5)
    count = max(1, int(length * ratio))
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)

    def reorder(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))

    kept_originally = reorder(tokens, shuffle[:, :count])
    encoded = torch.randn_like(kept_originally)
    dropped = reorder(fill, shuffle)[:, count:]
    filled_originally = reorder(torch.cat([encoded, dropped], dim=1), restore)

    grid = (height, width)
    chosen = torch.stack(select(list(-noise), [grid] * images, grid, ratio).keep)
    if count < length:
        assert torch.equal(chosen, shuffle[:, :count])
    else:  # nothing to choose: row by row, so that the result does not depend on the draw
        assert torch.equal(chosen, torch.arange(length).expand(images, -1))

    sample = Sample(list(shuffle[:, :count]), grid)
    assert torch.equal(torch.stack(gather(tokens, sample)), kept_originally)
    assert torch.equal(scatter(list(encoded), sample, fill), filled_originally)


def test_scatter_takes_different_counts_and_leaves_its_input_alone() -> None:
    sample = Sample([torch.tensor([2]), torch.tensor([1, 0])], (1, 3))
    fill = torch.zeros(2, 3, 1)
    result = scatter([torch.tensor([[5.0]]), torch.tensor([[6.0], [7.0]])], sample, fill)
    assert result[..., 0].tolist() == [[0, 0, 5], [7, 6, 0]]
    assert fill.abs().sum() == 0
    assert [g[:, 0].tolist() for g in gather(result, sample)] == [[5], [6, 7]]
