"""What the first fifth of training foretells of the frontier's runs: Spearman's correlation over configurations.

Shape letters: none.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from tokendrop.analysis.report import Table
from tokendrop.study.frontier_summary import METRICS, G, Row, U, came_to, name_of, names
from tokendrop.study.plans import JOINT, PLACEBO
from tokendrop.study.synergy_summary import PAIR, spearman

PREDICTORS = ("alignment", "magnitude", "fidelity of U", "fidelity of G", "U NLL on validation", "G NLL on validation")


def early(row: Row, predictor: str) -> float:
    """What a predictor says at the end of the first fifth of a run of both tasks, NaN where it says nothing.

    Losses are signed so that more is better; a task that does not drop has the fidelity 1.
    """
    if predictor.endswith("validation"):
        return -row["curve"][0][1][U if predictor.startswith("U") else G]
    if not row.get("events"):
        return math.nan
    last = row["events"][-1]
    if predictor.startswith("fidelity"):
        value = last.get("fidelity", {}).get(U if predictor.endswith("U") else G, {"value": 1.0})["value"]
    else:
        value = last[predictor][PAIR]["value"]
    return math.nan if value is None else value


def early_table(rows: Sequence[Row], draws: int = 2000) -> Table:
    """Each predictor's correlation with what a run comes to, minus dense joint training of the same seed.

    A configuration is a plan with its updates, its seeds averaged; the placebo is left out. The 95 % interval resamples
    configurations.

    Args:
        rows: of one scale and split.
        draws: of the bootstrap.
    """
    joint = [row for row in rows if row[U] and row[G] and row.get("events") and row["plan"] != PLACEBO]
    found = [name for name in names(joint) if name != JOINT]
    lines = []
    for predictor in PREDICTORS:
        said = [statistics.fmean(early(row, predictor) for row in joint if name_of(row) == name) for name in found]
        cells = (spearman(np.array(said), np.array(came_to(rows, found, metric)), draws) for metric in METRICS)
        lines.append((predictor, *cells))
    return Table((f"first fifth, {len(found)} configurations", *METRICS), lines)
