"""A report as one HTML file that needs nothing else: tables, figures and small images.

Shape letters: H and W pixels.
"""

import base64
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokendrop.analysis.labels import end_labels

MARKERS = "osD^vPX*"
DPI = 130
NBSP = "\N{NO-BREAK SPACE}"
WORDS = 34  # characters, more than a figure with its interval has


@dataclass(frozen=True)
class Table:
    """A header and rows of text; the first column names the row, and the columns that decide come next.

    Args:
        header: names of the columns.
        rows: of as many cells.
        marked: indices of the rows that decide.
        why: what marks them.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Collection[int] = ()
    why: str = ""

    @property
    def texts(self) -> set[int]:
        """Columns of words, which break where they must and stand on the left, as figures do not."""
        return {at for row in self.rows for at, cell in enumerate(row) if at == 0 or len(cell) > WORDS}


@dataclass(frozen=True)
class Image:
    """A PNG with the words below it."""

    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """The image itself as a data: URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Grid:
    """Small images, magnified without smoothing: a column for each run, and of each row its name and its images."""

    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image]]]


@dataclass(frozen=True)
class Section:
    """A part of a report: text, then code, then its table, then images, side by side in a grid or large."""

    title: str
    text: str = ""
    table: Table | None = None
    images: Sequence[Image] = ()
    code: str = ""
    grid: Grid | None = None


def render(title: str, sections: Sequence[Section], foot: Sequence[str] = ()) -> str:
    """The HTML of a report, every text escaped.

    Args:
        title: of the page.
        sections: in order.
        foot: lines at its end: what was measured, where, when and with what.

    Example:
        >>> "&lt;b&gt;" in render("a <b> title", [Section("s")])
        True
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tokendrop", "analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    return environment.get_template("report.html.j2").render(title=title, sections=sections, foot=foot)


def _figure(cell: str) -> str:
    # It breaks before its interval, where there is no room for both, and nowhere else.
    return cell.replace(" ", NBSP).replace(f"{NBSP}(", " (").replace(f"{NBSP}±", " ±")


def lines_png(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> bytes:
    """A line chart as PNG: one line of (x, y) points for each name, which stands where the line ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    beside = max(map(len, lines), default=0) * 0.066  # inches, about
    figure = Figure(figsize=(max(7.2, 4.5 + beside), max(4.0, 0.2 * len(lines) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, points in enumerate(lines.values()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker=MARKERS[index % len(MARKERS)], markersize=5, linewidth=1.4)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    ends = [(*points[-1], line.get_color()) for points, line in zip(lines.values(), axes.get_lines(), strict=True)]
    end_labels(axes, list(lines), ends)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def pixels_png(pixels: NDArray[np.float32]) -> bytes:
    """(H, W) pixels from 0 (white) to 1 (black) as PNG."""
    from matplotlib.image import imsave

    out = io.BytesIO()
    imsave(out, 1 - pixels, cmap="gray", vmin=0, vmax=1, format="png")
    return out.getvalue()
