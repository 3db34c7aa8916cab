"""Figures of position tables: which places look alike, and what resizing a table does."""

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from mimdet.models.posembed import resize_table, sincos_table
from mimdet.models.sampling import Grid
from mimdet.viz.charts import axes_of
from mimdet.viz.pixels import heat
from mimdet.viz.style import (
    BLUE,
    FAINT,
    INK,
    NORMAL,
    VERMILLION,
    WIDTH,
    NotebookFigure,
    new_figure,
)


def similarity(places: Tensor, grid: Grid, place: int) -> Tensor:
    """Cosine of the position at `place` and every other: (1, h * w, D) -> (h, w), -1..1."""
    flat = F.normalize(places[0].detach().float().cpu(), dim=1)
    return (flat @ flat[place]).unflatten(0, grid)


def show_positions(
    table: Tensor, grid: Grid, at: tuple[float, float] = (0.5, 0.5)
) -> NotebookFigure:
    """A stored table beside the same table resized to `grid`, and both along one row.

    table: (1, 1 + side * side, D), as encoders and decoders store it (row 0 is the class token's).
    at: the place that is compared with all others, as shares of the height and width. The curves
    have distance as a share of the image's width: resizing keeps what is where in the picture, so
    both agree; a table made anew for the grid counts tokens instead. Raises ValueError for a table
    of another shape and a place outside.
    """
    side = round((table.shape[1] - 1) ** 0.5) if table.dim() == 3 else 0
    if table.dim() != 3 or len(table) != 1 or side * side + 1 != table.shape[1] or not side:
        raise ValueError(
            f"a position table of shape {tuple(table.shape)}: give (1, 1 + side * side, D)"
        )
    if not (0 <= at[0] < 1 and 0 <= at[1] < 1):
        raise ValueError(f"at={at}: give shares of the height and width, from 0 to below 1")
    table = table.detach().cpu()
    fig = new_figure(WIDTH, 3.2)
    stored = _panel(fig.add_subplot(1, 3, 1), table[:, 1:], (side, side), at, "stored")
    resized = _panel(fig.add_subplot(1, 3, 2), resize_table(table, grid), grid, at, "resized")
    ax = axes_of(fig, 3, 3, "along the row", "distance, share of the width", "cosine")
    column = int(at[1] * grid[1])
    fresh = sincos_table(table.shape[2], grid[1])[:, 1 : 1 + grid[1]]  # its first row
    again = similarity(fresh, (1, grid[1]), column)[0]
    lines = (
        (stored[int(at[0] * side)], FAINT, "-", "o", f"stored, {side} wide"),
        (resized[int(at[0] * grid[0])], VERMILLION, "-", None, f"resized, {grid[1]} wide"),
        (again, BLUE, "--", None, f"made anew, {grid[1]} wide"),
    )
    for values, colour, style, marker, name in lines:
        middle = int(at[1] * len(values))
        distance = (torch.arange(len(values)) - middle) / len(values)
        ax.plot(
            distance.numpy(),
            values.numpy(),
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=4,
            label=name,
        )
    ax.legend(fontsize=NORMAL, frameon=False, labelcolor=INK, loc="lower center")
    low = min(float(values.min()) for values, *_ in lines)
    ax.set_ylim(low - 0.45 * (1 - low), 1.03)  # room for the legend
    fig.set_layout_engine("constrained")
    fig.alt_text = (
        f"Cosine similarity of one place's position to all others: the stored table of {side} x "
        f"{side} places, the same resized to {grid[0]} x {grid[1]}, and both along a row, where "
        "the resized curve follows the stored one over the same share of the image."
    )
    return fig


def _panel(ax: Axes, places: Tensor, grid: Grid, at: tuple[float, float], name: str) -> Tensor:
    row, column = int(at[0] * grid[0]), int(at[1] * grid[1])
    values = similarity(places, grid, row * grid[1] + column)
    ax.imshow(heat(values, high=1.0), interpolation="nearest")
    ax.set_title(f"{name}: {grid[0]} × {grid[1]}", loc="left", fontsize=NORMAL, color=INK, pad=3)
    ax.set_axis_off()
    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=VERMILLION)
    frame.set_linewidth(1.8)
    ax.add_patch(frame)
    return values
