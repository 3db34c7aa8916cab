"""Samplers, the two keep rules, and the movement of tokens against the original's way."""

import random
from dataclasses import replace

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
    draw,
    gather,
    grid_sampler,
    padded_places,
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


@pytest.mark.parametrize("name", ["random", "grid", "block"])
def test_a_sampler_is_a_function_of_its_generator(name: str) -> None:
    tokens, grid = torch.zeros(54, 3), (6, 9)
    draws = [SAMPLERS[name](tokens, grid, seeded(seed)) for seed in (1, 1, 2, 3, 4)]
    assert draws[0].shape == (54,)
    assert torch.equal(draws[0], draws[1])
    assert any(not torch.equal(draws[0], other) for other in draws[2:])
    assert SAMPLERS[name](tokens, grid, None).shape == (54,)


@given(st.sampled_from([2, 4]), st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_grid_sampler_keeps_every_second_or_fourth_row_and_column(step, rows, columns, seed):
    grid = (step * rows, step * columns)
    scores = grid_sampler(torch.zeros(grid[0] * grid[1], 1), grid, seeded(seed))
    kept = kept_map(scores, grid, 1 / step**2)
    row, column = kept.nonzero()[0].tolist()
    assert row < step and column < step
    lattice = torch.zeros(grid, dtype=torch.bool)
    lattice[row::step, column::step] = True
    assert torch.equal(kept, lattice)


def test_grid_sampler_at_one_half_is_a_chessboard_and_moves_from_draw_to_draw() -> None:
    kept = kept_map(grid_sampler(torch.zeros(48, 1), (6, 8), seeded(0)), (6, 8), 0.5)
    assert torch.equal(kept[:, 1:], ~kept[:, :-1]) and torch.equal(kept[1:], ~kept[:-1])
    corners = set()
    for seed in range(30):
        kept = kept_map(grid_sampler(torch.zeros(16, 1), (4, 4), seeded(seed)), (4, 4), 0.25)
        corners.add(tuple(kept.nonzero()[0].tolist()))
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.05, 1), st.integers(0, 1000))
def test_block_sampler_keeps_whole_squares(height, width, ratio, seed) -> None:
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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_images_draw_does_not_depend_on_its_batch(sampler: str) -> None:
    backbone = build_backbone(replace(SMALL, sampler=sampler))
    sizes = [(128, 160), (96, 130)]  # the second image has padding below and on the right

    def draw(images: list[int]) -> list[list[int]]:
        sampling = Sampling(0.5, generators=[seeded(9 + i) for i in images])
        tokens = torch.zeros(len(images), 80, 1)
        sample = backbone.draw(tokens, (8, 10), [sizes[i] for i in images], sampling)
        return [places.tolist() for places in sample.keep]

    assert draw([0, 1]) == draw([0]) + draw([1])


def test_places_by_hand_and_the_highest_scores_are_kept() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8])  # a 2 x 2 image in the corner of a 2 x 3 batch
    sample = select([scores], [(2, 2)], (2, 3), 0.5)
    assert sample.keep[0].tolist() == [1, 4]
    assert sample.grid == (2, 3)
    assert sample.mask().tolist() == [[[False, True, False], [False, True, False]]]
    assert sample.to(torch.device("cpu")).mask().equal(sample.mask())
    with pytest.raises(ValueError, match=r"zip\(\)"):  # a grid for each image
        select([scores, scores], [(2, 2)], (2, 3), 0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 1\) for a grid of \(1, 2\)"):
        draw(lambda tokens, *_: tokens, torch.rand(1, 6, 1), [(1, 2)], (2, 3), 0.5)
    assert token_grid(16, 17) == (1, 2)  # tokens that are touched count
    assert token_grid(800, 1333) == (50, 84)
    assert padded_places((2, 3), (4, 5), torch.device("cpu")).tolist() == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize(("ratio", "count"), [(0.75, 6), (0.5, 4), (0.01, 1), (1.0, 8)])
def test_padded_rule_counts_the_padded_grid_and_puts_padding_last(ratio: float, count: int) -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8])
    kept = select([scores], [(2, 2)], (2, 4), ratio, "padded").keep[0]
    order = [1, 5, 4, 0, 2, 3][:count] if count < 8 else list(range(8))
    assert kept.tolist() == order  # best first, then padding; all: whatever the scores, in order


@pytest.mark.parametrize(
    ("ratio", "keep", "said"),
    [(r, "valid", "share of tokens kept") for r in (0.0, -0.5, 1.01, float("nan"))]
    + [(0.5, "own", "'valid' or 'padded'")],
)
def test_what_select_refuses(ratio: float, keep: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        select([torch.rand(4)], [(2, 2)], (2, 2), ratio, keep)  # type: ignore[arg-type]


# ------------------------------------------------------------------ gather and scatter


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.floats(0.01, 1))
def test_gather_and_scatter_are_the_originals_shuffle_bit_for_bit(images, height, width, ratio):
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
