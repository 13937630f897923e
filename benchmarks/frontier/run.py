"""Both tasks' quality against training FLOPs: plans, dense training of fewer updates, controls; resumable run by run.

    python benchmarks/frontier/run.py --scale digits --seeds 0:3                     # choose, on validation
    python benchmarks/frontier/run.py --scale digits --split test --seeds 100:110    # report, on test, with fresh seeds
    python benchmarks/frontier/run.py --scale mnist --runs dense "dense x0.6" "U 2:, G 2:5 skipped"

A row a run, in benchmarks/results/frontier/rows.jsonl; what is there is not run again. `python -m benchmarks.table`
makes the tables of docs/frontier.md of them, and benchmarks/frontier/picture.py its pictures.
Shape letters: none.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.results import ROOT, environment
from tokendrop.study.frontier import SCALES, run_missing
from tokendrop.study.plans import ALONE, JOINT, PLACEBO, plans
from tokendrop.study.runner import made_where
from tokendrop.unified.data import TASKS

ROWS = ROOT / "benchmarks" / "results" / "frontier" / "rows.jsonl"
CONTROLS = [
    *ALONE, JOINT, *(f"{ALONE[0]} x{x}" for x in (0.5, 2, 3)), f"{ALONE[1]} x2",
    *(f"{JOINT} x{x}" for x in (0.6, 0.8, 0.4)), PLACEBO,
]  # fmt: skip


def main() -> None:
    """Run what is missing, and print each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="digits")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--seeds", default="0:3", help="first and end, as in 0:3")
    parser.add_argument("--runs", nargs="*", help="plans, with their updates as in 'dense x0.6'; all by default")
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=1)
    parser.add_argument("--out", type=Path, default=ROWS)
    given = parser.parse_args()
    seeds = range(*map(int, given.seeds.split(":")))
    every = [*CONTROLS, *(name for name in plans(SCALES[given.scale].layers) if name not in CONTROLS)]
    device = None if SCALES[given.scale].accelerator == "gpu" else "cpu"
    shared = {key: environment(device)[key] for key in ("device", "commit")}
    where = given.out, lambda: shared | made_where(), given.jobs
    found = run_missing(given.scale, given.split, given.runs or every, seeds, *where)
    for done, due, row in found:
        u, g = (row[task] for task in TASKS)
        said = [f"U exact {u['accuracy']:.3f} NLL {u['nll']:.3f}"] if u else []
        said += [f"G NLL {g['nll']:.4f} agreement {g.get('agreement', math.nan):.2f}"] if g else []
        named = f"{row['plan']} x{row['updates']:g}, seed {row['seed']}"
        print(f"{done}/{due} {named:45} {row['flops']:.3e} FLOPs {row['seconds']:.0f} s  {'  '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
