"""Where the attention of the demo's dense model goes, trained on both tasks.

    python benchmarks/allocation.py --out benchmarks/results/allocation.jsonl --figure docs/images/allocation.png

Shape letters: none.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokendrop as td
from benchmarks.results import append, environment, row
from tokendrop.study.analyzed import trained_dense
from tokendrop.study.study import Study


def main() -> None:
    """Train, measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="batches of each task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    shared, shares = environment(), {}
    for seed in range(given.seeds):
        model, batches, layout, loss = trained_dense(Study(steps=given.steps), seed)
        for counted in ("all", "output"):
            found = td.attention_allocation(model, batches, layout, counted, blocks=24, loss=loss)
            shares.setdefault(counted, []).append(found.share)
            if given.figure and counted == "all" and seed == 0:
                given.figure.parent.mkdir(parents=True, exist_ok=True)
                found.plot().savefig(given.figure, dpi=110)
    for counted, each in shares.items():
        for task, name in enumerate(found.tasks):
            for layer in range(each[0].shape[1]):
                config = {"layer": layer, "rows": counted, "updates": 2 * given.steps, "seeds": given.seeds}
                rows = [
                    row(name, "dense", segment, "1", [float(one[task, layer, at]) for one in each], config, **shared)
                    for at, segment in enumerate(found.segments)
                ]
                print(name, counted, layer, *(f"{one['metric']} {one['median']:.2f}" for one in rows), flush=True)
                if given.out:
                    append(given.out, rows)


if __name__ == "__main__":
    main()
