"""Every method at about equal FLOPs beside dense training of as few, on the data of the frontier; resumable run by run.

    python benchmarks/methods.py --seeds 0:3

A row a run, in benchmarks/results/frontier/methods.jsonl, on validation; what is there is not run again.
`python -m benchmarks.table` makes the table of docs/comparison.md of them.
Shape letters: none.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import ROOT, environment
from tokendrop.study.comparison import DENSE, METHODS, Comparison
from tokendrop.study.frontier import run_missing
from tokendrop.study.runner import made_where
from tokendrop.unified.data import TASKS

ROWS = ROOT / "benchmarks" / "results" / "frontier" / "methods.jsonl"


def main() -> None:
    """Run what is missing, and print each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:3", help="first and end, as in 0:3")
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=1)
    parser.add_argument("--out", type=Path, default=ROWS)
    given = parser.parse_args()
    seeds = range(*map(int, given.seeds.split(":")))
    shared = {key: environment("cpu")[key] for key in ("device", "commit")}
    if shared["commit"].endswith("-dirty"):
        parser.error("the code differs from its commit, which a row could not tell; commit it first")
    where = given.out, lambda: shared | made_where(), given.jobs, {"digits": Comparison()}
    for done, due, row in run_missing("digits", "val", [*DENSE, *METHODS], seeds, *where):
        u, g = (row[task] for task in TASKS)
        said = f"U exact {u['accuracy']:.3f} NLL {u['nll']:.3f}  G NLL {g['nll']:.4f}"
        named = f"{row['plan']} x{row['updates']:g}, seed {row['seed']}"
        print(f"{done}/{due} {named:50} {row['flops']:.3e} FLOPs {row['seconds']:.0f} s  {said}", flush=True)


if __name__ == "__main__":
    main()
