"""Whether the small scale of the frontier ranks plans as a larger one does.

Shape letters: none.
"""

from collections.abc import Sequence

import numpy as np

from tokendrop.analysis.report import Table
from tokendrop.study.frontier_summary import METRICS, Row, came_to, flops, names, plan_of
from tokendrop.study.plans import JOINT, PLACEBO
from tokendrop.study.synergy_summary import spearman


def ranks_table(small: Sequence[Row], large: Sequence[Row], draws: int = 2000) -> Table:
    """Spearman's correlation, over the plans that two scales have, of what each comes to minus dense joint training.

    Seeds are averaged; of a plan's updates, those count that bring it nearest to .6 of dense joint training's FLOPs.
    The 95 % interval resamples plans.

    Args:
        small: rows of one scale and split.
        large: rows of another.
        draws: of the bootstrap.
    """
    both = _nearest(small), _nearest(large)
    shared = [plan for plan in both[0] if plan in both[1]]
    cells = []
    for metric in METRICS:
        scales = zip((small, large), both, strict=True)
        came = (came_to(rows, [of[plan] for plan in shared], metric) for rows, of in scales)
        cells.append(spearman(*map(np.array, came), draws))
    return Table(("plans", *METRICS), [(str(len(shared)), *cells)])


def _nearest(rows: Sequence[Row]) -> dict[str, str]:
    """Plan -> the run of it that is nearest to .6 of the FLOPs; joint plans but dense training and the placebo."""
    joint = [row for row in rows if all(row[task] for task, *_ in METRICS.values())]
    found: dict[str, str] = {}
    for name in names(joint):
        plan = plan_of(name)
        if plan in (JOINT, PLACEBO):
            continue
        if plan not in found or abs(flops(rows, name) - 0.6) < abs(flops(rows, found[plan]) - 0.6):
            found[plan] = name
    return found
