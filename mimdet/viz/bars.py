"""Figures of what a model is made of: parameters by origin, multiply-adds by part."""

from collections.abc import Mapping, Sequence

from torch import nn

from mimdet.models.weights import LoadReport
from mimdet.viz.charts import axes_of
from mimdet.viz.style import (
    BLUE,
    GREEN,
    INK,
    NORMAL,
    ORANGE,
    PALETTE,
    SKY,
    VERMILLION,
    WIDTH,
    NotebookFigure,
    new_figure,
)

COLOURS = (BLUE, SKY, ORANGE, GREEN, VERMILLION)


def loaded_by_part(report: LoadReport, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part of the model -> (values that came from the file, values that are new).

    A part is what stands in front of the second dot of a backbone's name, `encoder`, or of the
    first, `neck`. Buffers such as running means are not counted.
    """
    loaded = set(report.loaded)
    counts: dict[str, tuple[int, int]] = {}
    for name, value in model.named_parameters():
        part = name.removeprefix("backbone.").split(".")[0]
        old, new = counts.get(part, (0, 0))
        from_file = name in loaded
        counts[part] = (old + value.numel() * from_file, new + value.numel() * (not from_file))
    return counts


def show_loaded(report: LoadReport, model: nn.Module) -> NotebookFigure:
    """Parameters of every part of a model: those a file gave, and those that are still random."""
    counts = loaded_by_part(report, model)
    parts = {
        "from the file": [old for old, _ in counts.values()],
        "new": [new for _, new in counts.values()],
    }
    return show_stacked(list(counts), parts, "parameters", millions(parts), digits=3)


def millions(parts: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """The unit that keeps a bar's number short: (divisor, name)."""
    largest = max(max(values) for values in parts.values())
    steps = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "thousand"))
    return next(((size, name) for size, name in steps if largest >= size), (1.0, ""))


def show_stacked(
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    quantity: str,
    unit: tuple[float, str] = (1.0, ""),
    digits: int = 2,
) -> NotebookFigure:
    """A horizontal bar a label, made of parts, its sum written behind it.

    parts: name -> a number for every label. unit: (divisor, name), for example (1e9, "G"). digits:
    of the sums; those before the point are always written.
    Raises ValueError when a part has another number of values than there are labels.
    """
    for name, values in parts.items():
        if len(values) != len(labels):
            raise ValueError(f"part {name!r} has {len(values)} values for {len(labels)} labels")
    size, word = unit
    fig = new_figure(WIDTH, 1.1 + 0.32 * len(labels))
    ax = axes_of(fig, 1, 1, "", f"{quantity}, {word}".rstrip(", "), "")
    rows = list(range(len(labels)))
    left = [0.0] * len(labels)
    colours = COLOURS if len(parts) <= len(COLOURS) else PALETTE
    for (name, values), colour in zip(parts.items(), colours, strict=False):
        lengths = [value / size for value in values]
        ax.barh(rows, lengths, left=left, color=colour, label=name, height=0.7)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    for row, total in zip(rows, left, strict=True):
        ax.text(total, row, f" {_short(total, digits)}", va="center", fontsize=NORMAL, color=INK)
    ax.set_yticks(rows, list(labels))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1 * max(left))
    ax.grid(False, axis="y")
    ax.legend(
        fontsize=NORMAL,
        frameon=False,
        labelcolor=INK,
        ncols=len(parts),
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    fig.set_layout_engine("constrained")
    sums = ", ".join(
        f"{label} {_short(total, digits)}" for label, total in zip(labels, left, strict=True)
    )
    fig.alt_text = f"Bars of {quantity} ({word}), made of {', '.join(parts)}: {sums}."
    return fig


def _short(number: float, digits: int) -> str:
    """At least so many digits, no exponent: 0.123, 97.5, 1,193."""
    return f"{number:,.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"
