"""One look for every figure: palette, sizes, axes, alt text, files.

No pyplot: it keeps every figure in a global list and is not safe in the threads that notebook
callbacks run in. Nothing here changes matplotlib's settings either; what differs from its defaults
is set on the artists themselves.
"""

import io
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mimdet.files import write_file

# Okabe and Ito, "Color Universal Design": told apart with any kind of colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
PALETTE = (ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE)
"""Colours of classes; the eighth class has the first colour again (its name tells them apart)."""
SERIES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
"""Colours of models or settings that stand side by side; the seventh has the first one again."""

INK, FAINT = "#333333", "#999999"
WIDTH = 9.6
"""Inches of the widest figure: 960 pixels on the screen, the width of a notebook's output."""
DPI = 100
SMALL, NORMAL, LARGE = 7.0, 8.5, 10.0
"""Font sizes, points: marks on images; axes and legends; titles."""


class NotebookFigure(Figure):
    """A matplotlib figure that a notebook shows without pyplot, with its alt text."""

    alt_text: str = ""
    """What the figure shows, in words, for people who do not see it."""
    has_photographs: bool = False
    """Shown as JPEG: as PNG, ten images would take most of what a stored notebook may weigh."""

    def finish(self, alt_text: str) -> "NotebookFigure":
        """Lay out axes so that no text is cut off, and say what they show; returns the figure."""
        self.set_layout_engine("constrained")
        self.alt_text = alt_text
        return self

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(data, metadata) for IPython's display; web pages made of a notebook use the alt text."""
        kind, options = "png", {}
        if self.has_photographs:
            kind, options = "jpeg", {"quality": 90, "subsampling": 0}  # text stays sharp
        picture = io.BytesIO()
        self.savefig(picture, format=kind, pil_kwargs=options)
        data = {f"image/{kind}": picture.getvalue(), "text/plain": self.alt_text}
        return data, {f"image/{kind}": {"alt": self.alt_text}}


def new_figure(width: float, height: float) -> NotebookFigure:
    """An empty figure of width x height inches that belongs to no global list."""
    fig = NotebookFigure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def axes_of(
    fig: Figure, position: int, count: int, title: str, x: str, y: str, lines: Any = "y"
) -> Axes:
    """Axes number `position` of `count` in a row, as `plain_axes`."""
    return plain_axes(fig.add_subplot(1, count, position), title, x, y, lines)


def plain_axes(ax: Axes, title: str = "", x: str = "", y: str = "", lines: Any = "y") -> Axes:
    """Two spines, labels, faint lines at the ticks of the axis `lines`: "x", "y", "both", ""."""
    write_title(ax, title, LARGE)
    ax.set_xlabel(x, fontsize=NORMAL, color=INK)
    ax.set_ylabel(y, fontsize=NORMAL, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=NORMAL, color=FAINT, labelcolor=INK)
    if lines:
        ax.grid(axis=lines, color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def write_title(ax: Axes, title: str, size: float = NORMAL) -> None:
    """Flush left above the axes."""
    ax.set_title(title, loc="left", fontsize=size, color=INK, pad=3 if size < LARGE else None)


def add_legend(owner: Axes | Figure, **options: Any) -> None:
    """A legend without a frame, in our letters."""
    legend = owner.legend(fontsize=NORMAL, frameon=False, labelcolor=INK, **options)
    legend.get_title().set(fontsize=NORMAL, color=INK)


def write_beside(
    ax: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **options: Any
) -> None:
    """A few words beside a point of the axes; offset: points to the right and up."""
    right, up = offset
    options.setdefault("ha", "left" if right > 0 else "right" if right else "center")
    options.setdefault("va", "bottom" if up > 0 else "top" if up else "center")
    options.setdefault("fontsize", NORMAL)
    options.setdefault("color", INK)
    ax.annotate(text, point, xytext=offset, textcoords="offset points", **options)


def plural(number: int, noun: str, ending: str = "s") -> str:
    """3, "image" -> `3 images`."""
    return f"{number} {noun}" + ("" if number == 1 else ending)


def save_figure(fig: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write `path`.png (twice the screen's resolution) and `path`.svg, each complete or not at all.

    An ending .png or .svg of `path` is ignored; folders are made. The same figure gives the same
    bytes. The alt text of our own figures goes into both files as their description.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    files = (stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg"))
    description = getattr(fig, "alt_text", "")
    metadata: dict[str, dict[str, str | None]] = {
        "png": {"Description": description, "Software": None},
        "svg": {"Description": description, "Date": None, "Creator": None},
    }
    # Without a salt of ours, the ids inside an SVG file are drawn at random.
    with mpl.rc_context({"svg.hashsalt": "mimdet"}):
        for file in files:
            kind = file.suffix[1:]
            options: dict[str, Any] = {"format": kind, "dpi": 2 * DPI, "metadata": metadata[kind]}
            write_file(file, partial(fig.savefig, **options))
    return files
