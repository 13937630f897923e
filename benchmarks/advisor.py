"""The advisor's proposal for the demo's understanding task beside a sweep of plans that meet the same budget.

    python benchmarks/advisor.py --out benchmarks/results/advisor.jsonl

The advisor looks at a dense model trained on both tasks; each plan then trains a new model on understanding alone.
Shape letters: none.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokendrop as td
from benchmarks.results import append, environment, row
from tokendrop.analysis.advisor import Trials, advise
from tokendrop.analysis.subject import Subject
from tokendrop.study.analyzed import trained_dense
from tokendrop.study.study import Run, Study
from tokendrop.study.train import train
from tokendrop.unified.data import TASKS

BUDGET, PAPER = 0.68, td.HiMix()


@dataclass(frozen=True)
class MethodsStudy(Study):
    """Runs of one task, each under one method."""

    methods: Mapping[str, Any] = field(default_factory=dict)

    @override
    def runs(self) -> dict[str, Run]:
        """A run for each method."""
        return {name: Run((TASKS[0],), {TASKS[0]: one}) for name, one in self.methods.items()}


def plans() -> list[Any]:
    """A grid over methods, layers and counts, for six layers; those above the budget are left out later."""
    layers, shares = (1, 2, 3), (0.05, 0.1, 0.2, 0.3, 0.45)
    gone = [
        td.Drop(f"{n}:", x, score, "gone") for n in (0, *layers) for x in shares for score in ("random", "leverage")
    ]
    grid: list[Any] = [td.HiMix(f"{n}:") for n in range(4)]
    grid += [td.HMGen(one) for one in ("0:3", "1:4", "2:5", "3:6", "2:6", "::2", "1::2")]
    grid += [td.FastV(n, x) for n in layers for x in shares]
    grid += [td.RandomLTD(one, x) for one in ("1:-1", "1:", ":") for x in (0.1, 0.3, 0.5)]
    grid += [td.PyramidDrop((1, 3, 5), (x, x / 2, x / 4)) for x in (0.3, 0.5, 0.6)]
    grid += [td.HiDrop(1, (2, 3), (x, x / 2), 5) for x in (0.2, 0.5)]
    grid += [td.DuetVLM((2, 4), (x, 0)) for x in (0.2, 0.5)]
    return grid + gone


def main() -> None:
    """Advise, sweep, print, and append to the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400, help="batches of each task")
    parser.add_argument("--most", type=int, default=30, help="plans of the sweep, spread over the grid")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    study, task, shared = Study(steps=given.steps), TASKS[0], environment()
    model, batches, layout, loss = trained_dense(study)
    advice = advise(model, batches, layout, BUDGET, loss)
    print(advice.evidence(), flush=True)
    held = [(one, layout(one)) for one in batches if one["task"] == task]
    trials = Trials(Subject(model, batches, layout, loss), task, held)
    proposed = [one.method for one in advice.plans[task]]
    others = [one for one in trials.plans(plans()) if one.flops_ratio <= BUDGET]
    others = others[:: max(1, len(others) // given.most)]
    tried = [*advice.plans[task], *(one for one in others if one.method not in proposed)]
    tried += trials.plans([PAPER]) * (PAPER not in [one.method for one in tried])
    for rank, plan in enumerate(tried):
        sized = MethodsStudy(steps=given.steps, methods={"it": plan.method})
        scores = [train(sized, "it", seed).scores[task] for seed in range(given.seeds)]
        values = {
            "exact": [one["accuracy"] for one in scores],
            "NLL": [one["nll"] for one in scores],
            "FLOPs ratio": [plan.flops_ratio],
            "loss gap": [plan.loss_gap],
            "fidelity": [plan.fidelity],
        }
        config = {"updates": given.steps, "seeds": given.seeds, "budget": BUDGET, "proposed": rank == 0}
        config["candidate"] = plan.method in proposed
        rows = [row(task, str(plan.method), metric, "1", value, config, **shared) for metric, value in values.items()]
        print("   ".join(f"{one['metric']} {one['median']:.3f}" for one in rows), plan.method, flush=True)
        if given.out:
            append(given.out, rows)


if __name__ == "__main__":
    main()
