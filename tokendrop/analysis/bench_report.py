"""How a benchmark is said: a table, notes and a report.

Shape letters: none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokendrop.analysis.report import Image, Section, Table, lines_png

Row = Mapping[str, Any]
RATIOS = "FLOPs ratio", "time ratio", "capture", "computed FLOPs ratio", "computed capture", "memory ratio"
HEADER = ("method", "part", *RATIOS, "s/batch", "samples/s")
MISSING = "-"


def table(rows: Sequence[Row]) -> Table:
    """A line for each row; the step that takes least time is marked."""
    steps = {at: row["time_ratio"]["median"] for at, row in enumerate(rows) if row["part"] == "step"}
    least = [min(steps, key=lambda at: steps[at])] if steps else []
    return Table(HEADER, [_line(row) for row in rows], least, "the step that takes least time")


def _line(row: Row) -> tuple[str, ...]:
    memory, computed, capture = row["memory_ratio"], row["computed_flops_ratio"], row["computed_capture"]
    return (
        row["method"],
        row["part"],
        f"{row['flops_ratio']:.2f}",
        figure(row["time_ratio"]),
        figure(row["capture"]),
        MISSING if computed is None else f"{computed:.2f}",
        MISSING if capture is None else figure(capture),
        MISSING if memory is None else f"{memory:.2f}",
        *(f"{_short(row[name])} (dense {_short(row[f'dense_{name}'])})" for name in ("seconds", "samples_per_second")),
    )


def _short(found: Mapping[str, float]) -> str:
    rounded = float(f"{found['median']:.3g}")
    return f"{rounded:g}"


def figure(found: Mapping[str, float]) -> str:
    """Median, and 20th to 80th percentile where they differ from it."""
    shown = [f"{found[key]:.2f}" for key in ("median", "p20", "p80")]
    return shown[0] if len(set(shown)) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def notes(rows: Sequence[Row]) -> list[str]:
    """What the figures mean."""
    first = rows[0]
    batches, setup = first["setup"]["batches"], first["setup"]
    memory = "the peak of a step" if not first["device"].startswith("cpu") else "what a forward keeps for its backward"
    where = f"{first['device']}, {setup['threads']} threads, {first['clock']} time"
    said = [
        f"Median of n = {first['time_ratio']['n']} rounds, dense and dropped in turns in one process (20th to 80th "
        f"percentile), on {len(batches)} {'batches' if len(batches) > 1 else 'batch'}; {where}.",
        "FLOPs: counted, over the dense model's. capture: FLOPs ratio / time ratio; 1 where every saved FLOP saved its "
        "time. Causal attention is counted in full; computed FLOPs are without the pairs that no query sees. "
        f"Memory: {memory}. Seconds: of a batch; a step ends with "
        f"{'the update by ' + setup['optimizer'] if setup['optimizer'] else 'no update'}.",
    ]
    gap = max((row["gradient_gap"] or 0.0 for row in rows), default=0.0)
    checked = f"Equal to the reference: gradients within {gap:.1g} of the largest, first batch of each task."
    return [*said, checked if setup["checked"] else "Not compared with the reference (unchecked)."]


def sections(rows: Sequence[Row]) -> list[Section]:
    """The report."""
    steps = [row for row in rows if row["part"] == "step"]
    short = [row["method"].split("(")[0] for row in steps]
    names = short if len(set(short)) == len(short) else [row["method"] for row in steps]
    points = [[(row["flops_ratio"], row["time_ratio"]["median"])] for row in steps]
    ratios = dict(zip(names, points, strict=True))
    chart = lines_png({"every saved FLOP saves its time": [(0, 0), (1, 1)]} | ratios, "FLOPs ratio", "time ratio")
    return [
        Section("A training step", " ".join(notes(rows)), table(steps), [Image("Time over FLOPs of a step", chart)]),
        Section("Forward, backward and step", table=table(rows)),
    ]
