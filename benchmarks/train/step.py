"""One training step under each method beside the dense one: FLOPs, seconds and memory, in one run.

    python benchmarks/train/step.py                              # the table of the README
    python benchmarks/train/step.py --tokens 4096 --layers 4     # other sizes
    python benchmarks/train/step.py --only HiMix "HMGen middle"  # some methods

capture = (FLOPs ratio) / (time ratio), both against dense: 1 where every saved FLOP saved its time.
saved-time share = (1 - time ratio) / (1 - FLOPs ratio).
Shape letters: B batch, T tokens, D hidden, L layers.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.results import append, environment, row
from benchmarks.train.cases import Sizes, Step, decoder, inputs, methods
from benchmarks.train.measure import peak_bytes, seconds
from tokendrop.analysis.memory import saved_bytes
from tokendrop.analysis.spent import task_costs

IDLE = "nothing dropped"


def idle(handle: Any) -> None:
    """Switch every layer's dropping off."""
    handle.strength = 0.0


def make_steps(sizes: Sizes, only: list[str] | None, device: str) -> dict[str, Step]:
    """The steps by name, each on a copy of one model; "dense" is untouched."""
    base = decoder(sizes).to(device)
    ids, layout = inputs(sizes, device)
    chosen = {name: one for name, one in methods(sizes).items() if not only or name in only}
    steps = {"dense": Step(base, ids, layout)}
    if not only or IDLE in only:
        steps[IDLE] = Step(base, ids, layout, methods(sizes)["HiMix"][0], idle)
    return steps | {name: Step(base, ids, layout, method, **options) for name, (method, options) in chosen.items()}


def costs(step: Step) -> tuple[float, float]:
    """FLOPs ratio and kept ratio, by formula."""
    if step.handle is None:
        return 1.0, 1.0
    with step.handle.layout(step.layout) as plan:
        (cost,) = task_costs(step.handle, plan, step.layout.tasks[:1] * len(step.layout.image)).values()
    return cost.flops_ratio, cost.kept_ratio


def memory(step: Step) -> int:
    """Bytes kept for the backward, or on an accelerator the most bytes of the step."""
    return peak_bytes(step) if torch.cuda.is_available() else saved_bytes(step.forward, list(step.model.parameters()))


def measure(steps: Mapping[str, Step], sizes: Sizes, rounds: int) -> list[dict[str, Any]]:
    """Result rows of every step."""
    shared, config = environment(), sizes.config | {"threads": torch.get_num_threads()}
    times, bytes_of = seconds(steps, rounds), {name: memory(step) for name, step in steps.items()}
    rows = []
    for name, step in steps.items():
        flops, kept = costs(step)
        ratios = [one / dense for one, dense in zip(times[name], times["dense"], strict=True)]
        figures = {
            ("seconds", "s"): times[name],
            ("time ratio", "1"): ratios,
            ("FLOPs ratio", "1"): [flops],
            ("kept ratio", "1"): [kept],
            ("memory", "B"): [bytes_of[name]],
            ("memory ratio", "1"): [bytes_of[name] / bytes_of["dense"]],
            ("capture", "1"): [flops / ratio for ratio in ratios],
        }
        if flops < 1:
            figures["saved-time share", "1"] = [(1 - ratio) / (1 - flops) for ratio in ratios]
        rows += [row("train step", name, *metric, values, config, **shared) for metric, values in figures.items()]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, a line for each step."""
    metrics = ("seconds", "FLOPs ratio", "time ratio", "capture", "kept ratio", "memory ratio")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in rows:
        found.setdefault(one["provider"], {})[one["metric"]] = one
    lines = [f"{'':20}" + "".join(f"{name:>22}" for name in metrics)]
    for name, by in found.items():
        cells = [f"{by[m]['median']:.3f} [{by[m]['p20']:.3f} {by[m]['p80']:.3f}]" for m in metrics]
        lines.append(f"{name:20}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and append to the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    given = vars(parser.parse_args())
    rounds, only, out = given.pop("rounds"), given.pop("only"), given.pop("out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    sizes = Sizes(**given)
    rows = measure(make_steps(sizes, only, device), sizes, rounds)
    print(table(rows))
    if out:
        append(out, rows)


if __name__ == "__main__":
    main()
