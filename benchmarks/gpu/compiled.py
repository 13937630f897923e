"""A compiled training step beside the same step as it is, dense and under methods.

    python -m benchmarks.gpu.compiled --out rows.jsonl

Shape letters: B batch, T tokens, D hidden, L layers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import tokendrop as td
from benchmarks.results import append, environment, row
from benchmarks.train.cases import Sizes, Step, decoder, inputs
from benchmarks.train.measure import seconds
from tokendrop.analysis.timing import now

CASE = "compiled step"
SIZES = Sizes(layers=4, width=2048, head=128, tokens=2048, vocabulary=32000, batch=2, dtype="bfloat16")
TINY = Sizes(layers=3, width=64, head=16, tokens=32, vocabulary=64)
METHODS: dict[str, Any] = {
    "dense": None, "HiMix": td.HiMix(), "HMGen": td.HMGen("1:-1"), "Drop gone": td.Drop("1:", keep=0.25, then="gone"),
}  # fmt: skip


def main() -> None:
    """Compile, measure, and append to the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny, and compiled by aot_eager")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device, sizes = "cuda" if torch.cuda.is_available() else "cpu", TINY if given.rehearse else SIZES
    backend = "aot_eager" if given.rehearse else "inductor"
    base, (ids, layout), shared = decoder(sizes, device), inputs(sizes, device), environment()
    for name, method in list(METHODS.items())[slice(1, 2) if given.rehearse else slice(None)]:
        plain, compiled = Step(base, ids, layout, method), Step(base, ids, layout, method)
        compiled.model.compile(backend=backend)
        start = now()
        compiled()
        once = now() - start
        found = seconds({"plain": plain, "compiled": compiled}, given.rounds, warmup=2)
        figures = {
            ("seconds", "s"): found["compiled"],
            ("time ratio to uncompiled", "1"): [a / b for a, b in zip(found["compiled"], found["plain"], strict=True)],
            ("first call", "s"): [once],
        }
        config = sizes.config | {"backend": backend}
        rows = [row(CASE, name, metric, unit, each, config, **shared) for (metric, unit), each in figures.items()]
        append(given.out, rows)
        print(name, {one["metric"]: one["median"] for one in rows}, flush=True)


if __name__ == "__main__":
    main()
