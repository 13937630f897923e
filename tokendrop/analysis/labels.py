"""Names beside what they name in a figure, none over another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 8.5  # of the text
LINE = 1.35  # its height, with the gap to the next


def spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places as near the wanted ones as can be, in their order, each `gap` or more from the next, from `low` to `high`.

    Where there is no room for all at that distance, they stand evenly.

    Example:
        >>> spread([0.5, 0.52, 0.1], 0.1)
        [0.46, 0.56, 0.1]

    Source: least squares under an order, by pooling adjacent violators.
    """
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    gap = min(gap, (high - low) / max(len(order) - 1, 1))
    pools: list[tuple[float, int]] = []  # mean of what is wanted, less the gaps before it; and of how many
    for rank, at in enumerate(order):
        mean, count = wanted[at] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (mean * count + before * many) / (count + many), count + many
        pools.append((mean, count))
    room = high - gap * (len(order) - 1)
    starts = [min(max(mean, low), room) for mean, count in pools for _ in range(count)]
    places = [0.0] * len(order)
    for rank, at in enumerate(order):
        places[at] = round(starts[rank] + rank * gap, 6)
    return places


def end_labels(axes: "Axes", names: Sequence[str], ends: Sequence[tuple[float, float, Any]]) -> None:
    """Write names at the right edge, each with a thin line from its (x, y, colour).

    Args:
        axes: drawn already, so that its limits are known.
        names: of the lines.
        ends: where each ends, in data.
    """
    height = axes.bbox.height * 72 / axes.figure.dpi  # points
    axes.get_xlim(), axes.get_ylim()  # limits follow the data when they are asked for
    inside = axes.transAxes.inverted()
    heights = [float(inside.transform(axes.transData.transform((x, y)))[1]) for x, y, _ in ends]
    places = spread(heights, LINE * POINTS / height)
    for name, (x, y, colour), place in zip(names, ends, places, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=POINTS,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5)},
        )
