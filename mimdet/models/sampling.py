"""Which tokens the encoder sees.

A *sampler* scores the tokens of one image, `select` keeps the highest scores, and the result is a
`Sample`: a value that can be drawn, stored, edited by hand and passed to any forward. `Sampling`
says how to draw one. To try an idea, write a function like `random_sampler` and pass it to
`build_detector(cfg, sampler=it)`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

Grid = tuple[int, int]
Keep = Literal["valid", "padded"]
Sampler = Callable[[Tensor, Grid, Generator | None], Tensor]
"""`(tokens (L, D), grid (h, w) with h*w = L, generator) -> scores (L,)` of one unpadded image."""

PATCH = 16  # pixels of one token's side


class Sample(NamedTuple):
    """The kept tokens of every image of a batch."""

    keep: list[Tensor]
    """One (K_i,) int64 tensor per image, in any order: place = row * w + column on the batch's
    grid."""
    grid: Grid
    """(h, w) of the padded batch in tokens; L = h * w."""

    def to(self, device: torch.device) -> "Sample":
        return Sample([places.to(device) for places in self.keep], self.grid)

    def mask(self) -> Tensor:
        """(B, h, w) bool, on the CPU: True where the encoder sees the token."""
        kept = torch.zeros(len(self.keep), self.grid[0] * self.grid[1], dtype=torch.bool)
        for own, places in zip(kept, self.keep, strict=True):
            own[places.cpu()] = True
        return kept.unflatten(1, self.grid)


class Sampling(NamedTuple):
    """Which tokens a forward pass keeps: a ready sample, or how to draw one."""

    ratio: float | None = None
    """Share of the tokens kept; None = the backbone's own, of training or of evaluation."""
    keep: Keep | None = None
    """The rule that counts them (`select`); None = the backbone's own."""
    sample: Sample | None = None
    """Used as it is: nothing is drawn."""
    generators: Sequence[Generator] | None = None
    """One per image, so that the draw of an image does not depend on its batch."""


DEFAULT = Sampling()
"""The backbone's own ratio and rule, drawn from PyTorch's default generator."""


# ------------------------------------------------------------------ samplers: one image -> scores


def random_sampler(tokens: Tensor, grid: Grid, generator: Generator | None) -> Tensor:
    """The paper's choice: every token is equally likely."""
    return torch.rand(len(tokens), generator=generator, device=tokens.device)


def grid_sampler(tokens: Tensor, grid: Grid, generator: Generator | None) -> Tensor:
    """Evenly spread tokens at any ratio: the order of an ordered-dither matrix, shifted at random.

    At ratio 1/4 this keeps every second row and column.
    """
    shift = torch.randint(0, 1 << 16, (2,), generator=generator, device=tokens.device)
    rows = torch.arange(grid[0], device=tokens.device)[:, None] + shift[0]
    columns = torch.arange(grid[1], device=tokens.device)[None, :] + shift[1]
    rank = torch.zeros(grid, dtype=torch.long, device=tokens.device)
    for bit in range(max(1, (max(grid) - 1).bit_length())):
        row_bit = rows >> bit & 1
        column_bit = columns >> bit & 1
        rank = rank * 4 + 2 * (row_bit ^ column_bit) + row_bit  # low bits decide first
    return -rank.flatten().float()


def block_sampler(tokens: Tensor, grid: Grid, generator: Generator | None, side: int = 4) -> Tensor:
    """Whole squares of `side` x `side` tokens are kept or dropped together."""
    h, w = math.ceil(grid[0] / side), math.ceil(grid[1] / side)
    squares = torch.rand(h, w, generator=generator, device=tokens.device)
    scores = squares.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return scores[: grid[0], : grid[1]].flatten()


SAMPLERS: dict[str, Sampler] = {
    "random": random_sampler,
    "grid": grid_sampler,
    "block": block_sampler,
}


# ------------------------------------------------------------------ scores -> Sample


def draw(
    sampler: Sampler,
    tokens: Tensor,
    grids: Sequence[Grid],
    grid: Grid,
    ratio: float,
    keep: Keep = "valid",
    generators: Sequence[Generator] | None = None,
) -> Sample:
    """Score each image's own tokens with the sampler and keep the best ones.

    tokens: (B, L, D) on the padded `grid`; grids: of each image alone. ValueError for a sampler
    that does not return one score per token.
    """
    scores = []
    places = {own: padded_places(own, grid, tokens.device) for own in set(grids)}
    for i, own_grid in enumerate(grids):
        own = tokens[i, places[own_grid]].detach()  # (h_i * w_i, D)
        scores.append(sampler(own, own_grid, generators[i] if generators else None))
        if scores[-1].shape != (len(own),):
            raise ValueError(
                f"the sampler returned scores of shape {tuple(scores[-1].shape)} for a grid of "
                f"{own_grid}; it must return one score per token: ({len(own)},)"
            )
    return select(scores, grids, grid, ratio, keep)


def token_grid(height: int, width: int) -> Grid:
    """The tokens an unpadded image of height x width pixels touches."""
    return math.ceil(height / PATCH), math.ceil(width / PATCH)


def select(
    scores: Sequence[Tensor], grids: Sequence[Grid], grid: Grid, ratio: float, keep: Keep = "valid"
) -> Sample:
    """Keep the tokens with the highest scores.

    scores: per image (h_i * w_i,), on its own grid `grids[i]` = (h_i, w_i), inside the batch's
    padded `grid`. With keep="valid" image i keeps max(1, int(ratio * h_i * w_i)) of its own tokens,
    so its ratio does not depend on its neighbours in the batch. keep="padded" is the original's
    rule: every image keeps int(ratio * h * w) of the padded grid; its own tokens come first, then
    padding, row by row. The counts follow from sizes alone, so a GPU need not be waited for.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"sample ratio {ratio}: it is the share of tokens kept, in (0, 1]")
    if keep not in ("valid", "padded"):
        raise ValueError(f"keep={keep!r}: use 'valid' or 'padded' (the paper's code)")
    kept = []
    places_of = {own: padded_places(own, grid, scores[0].device) for own in set(grids)}
    for own_scores, own_grid in zip(scores, grids, strict=True):
        places = places_of[own_grid]
        if keep == "valid":
            count = max(1, int(ratio * len(places)))
            # Keeping everything is no choice: row by row, whatever the scores.
            everything = count == len(places)
            kept.append(places if everything else places[own_scores.topk(count).indices])
        else:
            padding = torch.ones(grid[0] * grid[1], dtype=torch.bool, device=places.device)
            padding[places] = False
            best_first = places[own_scores.argsort(descending=True)]
            order = torch.cat([best_first, padding.nonzero()[:, 0]])
            count = max(1, int(grid[0] * grid[1] * ratio))
            kept.append(order[:count] if count < len(order) else order.sort().values)
    return Sample(kept, grid)


def padded_places(own_grid: Grid, grid: Grid, device: torch.device) -> Tensor:
    """Index on the padded grid of every token of an image's own grid, row by row: (h_i * w_i,)."""
    rows = torch.arange(own_grid[0], device=device)[:, None] * grid[1]
    return (rows + torch.arange(own_grid[1], device=device)).flatten()


# ------------------------------------------------------------------ moving tokens


def gather(tokens: Tensor, sample: Sample) -> list[Tensor]:
    """(B, L, D) -> the kept tokens of each image, (K_i, D)."""
    flat = tokens.flatten(0, 1).index_select(0, _flat_places(sample))
    return list(flat.split([len(places) for places in sample.keep]))


def scatter(kept: Sequence[Tensor], sample: Sample, fill: Tensor) -> Tensor:
    """Put each image's (K_i, D) tokens back to their places in fill (B, L, D); the rest stays.

    Equal, bit for bit, to the original's concatenate-and-unshuffle by `ids_restore`.
    """
    values = torch.cat(list(kept)).to(fill.dtype)
    return fill.flatten(0, 1).index_copy(0, _flat_places(sample), values).view_as(fill)


def _flat_places(sample: Sample) -> Tensor:
    length = sample.grid[0] * sample.grid[1]
    return torch.cat([places + i * length for i, places in enumerate(sample.keep)])
