"""Bars of what the parts of a model cost."""

from collections.abc import Mapping

from mimdet.viz.style import BLUE, INK, NORMAL, ORANGE, SKY, NotebookFigure, new_figure

COLOURS = (BLUE, SKY, ORANGE)


def show_costs(
    costs: Mapping[str, Mapping[str, float]], unit: str, scale: float = 1.0
) -> NotebookFigure:
    """One bar a model or setting, its parts end to end, each with its number in it.

    costs: name -> part -> cost, the same parts (at most three) in every one; numbers are divided by
    `scale`, and `unit` says what they then are. Raises ValueError for other parts.
    """
    parts = list(next(iter(costs.values()), {}))
    if not 0 < len(parts) <= len(COLOURS) or any(list(own) != parts for own in costs.values()):
        raise ValueError(f"every bar needs the same one to {len(COLOURS)} parts, not {dict(costs)}")
    fig = new_figure(7.5, 0.42 * len(costs) + 1.05)
    ax = fig.add_axes(
        (0.13, 0.52 / fig.get_figheight(), 0.84, 0.42 * len(costs) / fig.get_figheight())
    )
    said = []
    longest = max(sum(own.values()) for own in costs.values()) / scale
    for row, (name, own) in enumerate(costs.items()):
        left = 0.0
        for part, colour in zip(parts, COLOURS, strict=False):
            value = own[part] / scale
            ax.barh(
                row, value, left=left, color=colour, height=0.7, label=part if row == 0 else None
            )
            if value > 0.04 * longest:  # a number needs room
                dark = colour == BLUE
                ax.text(
                    left + value / 2,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=NORMAL,
                    color="white" if dark else INK,
                )
            left += value
        said.append(f"{name}: " + ", ".join(f"{part} {own[part] / scale:.0f}" for part in parts))
    ax.set_yticks(range(len(costs)), list(costs), fontsize=NORMAL)
    ax.invert_yaxis()
    ax.set_xlabel(unit, fontsize=NORMAL, color=INK)
    ax.tick_params(labelsize=NORMAL, colors=INK)
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="upper center", ncols=len(parts), fontsize=NORMAL, frameon=False)
    fig.alt_text = f"Bars of {unit}. " + "; ".join(said) + "."
    return fig
