"""The report of a model looked at before anything is dropped: where its attention goes, and what to drop.

Shape letters: none.
"""

import io

from tokendrop.analysis.advice import Advice
from tokendrop.analysis.allocation import Allocation
from tokendrop.analysis.report import Image, Section, Table
from tokendrop.analysis.segments import OWN_IMAGE

MISSING = "-"


def share_table(found: Allocation) -> Table:
    """A row for each task and layer, a column for each segment; an output that is an image has a column of its own."""
    rows = []
    for task, share in zip(found.tasks, found.share.tolist(), strict=True):
        for layer, (*others, output) in enumerate(share):
            said = (MISSING, f"{output:.2f}") if task in found.own_images else (f"{output:.2f}", MISSING)
            cells = *(f"{one:.2f}" for one in others), *said
            rows.append((f"{task}, layer {layer}", *(cells if found.own_images else cells[:-1])))
    return Table(("attention to", *found.segments, *([OWN_IMAGE] if found.own_images else [])), rows)


def sections(found: Allocation, advice: Advice) -> list[Section]:
    """The report of both."""
    png = io.BytesIO()
    found.plot().savefig(png, format="png", dpi=110)
    figure = Image("Attention by segment over depth, and in blocks of one sample", png.getvalue())
    return [
        Section("Where attention goes", "Dense model, all rows counted.", share_table(found), [figure]),
        Section(f"What to drop for {advice.budget:.2f} of the FLOPs", advice.evidence(), advice.table()),
        Section("Python", code=advice.code()),
        Section("LightningCLI", code=advice.yaml()),
    ]
