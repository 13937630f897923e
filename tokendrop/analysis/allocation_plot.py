"""Figures of an attention allocation, after figures 2 and 3 of arXiv 2606.01503.

Shape letters: S segments, L layers, N blocks of a heat map.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokendrop.analysis.labels import LINE, end_labels, spread
from tokendrop.analysis.segments import OWN_IMAGE, SEGMENTS, HeatMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#6b7a99", "#d9652b", "#2f8f57", "#3d5a98")
SHALLOW = 1
FLOOR = 1e-5  # of the colour scale
SIDE, POINTS = 2.9, 8.0  # inches of a panel, points of its small text


def plot(
    shares: Tensor,
    tasks: Sequence[str],
    segments: Sequence[str],
    maps: Mapping[str, HeatMap],
    own_images: Collection[str] = (),
) -> "Figure":
    """A line of figures for each task: shares stacked over depth, and two heat maps where there are any.

    Args:
        shares: (tasks, L, S).
        tasks: names, in order.
        segments: names, in order.
        maps: task -> heat map.
        own_images: tasks whose output is an image; it is called so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [min(SHALLOW, shares.shape[1] - 1), shares.shape[1] - 1] if maps else []
    ratios = [1.5, *(1.0 for _ in shown)]
    size = SIDE * sum(ratios) + 0.9, (SIDE + 0.4) * len(tasks)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), len(ratios), squeeze=False, width_ratios=ratios)
    for row, task in enumerate(tasks):
        named: dict[str, str] = {SEGMENTS[-1]: OWN_IMAGE} if task in own_images else {}
        _bars(axes[row][0], shares[row], [named.get(one, one) for one in segments], task)
        for column, layer in enumerate(shown, start=1):
            _heat(axes[row][column], maps.get(task), layer, task, named)
    return figure


def _bars(axes: Any, share: Tensor, names: Sequence[str], task: str) -> None:
    layers, floor = range(len(share)), [0.0] * len(share)
    ends: dict[str, tuple[float, float, str]] = {}
    for index, colour in enumerate(COLOURS):
        heights = share[:, index].tolist()
        axes.bar(layers, heights, bottom=floor, color=colour, width=0.86)
        if max(heights) > 0:
            ends[names[index]] = len(share) - 0.57, floor[-1] + heights[-1] / 2, colour
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1), xlim=(-0.6, len(share) - 0.4))
    axes.set_title(task, loc="left", fontweight="bold")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    end_labels(axes, list(ends), list(ends.values()))


def _heat(axes: Any, found: HeatMap | None, layer: int, task: str, named: Mapping[str, str]) -> None:
    axes.axis("off" if found is None else "on")
    if found is None:
        return
    from matplotlib.colors import LogNorm

    values = found.values[layer].clamp(min=FLOOR)
    blocks = len(values)
    # No row looks at what comes after it: that half is room for the names of the segments.
    later = values.new_ones(blocks, blocks).triu(1).bool()
    image = axes.imshow(values.masked_fill(later, float("nan")).tolist(), norm=LogNorm(FLOOR, 1), cmap="magma")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(f"{task}, layer {layer}", loc="left", fontsize=9)
    bar = axes.figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.9, aspect=32, pad=0.03)
    bar.set_label("attention of a row (down) to a column", fontsize=POINTS)
    bar.ax.tick_params(labelsize=POINTS)
    starts = [at for at, _ in found.borders]
    for at in starts[1:]:
        axes.plot([-0.5, at - 0.5], [at - 0.5] * 2, color="white", linewidth=0.8)
        axes.plot([at - 0.5] * 2, [at - 0.5, blocks - 0.5], color="white", linewidth=0.8)
    middles = [(low + high) / 2 - 0.5 for low, high in pairwise([*starts, blocks])]
    gap = LINE * POINTS * blocks / (0.8 * SIDE * 72)
    for (_, name), place in zip(found.borders, spread(middles, gap, 0, blocks - 1), strict=True):
        axes.text(place + 1.2, place, named.get(name, name), fontsize=POINTS, va="center", clip_on=False)
