"""The report of a model looked at before anything is dropped: where its attention goes, and what to drop.

Shape letters: none.
"""

import io

from tokendrop.analysis.advice import Advice
from tokendrop.analysis.allocation import Allocation
from tokendrop.analysis.report import Image, Section, Table


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
