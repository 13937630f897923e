"""What a person would see go wrong in a figure."""

from itertools import combinations

from matplotlib.text import Text


def shown(figure):
    """Every text of a figure that is drawn, with where it stands, in pixels."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    texts = [one for one in figure.findobj(Text) if one.get_visible() and one.get_text().strip()]
    axes = {axis for one in figure.axes for axis in (one.xaxis, one.yaxis)}
    ticks = {label for axis in axes for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)}
    inside = {label for axis in axes for label in axis.get_ticklabels() if _in_view(axis, label)}
    kept = [one for one in texts if one not in ticks or one in inside]
    boxes = [Text.get_window_extent(one, renderer) for one in kept]
    return list(zip((one.get_text() for one in kept), boxes, strict=True))


def _in_view(axis, label):
    low, high = sorted(axis.get_view_interval())
    at = label.get_position()[0 if axis.axis_name == "x" else 1]
    return low <= at <= high and axis.axes.axison


def faults(figure):
    """Texts over one another, and texts that the edge of the figure cuts off."""
    found = shown(figure)
    over = [(a, b) for (a, one), (b, other) in combinations(found, 2) if one.shrunk(0.98, 0.9).overlaps(other)]
    whole = figure.bbox
    cut = [a for a, one in found if one.x0 < -1 or one.y0 < -1 or one.x1 > whole.x1 + 1 or one.y1 > whole.y1 + 1]
    return over, cut
