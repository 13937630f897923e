"""Figures of an attention allocation, like figures 2 and 3 of arXiv 2606.01503.

Shape letters: S segments, L layers, N blocks of a heat map.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokendrop.analysis.segments import HeatMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#8d99ae", "#ef8354", "#4f9d69", "#3d5a98")
SHALLOW = 1
FLOOR = 1e-5  # of the colour scale


def plot(shares: Tensor, tasks: Sequence[str], segments: Sequence[str], maps: Mapping[str, HeatMap]) -> "Figure":
    """A line of figures for each task: two pies, shares over depth, and two heat maps where there are any.

    Args:
        shares: (tasks, L, S).
        tasks: names, in order.
        segments: names, in order.
        maps: task -> heat map.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, depth = 5 if maps else 3, shares.shape[1]
    figure = Figure(figsize=(3.1 * columns, 3.0 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), columns, squeeze=False)
    shown = [min(SHALLOW, depth - 1), depth - 1]
    for row, (task, share) in enumerate(zip(tasks, shares, strict=True)):
        for column, layer in enumerate(shown):
            _pie(axes[row][column], share[layer].tolist(), segments, f"{task}, layer {layer}")
        lines = axes[row][2]
        for index, name in enumerate(segments):
            lines.plot(
                range(depth), share[:, index].tolist(), label=name, color=COLOURS[index], marker="o", markersize=3
            )
        lines.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1), title=task)
        lines.legend(fontsize="x-small")
        for column, layer in enumerate(shown if maps else (), start=3):
            _heat(axes[row][column], maps.get(task), layer)
    return figure


def _pie(axes: Any, shares: list[float], names: Sequence[str], title: str) -> None:
    kept = [(share, name, colour) for share, name, colour in zip(shares, names, COLOURS, strict=True) if share > 0]
    values, labels, colours = zip(*kept, strict=True)
    axes.pie(values, labels=labels, colors=colours, autopct="%.0f%%", textprops={"fontsize": 7})
    axes.set_title(title, fontsize=9)


def _heat(axes: Any, found: HeatMap | None, layer: int) -> None:
    axes.axis("off" if found is None else "on")
    if found is None:
        return
    from matplotlib.colors import LogNorm

    values = found.values[layer].clamp(min=FLOOR).tolist()
    image = axes.imshow(values, norm=LogNorm(FLOOR, 1), cmap="magma")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    for at, _ in found.borders:
        axes.axhline(at - 0.5, color="white", linewidth=0.6)
        axes.axvline(at - 0.5, color="white", linewidth=0.6)
    places, names = zip(*found.borders, strict=True)
    axes.set_xticks(places, names, rotation=90, fontsize=6)
    axes.set_yticks(places, names, fontsize=6)
    axes.set_title(f"layer {layer}", fontsize=9)
