"""Figures of attention: what one token takes from the others, by head, by block, and rolled out."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from mimdet.models.sampling import PATCH, Sample, token_grid
from mimdet.viz.draw import UNSAMPLED, draw_image, heat, image_panels, image_size
from mimdet.viz.record import Recording, rollout
from mimdet.viz.style import VERMILLION, NotebookFigure

LITTLE, MUCH, UNKNOWN = 0.45, 0.9, 0.9
"""Opacity over the picture: of a share of nothing, of the largest share, of unsampled places."""

Place = int | tuple[int, int]


def show_attention(
    image: Tensor,
    seen: Recording,
    names: str | Sequence[str],
    query: Place,
    *,
    heads: bool = False,
) -> NotebookFigure:
    """What the token at `query` takes from every other: a panel per block, or per head of each.

    image: uint8 (3, H, W) as fed to the network, before padding, the first of its batch.
    names: recorded attention, or patterns of it. query: (row, column) on the grid, or row * width +
    column. heads: one panel a head instead of their mean. Bright is much: each panel has a scale of
    its own, from 0 to the share in its title (colours follow its square root, so that little is
    seen beside much). Light grey places were not sampled. Raises ValueError
    for a query that the encoder never saw, names that were not recorded, and an image that does not
    fit.
    """
    place = place_on(seen, query)
    chosen = chosen_names(seen, names)
    panels = []
    for name in chosen:
        rows = seen.row(name, place)  # (heads, N)
        title = block_title(seen, name, chosen)
        drawn = {f", head {i}": row for i, row in enumerate(rows)} if heads else {"": rows.mean(0)}
        for head, row in drawn.items():
            high = float(row.max())
            panels.append((f"{title}{head}: ≤ {share(high)}", seen.on_grid(name, row), high))
    fig = _over_picture(image, seen, chosen[0], place, panels)
    kind = "per head" if heads else "mean of the heads"
    fig.alt_text = (
        f"Attention of the token in {_in_words(place, seen)}, {kind}, over the picture: "
        f"{'; '.join(title for title, _, _ in panels)}."
    )
    return fig


def show_rollout(
    image: Tensor,
    seen: Recording,
    names: str | Sequence[str],
    query: Place,
) -> NotebookFigure:
    """How much of every token reaches the one at `query` after 1, 2, ... of the named blocks.

    Arguments as of `show_attention`; the blocks in the order they run, recorded without query=. The
    share a token keeps of itself is in the title; colours end at the largest share of another.
    """
    place = place_on(seen, query)
    chosen = chosen_names(seen, names)
    panels = []
    for count, name in enumerate(chosen, start=1):
        values, own = rolled_out(seen, chosen[:count], place)
        title = block_title(seen, chosen[0], chosen)
        if count > 1:
            title = f"{title.replace('block ', 'blocks ')}-{_number(name)}"
        panels.append((f"{title}: itself {share(own)}", values, largest_other(values, place)))
    fig = _over_picture(image, seen, chosen[0], place, panels)
    fig.alt_text = (
        f"Attention rolled out for the token in {_in_words(place, seen)}, over the picture: "
        f"{'; '.join(title for title, _, _ in panels)}."
    )
    return fig


# ------------------------------------------------------------------------------- numbers


def rolled_out(seen: Recording, names: Sequence[str], place: int) -> tuple[Tensor, float]:
    """Rollout through the named blocks: (h, w) shares of the token at `place`, and its own one."""
    position = seen.position(names[0], place)
    row = rollout([seen[name][0] for name in names])[position]
    own = float(row[position])
    return seen.on_grid(names[0], row[seen.prefix :]), own


def chosen_names(seen: Recording, names: str | Sequence[str]) -> list[str]:
    """The recorded attention that names or patterns mean, in the order it ran."""
    patterns = [names] if isinstance(names, str) else list(names)
    recorded = [name for name in seen if name in seen.attention]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in recorded):
            raise ValueError(f"no attention {pattern!r} was recorded; there is {recorded}")
    return [name for name in recorded if any(fnmatchcase(name, p) for p in patterns)]


def place_on(seen: Recording, query: Place) -> int:
    """(row, column) -> row * width + column, on the grid of the recording."""
    if isinstance(query, int):
        return query
    row, column = query
    h, w = seen.grid
    if not (0 <= row < h and 0 <= column < w):
        raise ValueError(f"query {query} is not on the grid of {h} x {w} tokens (row, column)")
    return row * w + column


def nearest_sampled(sample: Sample, place: int, index: int = 0) -> int:
    """The kept token that lies nearest to a place of the grid, for a query the encoder has seen."""
    kept = sample.keep[index]
    w = sample.grid[1]
    rows, columns = kept // w - place // w, kept % w - place % w
    return int(kept[(rows**2 + columns**2).argmin()])


def block_title(seen: Recording, name: str, among: Sequence[str] = ()) -> str:
    """backbone.encoder.blocks.3.attn -> `encoder block 3`, or `block 3` among blocks of one part,
    which the first panel names."""
    number = _number(name)
    if number is None:
        return name
    if among and len({other in seen.full_grid for other in among}) == 1:
        return f"block {number}"
    return f"{'decoder' if name in seen.full_grid else 'encoder'} block {number}"


def share(value: float) -> str:
    """0.0314 -> `3.1 %`."""
    return f"{100 * value:.{0 if value >= 0.1 else 1 if value >= 0.01 else 2}f} %"


def overlay(values: Tensor, high: float) -> NDArray[np.uint8]:
    """(h, w) shares -> uint8 (h, w, 4) to lay over a picture; NaN is an unsampled place.

    Colour and opacity grow with the square root of the share, up to `high`: one token often gets
    most, and the others would all look like nothing.
    """
    strength = (values.cpu() / max(high, 1e-12)).clamp(0, 1).sqrt()
    colours = heat(strength, low=0.0, high=1.0)
    opacity = torch.where(strength.isnan(), UNKNOWN, LITTLE + (MUCH - LITTLE) * strength).numpy()
    return np.dstack([colours, np.rint(255 * opacity).astype(np.uint8)])


def greyed(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> the same without colour: the heat above it has colours of its own."""
    return image.float().mean(0, keepdim=True).expand(3, -1, -1).to(torch.uint8)


def _number(name: str) -> str | None:
    found = re.search(r"blocks\.(\d+)", name)
    return found[1] if found else None


def largest_other(values: Tensor, place: int) -> float:
    """The largest share of a token other than the one at `place`."""
    flat = values.flatten().nan_to_num(0).clone()
    flat[place] = 0
    return float(flat.max())


def _in_words(place: int, seen: Recording) -> str:
    return f"row {place // seen.grid[1]}, column {place % seen.grid[1]}"


# ------------------------------------------------------------------------------- drawing


def _over_picture(
    image: Tensor,
    seen: Recording,
    name: str,
    place: int,
    panels: Sequence[tuple[str, Tensor, float]],
) -> NotebookFigure:
    """The picture with its unsampled tokens grey, then every panel laid over it.

    panels: title, (h, w) shares with NaN where no token was sampled, the share drawn brightest.
    """
    own, grid = token_grid(*image_size(image)), seen.grid
    if seen.patch == PATCH and (own[0] > grid[0] or own[1] > grid[1]):
        raise ValueError(
            f"an image of {image_size(image)} pixels has {own} tokens, the grid of the recording "
            f"only {grid}: give the image as it was fed to the network"
        )
    height, width = grid[0] * seen.patch, grid[1] * seen.patch  # with padding
    visible = torch.ones(grid)
    if name not in seen.full_grid and seen.sample is not None:
        visible = seen.on_grid(name, torch.ones(len(seen.sample.keep[0])))
    part = "decoder" if name in seen.full_grid else "encoder"
    layer = np.zeros((*grid, 4), np.uint8)
    layer[visible.isnan().numpy()] = (*UNSAMPLED, round(255 * UNKNOWN))
    total = grid[0] * grid[1]
    layers = [(image, f"{part}: {int(visible.nansum())} of {total} tokens", layer)]
    layers += [(greyed(image), title, overlay(values, high)) for title, values, high in panels]
    fig, axes = image_panels([(height, width)] * len(layers), columns=5)
    row, column = divmod(place, grid[1])
    corner = (column * seen.patch, row * seen.patch)
    for ax, (picture, title, layer) in zip(axes, layers, strict=True):
        draw_image(ax, picture, title)
        ax.imshow(layer, extent=(0, width, height, 0), interpolation="nearest")
        ax.set(xlim=(0, width), ylim=(height, 0))
        for colour, pen in (("white", 3.2), (VERMILLION, 1.8)):  # the query's frame
            frame = Rectangle(corner, seen.patch, seen.patch, fill=False, edgecolor=colour)
            frame.set_linewidth(pen)
            ax.add_patch(frame)
    return fig
