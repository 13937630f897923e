"""A training step at real widths under every method and backend, dense beside it, and that all are right.

    python -m benchmarks.gpu.step --seconds 150 --out rows.jsonl

One model and method after another, the most wanted first, until the seconds are over; what fails is noted, and the
next begins. At the end every method against the reference (`td.benchmark` refuses what is not equal), in float32 and
bfloat16, and some under FlexAttention.
Shape letters: B batch, T tokens, D hidden, L layers.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.results import append
from benchmarks.train.cases import Sizes, decoder, methods
from benchmarks.train.step import measure

SMALL = Sizes(layers=4, width=512, tokens=128, batch=2)
REAL = Sizes(layers=4, width=4096, head=128, vocabulary=32000, batch=4, dtype="bfloat16")
TINY = {"layers": 4, "width": 64, "head": 16, "vocabulary": 64, "tokens": 32, "batch": 1}
FIRST = "HiMix", "HMGen middle", "Drop gone 25%", "HiMix labelled"
# Without a package of its own, sdpa's flash kernel is the one that the dense model runs on.
BACKENDS = "flex_attention", "flash_attention_2", "eager"


def plan(rehearse: bool) -> Iterator[tuple[Sizes, list[str], bool]]:
    """Sizes, methods in order, and whether they are timed only, not compared with the reference."""
    shrunk = TINY if rehearse else {}
    every = list(methods(replace(SMALL, **shrunk)))[:: 9 if rehearse else 1]
    rest = [name for name in methods(replace(REAL, **shrunk)) if name not in FIRST][: 1 if rehearse else None]
    first, few = list(FIRST), list(FIRST[: 1 if rehearse else 3])
    yield replace(REAL, **{"tokens": 2048} | shrunk), few if rehearse else first, True
    yield replace(REAL, **{"tokens": 8192} | shrunk), few if rehearse else first, True
    for backend in BACKENDS:
        yield replace(REAL, **{"tokens": 2048, "attention": backend} | shrunk), few, True
    for tokens in (2048, 8192):
        yield replace(REAL, **{"tokens": tokens} | shrunk), rest, True
    yield replace(SMALL, **{"attention": BACKENDS[0]} | shrunk), few, False
    for dtype in ("float32", "bfloat16"):
        yield replace(SMALL, dtype=dtype, **shrunk), every, False


def main() -> None:
    """Measure until the time is over; rows and failures as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--failures", type=Path, required=True)
    given = parser.parse_args()
    stop, device = time.monotonic() + given.seconds, "cuda" if torch.cuda.is_available() else "cpu"
    for sizes, names, unchecked in plan(given.rehearse):
        if time.monotonic() > stop:
            sys.exit(f"out of time before {sizes}")
        base = None
        for name in names:
            if time.monotonic() > stop:
                sys.exit(f"out of time before {name}, {sizes}")
            try:
                base = decoder(sizes, device) if base is None else base
                rows = measure(base, sizes, [name], device, 3 if unchecked else 1, unchecked)
            except Exception as error:
                message = "".join(traceback.format_exception_only(error)).strip()
                print(f"FAILED {name}, {sizes}: {message}", flush=True)
                with given.failures.open("a") as file:
                    file.write(
                        json.dumps({"part": "step", "method": name, "config": sizes.config, "error": message}) + "\n"
                    )
                base = None if isinstance(error, torch.OutOfMemoryError) else base
                continue
            append(given.out, rows)
            said = {row["metric"]: row["median"] for row in rows if row["provider"] == name}
            print(f"{name}, {sizes}: {said}", flush=True)
        base = None
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
