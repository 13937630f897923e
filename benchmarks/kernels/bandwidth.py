"""Bytes per second of every kernel and of its torch reference, against a device copy in the same run.

Run from the repository root, on a machine with a GPU: `python -m benchmarks.kernels.bandwidth`. `--device cpu`
rehearses it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases import cases
from benchmarks.results import ROOT, append, environment, row
from benchmarks.train.measure import seconds as on_cpu


def seconds(runs: dict[Any, Callable[[], Any]], repeats: int, warmup: int = 5) -> dict[Any, list[float]]:
    """Device time of each run, one of each in turn, so that a change of clock meets all of them."""
    if not torch.cuda.is_available():
        return on_cpu(runs, repeats, warmup)
    events = {key: [] for key in runs}
    for repeat in range(warmup + repeats):
        for key, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            if repeat >= warmup:
                events[key].append((start, stop))
        torch.cuda.synchronize()  # once a round: a kernel is not timed while another waits for the host
    return {key: [start.elapsed_time(stop) / 1e3 for start, stop in pairs] for key, pairs in events.items()}


def measure(
    dtype: torch.dtype, sizes: dict[str, int], repeats: int, shared: dict[str, Any], device: str
) -> list[dict[str, Any]]:
    """Rows of bytes per second for one dtype."""
    shape = (sizes["batch"], sizes["tokens"], sizes["width"])
    source, target = torch.randn(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
    runs: dict[Any, Callable[[], Any]] = {("copy", "torch"): lambda: target.copy_(source)}
    moved = {"copy": 2 * source.numel() * dtype.itemsize}
    for label, case in cases(dtype, device=device, **sizes).items():
        moved[label] = case.rows * sizes["width"] * dtype.itemsize
        runs |= {(label, provider): run for provider, run in case.runs().items()}
    config = {"dtype": str(dtype).removeprefix("torch."), **sizes}
    with torch.no_grad():
        times = seconds(runs, repeats)
    return [
        row(label, provider, "bandwidth", "bytes/s", [moved[label] / time for time in found], config, **shared)
        for (label, provider), found in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    for name, value in {"batch": 8, "tokens": 4096, "kept": 1024, "width": 4096, "repeats": 50}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels-bandwidth.jsonl")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bandwidth is measured on a GPU, and torch sees none here; static.py needs none")
    sizes = {name: getattr(args, name) for name in ("batch", "tokens", "kept", "width")}
    shared = environment()
    rows = [
        found
        for name in args.dtypes
        for found in measure(getattr(torch, name), sizes, args.repeats, shared, args.device)
    ]
    append(args.out, rows)
    print(f"{len(rows)} rows in {args.out}")


if __name__ == "__main__":
    main()
