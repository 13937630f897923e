"""A model looked at before anything is dropped: where its attention goes, and what to drop.

Shape letters: none.
"""

import importlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from tokendrop.analysis.advice import Advice
from tokendrop.analysis.allocation import Allocation
from tokendrop.analysis.report import Image, Section, Table
from tokendrop.errors import TokenDropError


class SourceError(TokenDropError, ImportError):
    """A name that leads to nothing that can be analysed."""


def read_source(name: str) -> tuple[Any, ...]:
    """What a function of the user's returns: model, batches, layout, and perhaps the loss of a batch.

    Args:
        name: "package.module:function"; modules of the working directory are found.

    Raises:
        SourceError: no such function, or one that returns other things.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SourceError(f"{name!r}: expected package.module:function; {error}") from error
    made = make()
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        raise SourceError(f"{name!r} returned {type(made).__name__}; expected (model, batches, layout) or with a loss")
    return (*made, None)[:4]


def share_table(found: Allocation) -> Table:
    """A row for each task and layer, a column for each segment."""
    rows = [
        (f"{task}, layer {layer}", *(f"{one:.2f}" for one in segments))
        for task, share in zip(found.tasks, found.share.tolist(), strict=True)
        for layer, segments in enumerate(share)
    ]
    return Table(("attention to", *found.segments), rows)


def sections(found: Allocation, advice: Advice) -> list[Section]:
    """The report of both."""
    png = io.BytesIO()
    found.plot().savefig(png, format="png", dpi=90)
    figure = Image("Attention by segment in a shallow and in the last layer, over depth, and in blocks", png.getvalue())
    return [
        Section("Where attention goes", "Dense model, all rows counted.", share_table(found), [figure]),
        Section(f"What to drop for {advice.budget:.2f} of the FLOPs", advice.evidence(), advice.table()),
        Section("Python", code=advice.code()),
        Section("LightningCLI", code=advice.yaml()),
    ]
