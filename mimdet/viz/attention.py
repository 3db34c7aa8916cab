"""Figures of attention: what one token takes from the others, by head, by block, and rolled out."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from matplotlib.axes import Axes
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
    index: int = 0,
    columns: int = 5,
) -> NotebookFigure:
    """What the token at `query` takes from every other: a panel per block, or per head of each.

    image: uint8 (3, H, W) as fed to the network, before padding, with place `index` in its batch.
    names: recorded attention, or patterns of it. query: (row, column) on the grid, or row * width +
    column. heads: one panel a head instead of their mean. Bright is much: each panel has a scale of
    its own, from 0 to the share in its title (colours follow its square root, so that little is
    seen beside much). Light grey places were not sampled. Raises ValueError
    for a query that the encoder never saw, names that were not recorded, and an image that does not
    fit.
    """
    place = place_on(seen, query)
    panels = []
    chosen = chosen_names(seen, names)
    for name in chosen:
        rows = seen.row(name, place, index)  # (heads, N)
        title = block_title(seen, name)
        if heads:
            panels += [(f"{title}, head {i}", name, row) for i, row in enumerate(rows)]
        else:
            panels.append((title, name, rows.mean(0)))
    fig, axes = _begin(image, seen, panels[0][1], place, index, len(panels), columns)
    said = []
    for ax, (title, name, row) in zip(axes, panels, strict=True):
        values = seen.on_grid(name, row, index)
        high = float(row.max())
        short = _shortened(title, seen, chosen)
        _draw_panel(ax, image, values, f"{short}: ≤ {share(high)}", seen, place, high)
        said.append(f"{title} at most {share(high)} {_where(values)}")
    kind = "per head" if heads else "mean of the heads"
    fig.alt_text = (
        f"Attention of the token in {_in_words(place, seen)}, {kind}, over the picture: "
        f"{'; '.join(said)}."
    )
    return fig


def show_rollout(
    image: Tensor,
    seen: Recording,
    names: str | Sequence[str],
    query: Place,
    *,
    index: int = 0,
    columns: int = 5,
) -> NotebookFigure:
    """How much of every token reaches the one at `query` after 1, 2, ... of the named blocks.

    Arguments as of `show_attention`; the blocks in the order they run, recorded without query=. The
    share a token keeps of itself stands in the title; colours end at the largest share of another.
    """
    place = place_on(seen, query)
    chosen = chosen_names(seen, names)
    maps = [seen[name][index] for name in chosen]
    fig, axes = _begin(image, seen, chosen[0], place, index, len(maps), columns)
    said = []
    for count, ax in enumerate(axes, start=1):
        values, own = rolled_out(seen, chosen[:count], place, index)
        title = block_title(seen, chosen[0])
        if count > 1:
            title = f"{title}-{_number(chosen[count - 1])}".replace(" block ", " blocks ")
        high = largest_other(values, place)
        short = _shortened(title, seen, chosen)
        _draw_panel(ax, image, values, f"{short}: itself {share(own)}", seen, place, high)
        said.append(f"{title}: {share(own)} of itself")
    fig.alt_text = (
        f"Attention rolled out for the token in {_in_words(place, seen)}, over the picture: "
        f"{'; '.join(said)}, the rest spread over the tokens of the panel."
    )
    return fig


# ------------------------------------------------------------------------------- numbers


def rolled_out(
    seen: Recording, names: Sequence[str], place: int, index: int = 0
) -> tuple[Tensor, float]:
    """Rollout through the named blocks: (h, w) shares of the token at `place`, and its own one."""
    position = seen.position(names[0], place, index)
    row = rollout([seen[name][index] for name in names])[position]
    own = float(row[position])
    return seen.on_grid(names[0], row[seen.prefix :], index), own


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


def block_title(seen: Recording, name: str) -> str:
    """backbone.encoder.blocks.3.attn -> `encoder block 3`."""
    number = _number(name)
    if number is None:
        return name
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


def _shortened(title: str, seen: Recording, names: Sequence[str]) -> str:
    """Without the part of the model that the first panel names, where there is only one."""
    if len({name in seen.full_grid for name in names}) > 1:
        return title
    return title.removeprefix("encoder ").removeprefix("decoder ")


def _number(name: str) -> str | None:
    found = re.search(r"blocks\.(\d+)", name)
    return found[1] if found else None


def largest_other(values: Tensor, place: int) -> float:
    """The largest share of a token other than the one at `place`."""
    flat = values.flatten().nan_to_num(0).clone()
    flat[place] = 0
    return float(flat.max())


def _where(values: Tensor) -> str:
    best = int(values.flatten().nan_to_num(-1).argmax())
    return f"(row {best // values.shape[1]}, column {best % values.shape[1]})"


def _in_words(place: int, seen: Recording) -> str:
    return f"row {place // seen.grid[1]}, column {place % seen.grid[1]}"


# ------------------------------------------------------------------------------- drawing


def _begin(
    image: Tensor, seen: Recording, name: str, place: int, index: int, count: int, columns: int
) -> tuple[NotebookFigure, list[Axes]]:
    """A figure with `count` empty panels after one of the picture and its unsampled tokens."""
    own, grid = token_grid(*image_size(image)), seen.grid
    if seen.patch == PATCH and (own[0] > grid[0] or own[1] > grid[1]):
        raise ValueError(
            f"an image of {image_size(image)} pixels has {own} tokens, the grid of the recording "
            f"only {grid}: give the image as it was fed to the network"
        )
    fig, axes = image_panels([_canvas(seen)] * (count + 1), min(columns, count + 1))
    total = grid[0] * grid[1]
    visible = torch.ones(total)
    if name not in seen.full_grid and seen.sample is not None:
        visible = seen.on_grid(name, torch.ones(len(seen.sample.keep[index])), index).flatten()
    part = "decoder" if name in seen.full_grid else "encoder"
    draw_image(axes[0], image, f"{part}: {int(visible.nansum())} of {total} tokens")
    layer = np.zeros((*grid, 4), np.uint8)
    layer[visible.isnan().view(grid).numpy()] = (*UNSAMPLED, round(255 * UNKNOWN))
    _lay_over(axes[0], layer, seen)
    _mark(axes[0], place, seen)
    return fig, axes[1:]


def _draw_panel(
    ax: Axes, image: Tensor, values: Tensor, title: str, seen: Recording, place: int, high: float
) -> None:
    draw_image(ax, greyed(image), title)
    _lay_over(ax, overlay(values, high), seen)
    _mark(ax, place, seen)


def _lay_over(ax: Axes, layer: NDArray[np.uint8], seen: Recording) -> None:
    height, width = _canvas(seen)
    ax.imshow(layer, extent=(0, width, height, 0), interpolation="nearest")
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)


def _mark(ax: Axes, place: int, seen: Recording) -> None:
    """A frame around the token at `place`, white outside."""
    row, column = divmod(place, seen.grid[1])
    corner = (column * seen.patch, row * seen.patch)
    for colour, width in (("white", 3.2), (VERMILLION, 1.8)):
        frame = Rectangle(
            corner, seen.patch, seen.patch, fill=False, edgecolor=colour, linewidth=width
        )
        ax.add_patch(frame)


def _canvas(seen: Recording) -> tuple[int, int]:
    """(height, width) of the padded picture, pixels."""
    return seen.grid[0] * seen.patch, seen.grid[1] * seen.patch
