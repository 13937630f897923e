"""A report as one HTML file that needs nothing else: tables, figures and small images.

Shape letters: H and W pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Table:
    """A header and rows of text; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Image:
    """A PNG with the words below it; `small` ones stand side by side, magnified without smoothing."""

    caption: str
    png: bytes
    small: bool = False

    @property
    def uri(self) -> str:
        """The image itself as a data: URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of a report: text, then code, then its table, then its images; each may be missing."""

    title: str
    text: str = ""
    table: Table | None = None
    images: Sequence[Image] = ()
    code: str = ""


def render(title: str, sections: Sequence[Section]) -> str:
    """The HTML of a report, every text escaped.

    Args:
        title: of the page.
        sections: in order.

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
    return environment.get_template("report.html.j2").render(title=title, sections=sections)


def lines_png(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> bytes:
    """A line chart as PNG: one line of (x, y) points for each name, told apart by colour and by marker."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=name, marker=MARKERS[index % len(MARKERS)], markersize=4, linewidth=1.2)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def pixels_png(pixels: NDArray[np.float32]) -> bytes:
    """(H, W) pixels from 0 (white) to 1 (black) as PNG."""
    from matplotlib.image import imsave

    out = io.BytesIO()
    imsave(out, 1 - pixels, cmap="gray", vmin=0, vmax=1, format="png")
    return out.getvalue()
