"""Figures of attention: what one token takes from the others, by head, by block, and rolled out."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor

from mimdet.images import to_rgb
from mimdet.models.sampling import Sample
from mimdet.viz.draw import UNSAMPLED, Picture, Pixels, heat, on_tokens, show_rows
from mimdet.viz.record import Recording, matching, rollout
from mimdet.viz.style import VERMILLION, NotebookFigure

LITTLE, MUCH, UNKNOWN = 0.45, 0.9, 0.9
"""Opacity over the picture: of a share of nothing, of the largest share, of unsampled places."""

Place = int | tuple[int, int]


def show_attention(
    image: Tensor, seen: Recording, names: str | Sequence[str], query: Place, *, heads: bool = False
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
    chosen = _chosen(seen, names)
    panels = []
    for name in chosen:
        rows = seen.row(name, place)  # (heads, N)
        drawn = {f", head {i}": row for i, row in enumerate(rows)} if heads else {"": rows.mean(0)}
        for head, row in drawn.items():
            high = float(row.max())
            title = f"{block_title(seen, name)}{head}: ≤ {share(high)}"
            panels.append((title, seen.on_grid(name, row), high))
    what = f"Attention, {'per head' if heads else 'mean of the heads'},"
    return _over_picture(what, image, seen, chosen[0], place, panels)


def show_rollout(
    image: Tensor, seen: Recording, names: str | Sequence[str], query: Place
) -> NotebookFigure:
    """How much of every token reaches the one at `query` after 1, 2, ... of the named blocks.

    Arguments as of `show_attention`; the blocks in the order they run, recorded without query=. The
    share a token keeps of itself is in the title; colours end at the largest share of another.
    """
    place = place_on(seen, query)
    chosen = _chosen(seen, names)
    panels = []
    for count in range(1, len(chosen) + 1):
        values, own = rolled_out(seen, chosen[:count], place)
        title = f"{block_title(seen, *chosen[:count])}: itself {share(own)}"
        panels.append((title, values, largest_other(values, place)))
    return _over_picture("Attention, rolled out,", image, seen, chosen[0], place, panels)


# ------------------------------------------------------------------------------- numbers


def rolled_out(seen: Recording, names: Sequence[str], place: int) -> tuple[Tensor, float]:
    """Rollout through the named blocks: (h, w) shares of the token at `place`, and its own one."""
    position = seen.position(names[0], place)
    row = rollout([seen[name][0] for name in names])[position]
    own = float(row[position])
    return seen.on_grid(names[0], row[seen.prefix :]), own


def place_on(seen: Recording, query: Place) -> int:
    """(row, column) -> row * width + column, on the grid of the recording."""
    if isinstance(query, int):
        return query
    row, column = query
    h, w = seen.grid
    if not (0 <= row < h and 0 <= column < w):
        raise ValueError(f"query {query} is not on the grid of {h} x {w} tokens (row, column)")
    return row * w + column


def nearest_sampled(sample: Sample, place: int) -> int:
    """The kept token of the first image that lies nearest to a place of the grid: a query that the
    encoder has seen."""
    kept = sample.keep[0]
    w = sample.grid[1]
    rows, columns = kept // w - place // w, kept % w - place % w
    return int(kept[(rows**2 + columns**2).argmin()])


def block_title(seen: Recording, *names: str) -> str:
    """backbone.encoder.blocks.3.attn -> `encoder block 3`, of several `encoder blocks 3-5`."""
    numbers = re.findall(r"blocks\.(\d+)", " ".join(names))
    if not numbers:
        return names[0]
    which = f"block {numbers[0]}" if len(names) == 1 else f"blocks {numbers[0]}-{numbers[-1]}"
    return f"{_part(seen, names[0])} {which}"


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
    return to_rgb(image).float().mean(0, keepdim=True).expand(3, -1, -1).to(torch.uint8)


def _chosen(seen: Recording, names: str | Sequence[str]) -> list[str]:
    recorded = [name for name in seen if name in seen.attention]
    return matching([names] if isinstance(names, str) else names, recorded)


def _part(seen: Recording, name: str) -> str:
    return "decoder" if name in seen.full_grid else "encoder"


def largest_other(values: Tensor, place: int) -> float:
    """The largest share of a token other than the one at `place`."""
    flat = values.flatten().nan_to_num(0).clone()
    flat[place] = 0
    return float(flat.max())


def laid_over(pixels: Pixels, layer: NDArray[np.uint8]) -> Pixels:
    """A picture under a layer of tokens, uint8 (h, w, 4)."""
    picture = Image.fromarray(pixels).convert("RGBA")
    tokens = Image.fromarray(layer).resize(picture.size, Image.Resampling.NEAREST)
    return np.asarray(Image.alpha_composite(picture, tokens).convert("RGB"))


def _over_picture(
    what: str,
    image: Tensor,
    seen: Recording,
    name: str,
    place: int,
    panels: Sequence[tuple[str, Tensor, float]],
) -> NotebookFigure:
    """The picture with its unsampled tokens grey, then every panel laid over it.

    panels: title, (h, w) shares with NaN where no token was sampled, the share drawn brightest.
    """
    h, w = seen.grid
    row, column = divmod(place, w)
    unsampled = panels[0][1].isnan().numpy()
    hidden = np.zeros((h, w, 4), np.uint8)
    hidden[unsampled] = (*UNSAMPLED, round(255 * UNKNOWN))
    title = f"{_part(seen, name)}: {(~unsampled).sum()} of {h * w} tokens"
    pictures = [Picture(title, laid_over(on_tokens(image, seen.grid, seen.patch), hidden))]
    grey = on_tokens(greyed(image), seen.grid, seen.patch)
    for title, values, high in panels:
        pictures.append(Picture(title, laid_over(grey, overlay(values, high))))
    what = f"{what} of the token in row {row}, column {column}, over the picture"
    return show_rows(what, [_framed(picture, row, column, h) for picture in pictures])


def _framed(picture: Picture, row: int, column: int, rows: int) -> Picture:
    """A picture of `rows` rows of tokens, a frame around one token."""
    pixels, side = picture.pixels, len(picture.pixels) // rows
    framed, y, x = pixels.copy(), row * side, column * side
    for edge, colour in ((max(pixels.shape) // 50, "white"), (max(pixels.shape) // 75, VERMILLION)):
        top, left = max(0, y - edge), max(0, x - edge)
        framed[top : y + side + edge, left : x + side + edge] = ImageColor.getrgb(colour)
    framed[y : y + side, x : x + side] = pixels[y : y + side, x : x + side]
    return picture._replace(pixels=framed)
