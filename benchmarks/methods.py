"""Every method on the demo's understanding task at about equal FLOPs: quality over seeds, time and memory side by side.

    python benchmarks/methods.py --out benchmarks/results/methods.jsonl

Where a method has a count, it is the one whose counted FLOPs are nearest those of HiMix from layer 3 of 6 on.
Shape letters: M image tokens.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokendrop as td
from benchmarks.results import append, environment, row
from benchmarks.train.measure import seconds
from tokendrop.study.costs import Steps
from tokendrop.study.study import Run, Study
from tokendrop.study.train import train

TASK, IMAGES, DENSE, TARGET = "understanding", 32, "dense", "HiMix, layers 3:"
FIXED: dict[str, Any] = {DENSE: None, TARGET: td.HiMix("3:"), "HMGen, layers 3:": td.HMGen("3:")}
COUNTED: dict[str, Callable[[int], Any]] = {
    "RandomLTD": lambda k: td.RandomLTD("1:-1", k),
    "SkipVision": lambda k: td.SkipVision(":", k),
    "MixtureOfDepths": lambda k: td.MixtureOfDepths("1:", k),
    "Drop random, layer 2": lambda k: td.Drop("2:", k, then="gone"),
    "Drop uniform, layer 2": lambda k: td.Drop("2:", k, "uniform", then="gone"),
    "Drop leverage, layer 2": lambda k: td.Drop("2:", k, "leverage", then="gone"),
    "SVDPrune, layer 0": lambda k: td.SVDPrune(k),
    "FastV, layer 2": lambda k: td.FastV(2, k),
    "PyramidDrop, layers 1 3 5": lambda k: td.PyramidDrop((1, 3, 5), (k, k // 2, k // 4)),
    "HiDrop, entry 1, layers 2 3, exit 5": lambda k: td.HiDrop(1, (2, 3), (k, k // 2), 5),
    "DuetVLM text stages, layers 2 4": lambda k: td.DuetVLM((2, 4), (k, 0)),
}


@dataclass(frozen=True)
class MethodsStudy(Study):
    """Runs of one task, each under one method."""

    methods: Mapping[str, Any] = field(default_factory=dict)

    @override
    def runs(self) -> dict[str, Run]:
        """A run for each method."""
        return {name: Run((TASK,), {} if one is None else {TASK: one}) for name, one in self.methods.items()}


def flops(method: Any) -> int:
    """Counted FLOPs of a step."""
    return Steps(MethodsStudy(methods={"it": method}), "it").flops()


def at_equal_flops(only: list[str]) -> dict[str, Any]:
    """The methods, with the count that comes nearest the target's FLOPs."""
    target = flops(FIXED[TARGET])
    found = {name: one for name, one in FIXED.items() if not only or name in only or name == DENSE}
    for name, make in COUNTED.items():
        if only and name not in only:
            continue
        apart = {count: abs(flops(make(count)) - target) for count in range(1, IMAGES + 1)}
        found[name] = make(min(apart, key=lambda count: apart[count]))
    return found


def main() -> None:
    """Train, measure, print, and append to the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    study, shared = MethodsStudy(methods=at_equal_flops(given.only)), environment()
    steps = {name: Steps(study, name) for name in study.methods}
    timed = seconds({name: _stepper(one) for name, one in steps.items()}, given.rounds)
    for name, method in study.methods.items():
        scores = [train(study, name, seed).scores[TASK] for seed in range(given.seeds)]
        values = {
            "exact": [one["accuracy"] for one in scores],
            "NLL": [one["nll"] for one in scores],
            "FLOPs ratio": [steps[name].flops() / steps[DENSE].flops()],
            "time ratio": [a / b for a, b in zip(timed[name], timed[DENSE], strict=True)],
            "memory ratio": [steps[name].peak_bytes() / steps[DENSE].peak_bytes()],
        }
        config = {"method": str(method), "updates": study.steps, "seeds": given.seeds, "threads": 1}
        rows = [row(TASK, name, metric, "1", value, config, **shared) for metric, value in values.items()]
        print(f"{name:40}" + "   ".join(f"{one['metric']} {one['median']:.3f}" for one in rows), method, flush=True)
        if given.out:
            append(given.out, rows)


def _stepper(steps: Steps) -> Callable[[], None]:
    return lambda: steps.step(steps.batches[0])


if __name__ == "__main__":
    main()
