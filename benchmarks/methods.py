"""Every method at about equal FLOPs beside dense training of as few, in the frontier's regime; resumable run by run.

    python benchmarks/methods.py --seeds 0:3

Understanding is under the method, generation dense. A row a run, in benchmarks/results/frontier/methods.jsonl, on
validation; what is there is not run again. `python -m benchmarks.table` makes the table of docs/comparison.md of them.
Shape letters: none.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import ROOT, environment
from tokendrop.analysis.report import Table
from tokendrop.methods import (
    DART,
    CDPruner,
    DivPrune,
    Drop,
    DuetVLM,
    FastV,
    HiDrop,
    HiMix,
    HMGen,
    MixtureOfDepths,
    PMoD,
    PyramidDrop,
    RandomLTD,
    SkipVision,
    Sprint,
    SVDPrune,
)
from tokendrop.roles import Method
from tokendrop.study.frontier import FrontierStudy, run_missing
from tokendrop.study.frontier_summary import METRICS, Row, dense_at, flops, name_of, names, paired, quality
from tokendrop.study.intervals import interval
from tokendrop.study.plans import JOINT, Plan
from tokendrop.study.runner import made_where
from tokendrop.unified.data import TASKS

ROWS = ROOT / "benchmarks" / "results" / "frontier" / "methods.jsonl"
# The FLOPs of training around those of HiMix from layer 2 on, dense.
DENSE = (JOINT, f"{JOINT} x0.8", f"{JOINT} x0.7")
# Of 6 layers and 32 image tokens; each count, range or shift is the one whose FLOPs are nearest to those of the first.
METHODS: dict[str, Method] = {
    "HiMix, layers 2:": HiMix("2:"),
    "HMGen, layers 3:": HMGen("3:"),
    "FastV, layer 1": FastV(1, 10),
    "PyramidDrop, layers 1 3 5": PyramidDrop((1, 3, 5), (14, 6, 4)),
    "HiDrop, entry 1, layers 2 3, exit 5": HiDrop(1, (2, 3), (24, 12), 5),
    "DuetVLM text stages, layers 2 4": DuetVLM((2, 4), (10, 0)),
    "DART, layer 1": DART(1, 10),
    "SVDPrune, layer 0": SVDPrune(14),
    "DivPrune, layer 0": DivPrune(14),
    "CDPruner, layer 0": CDPruner(14),
    "RandomLTD": RandomLTD("1:-1", 6),
    "Sprint": Sprint("1:-1", 4),
    "SkipVision": SkipVision(":", 0),
    "MixtureOfDepths": MixtureOfDepths("1:", 12),
    "PMoD": PMoD(shift=0.36),
    "Drop random, layer 1, gone": Drop("1:", 12, then="gone"),
    "Drop uniform, layer 1, gone": Drop("1:", 12, "uniform", then="gone"),
    "Drop leverage, layer 1, gone": Drop("1:", 12, "leverage", then="gone"),
    "Drop random, layers 1:-1, rejoin (TREAD)": Drop("1:-1", 6),
    "Drop random, layers 1:, visible": Drop("1:", 6, then="context"),
    "Drop random, layers 1:-1, merged": Drop("1:-1", 6, then="merge"),
}
HEADER = ("run", "seeds", "FLOPs", *METRICS, *(f"{name}, to dense" for name in METRICS))


@dataclass(frozen=True)
class Comparison(FrontierStudy):
    """The regime of the frontier, with a plan for each method."""

    drawn: int = 0
    events: int = 0

    @override
    def plans(self) -> dict[str, Plan]:
        """Dense joint training, and each method for understanding."""
        return {JOINT: Plan(TASKS, {})} | {name: Plan(TASKS, {TASKS[0]: one}) for name, one in METHODS.items()}


def table(rows: Sequence[Row]) -> Table:
    """Every run with its figures, and their difference by seed to dense training of equal FLOPs; positive is better.

    Args:
        rows: of the runs, as `one_run` makes them.
    """
    lines = []
    for name in names(rows):
        own = [row for row in rows if name_of(row) == name]
        share = flops(rows, name)
        cells = [interval([row[task][key] for row in own]) for task, key, _ in METRICS.values()]
        equal = [
            "" if name in DENSE else interval(paired(quality(rows, name, one), dense_at(rows, share, one)), signed=True)
            for one in METRICS
        ]
        lines.append((name, str(len(own)), f"{share:.2f}", *cells, *equal))
    return Table(HEADER, lines)


def main() -> None:
    """Run what is missing, and print each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:3", help="first and end, as in 0:3")
    parser.add_argument("--runs", nargs="*", help="methods or dense runs by name; all by default")
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=1)
    parser.add_argument("--out", type=Path, default=ROWS)
    given = parser.parse_args()
    seeds = range(*map(int, given.seeds.split(":")))
    shared = {key: environment("cpu")[key] for key in ("device", "commit")}
    if shared["commit"].endswith("-dirty"):
        parser.error("the code differs from its commit, which a row could not tell; commit it first")
    where = given.out, lambda: shared | made_where(), given.jobs, {"digits": Comparison()}
    for done, due, row in run_missing("digits", "val", given.runs or [*DENSE, *METHODS], seeds, *where):
        u, g = (row[task] for task in TASKS)
        said = f"U exact {u['accuracy']:.3f} NLL {u['nll']:.3f}  G NLL {g['nll']:.4f}"
        named = f"{row['plan']} x{row['updates']:g}, seed {row['seed']}"
        print(f"{done}/{due} {named:50} {row['flops']:.3e} FLOPs {row['seconds']:.0f} s  {said}", flush=True)


if __name__ == "__main__":
    main()
