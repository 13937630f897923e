"""What the rows of the frontier say: tables, the test of non-inferiority, and the picture.

Shape letters: none.
"""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tokendrop.analysis.report import MARKERS, Table
from tokendrop.study.intervals import half_width, interval
from tokendrop.study.plans import ALONE, JOINT, PLACEBO
from tokendrop.study.summary import MISSING

Row = Mapping[str, Any]
U, G = "understanding", "generation"
# Name -> task, metric, and the sign that makes more better.
METRICS = {"U exact": (U, "accuracy", 1), "U NLL": (U, "nll", -1), "G NLL": (G, "nll", -1)}
SHARE = 0.2  # of the synergy, that a plan may lose and still be called not worse
QUALITY = ("run", "seeds", "FLOPs", *METRICS, "G agreement")
DIFFERENCES = ("run", "seeds", "FLOPs", *METRICS, *(f"{name}, equal FLOPs" for name in METRICS))


def name_of(row: Row) -> str:
    """How a run is called: its plan, and its updates where they are others than the study's.

    Example:
        >>> name_of({"plan": "dense", "updates": 0.6}), name_of({"plan": "dense", "updates": 1.0})
        ('dense x0.6', 'dense')
    """
    return row["plan"] if row["updates"] == 1 else f"{row['plan']} x{row['updates']:g}"


def plan_of(name: str) -> str:
    """The plan of a run's name."""
    return name.split(" x")[0]


def quality(rows: Sequence[Row], name: str, metric: str) -> dict[int, float]:
    """Seed -> the figure of a run, more being better; no entry where the run does not have the task."""
    task, key, sign = METRICS[metric]
    return {row["seed"]: sign * row[task][key] for row in rows if name_of(row) == name and row[task]}


def flops(rows: Sequence[Row], name: str) -> float:
    """FLOPs of training of a run over those of dense joint training, means over seeds; NaN without the latter.

    To 1e-4, as counts of one step on a GPU and on a CPU are 1e-5 apart.
    """
    own, dense = ([row["flops"] for row in rows if name_of(row) == one] for one in (name, JOINT))
    return round(statistics.fmean(own) / statistics.fmean(dense), 4) if dense else math.nan


def best_alone(rows: Sequence[Row], metric: str) -> str | None:
    """The single-task run of the metric's task that is best by these rows, whatever its updates, on common seeds."""
    plan = ALONE[0] if METRICS[metric][0] == U else ALONE[1]
    found = {name: quality(rows, name, metric) for name in names(rows) if plan_of(name) == plan}
    seeds = set.intersection(*(set(one) for one in found.values())) if found else set()
    return max(found, key=lambda name: statistics.fmean(found[name][seed] for seed in seeds)) if seeds else None


def names(rows: Sequence[Row]) -> list[str]:
    """Every run: single tasks first, then dense by falling FLOPs, then plans in the order in which they came."""
    found = list(dict.fromkeys(name_of(row) for row in rows))
    groups = {plan: group for group, plan in enumerate((*ALONE, JOINT, PLACEBO))}

    def place(name: str) -> tuple[int, float]:
        plan, _, updates = name.partition(" x")
        return groups.get(plan, len(groups)), -float(updates or 1) if plan == JOINT else 0

    return sorted(found, key=place)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """The differences of two runs by seed, over the seeds that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def came_to(rows: Sequence[Row], runs: Sequence[str], metric: str) -> list[float]:
    """What each run comes to minus dense joint training of the same seed, the mean over seeds; more is better."""
    dense = quality(rows, JOINT, metric)
    return [statistics.fmean(paired(quality(rows, name, metric), dense)) for name in runs]


def synergy(rows: Sequence[Row], chosen: Sequence[Row], metric: str) -> list[float]:
    """Dense joint training minus the best single-task run, by seed.

    Args:
        rows: of one scale and split.
        chosen: of the same scale, by which the number of updates of the single task is chosen among those of `rows`:
            those on validation.
        metric: one of `METRICS`.
    """
    alone = _alone(rows, chosen, metric)
    return [] if alone is None else paired(quality(rows, JOINT, metric), quality(rows, alone, metric))


def _alone(rows: Sequence[Row], chosen: Sequence[Row], metric: str) -> str | None:
    there = set(names(rows))
    return best_alone([row for row in chosen if name_of(row) in there], metric)


def dense_at(rows: Sequence[Row], share: float, metric: str) -> dict[int, float]:
    """Seed -> the quality of dense joint training for a share of its FLOPs, linear between the two runs around it.

    A run stands for up to .01 less, to the plan's disadvantage, with all of its seeds; else only seeds that both have
    count, and nothing outside the range of what was run.
    """
    at = sorted((flops(rows, name), name) for name in names(rows) if plan_of(name) == JOINT)
    for above, name in at:
        if 0 <= above - share <= 0.01:
            return quality(rows, name, metric)
    for (low, first), (high, second) in pairwise(at):
        if low <= share <= high:
            a, b = quality(rows, first, metric), quality(rows, second, metric)
            weight = (share - low) / (high - low)
            return {seed: (1 - weight) * a[seed] + weight * b[seed] for seed in a.keys() & b.keys()}
    return {}


def verdict(differences: Sequence[float], margin: float) -> str:
    """What the 95 % interval of a loss says against a margin.

    "not worse" where it excludes a loss of the margin or more, else "worse" where it excludes zero, else "open". The
    margin is NaN for a task without synergy, which has none to lose a share of.

    Example:
        >>> verdict([0.01, 0.02, 0.01], 0.05), verdict([-0.1, -0.11, -0.1], math.nan), verdict([-0.1, 0.1], 0.05)
        ('not worse', 'worse', 'open')
    """
    half = half_width(differences) if differences else math.nan
    if math.isnan(half):
        return "open"
    middle = statistics.fmean(differences)
    return "not worse" if middle - half > -margin else "worse" if middle + half < 0 else "open"


def _margin(gains: Sequence[float]) -> float:
    return SHARE * statistics.fmean(gains) if gains and statistics.fmean(gains) > 0 else math.nan


def quality_table(rows: Sequence[Row]) -> Table:
    """Every run with its figures as they are, and 95 % intervals over seeds; the agreement of some says of how many."""
    lines = []
    for name in names(rows):
        own = [row for row in rows if name_of(row) == name]
        cells = [interval([row[task][key] for row in own if row[task]]) for task, key, _ in METRICS.values()]
        agreement = [row[G]["agreement"] for row in own if "agreement" in (row[G] or {})]
        cells.append(_cell(agreement, len(own), signed=False))
        lines.append((name, str(len(own)), f"{flops(rows, name):.2f}", *cells))
    return Table(QUALITY, lines)


def differences_table(rows: Sequence[Row], chosen: Sequence[Row]) -> Table:
    """Every joint run minus dense joint training, with its verdict, and minus dense training of equal FLOPs.

    Positive is better in each column. A cell that stands on fewer seeds than the line says has their number behind it.

    Args:
        rows: of one scale and split.
        chosen: see `synergy`.
    """
    gains = {metric: synergy(rows, chosen, metric) for metric in METRICS}
    margins = {metric: _margin(one) for metric, one in gains.items()}
    seeds = len(gains["U NLL"])
    against = [_cell(one, seeds, f" to {_alone(rows, chosen, metric)}") for metric, one in gains.items()]
    lines = [("synergy of dense", str(seeds), "1.00", *against, *("",) * 3)]
    for name in names(rows):
        if plan_of(name) in ALONE or name == JOINT:
            continue
        share, cells, equal = flops(rows, name), [], []
        seeds = len(quality(rows, name, "U NLL"))
        for metric in METRICS:
            own = quality(rows, name, metric)
            lost = paired(own, quality(rows, JOINT, metric))
            cells.append(_cell(lost, seeds, f" {verdict(lost, margins[metric])}"))
            equal.append(_cell(paired(own, dense_at(rows, share, metric)), seeds))
        shown = equal if not name.startswith(JOINT) else ("",) * 3
        lines.append((name, str(seeds), f"{share:.2f}", *cells, *shown))
    return Table(DIFFERENCES, lines)


def _cell(values: Sequence[float], seeds: int, behind: str = "", signed: bool = True) -> str:
    fewer = f" ({len(values)})" if len(values) < seeds else ""
    return f"{interval(values, signed)}{behind}{fewer}" if values else MISSING


def frontier_png(rows: Sequence[Row], title: str) -> bytes:
    """Quality of both tasks against FLOPs: dense training as a line, each plan as a point with its interval."""
    figure = Figure(figsize=(11.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(METRICS))
    shown = [name for name in names(rows) if plan_of(name) not in (*ALONE, PLACEBO)]
    dense = [name for name in shown if plan_of(name) == JOINT]
    others = [name for name in shown if name not in dense]
    for axes, metric in zip(panels, METRICS, strict=True):
        axes.errorbar(*_points(rows, dense, metric), label="dense", color="black", marker="o", markersize=4, capsize=2)
        for index, name in enumerate(others):
            mark = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}"}
            axes.errorbar(*_points(rows, [name], metric), label=name, markersize=6, capsize=2, linestyle="", **mark)
        axes.set_xlabel("FLOPs of training, of dense joint training")
        axes.set_ylabel(metric if METRICS[metric][2] > 0 else f"-{metric}")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside right center")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _points(rows: Sequence[Row], shown: Sequence[str], metric: str) -> tuple[list[float], list[float], list[float]]:
    found = [list(quality(rows, name, metric).values()) for name in shown]
    halves = np.nan_to_num([half_width(one) for one in found]).tolist()
    return [flops(rows, name) for name in shown], [statistics.fmean(one) for one in found], halves
