"""Registers, spills, access widths, shared memory and occupancy of every kernel, compiled for devices not here.

The package's own launchers run on CPU tensors, up to the launch, with a Triton driver that only names a target: what is
compiled is what a device would be given. Run from the repository root: `python -m benchmarks.kernels.static`.
"""

import argparse
import contextlib
import io
import itertools
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from benchmarks.kernels.cases import Case, cases
from benchmarks.results import ROOT, append, environment, row
from tokendrop.kernels import triton_rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# CUDA C++ Programming Guide, technical specifications by compute capability. All three: 64 warps, 32 blocks and 65,536
# registers an SM. Its shared memory, of which each block takes 1 KiB more than it asks for:
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
LOGS: dict[str, str] = {}  # what ptxas said, by the hash of the kernel
SIZES = {"batch": 2, "tokens": 64, "kept": 32}
PTX = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[buf](\d+)\b")
AMD = re.compile(r"\b(?:global|buffer)_(load|store)_(\w+)")
AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


class Offline:
    """A Triton driver that names a target and has no device."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name  # only a key of Triton's cache

    def get_current_stream(self, device: str) -> int:
        return 0


def compiled(name: str, case: Case) -> tuple[Any, int]:
    """The kernel that the launcher of `case` would launch on target `name`, and the elements of its tile."""
    found, run = [], JITFunction.run

    def warm_up(kernel, *args, grid, warmup, **options):
        found.append((run(kernel, *args, grid=grid, warmup=True, **options), options))

    driver.set_active(Offline(name))
    JITFunction.run = warm_up
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            getattr(triton_rows, case.op)(*case.args)
    finally:
        JITFunction.run = run
    (kernel, options), *_ = found
    LOGS.setdefault(kernel.hash, log.getvalue())  # nothing where the case before was the same kernel
    return kernel, options.get("ROWS", 1) * options["COLS"]


def widths(assembly: dict[str, str]) -> dict[str, Counter[int]]:
    """How many loads and stores of global memory there are in the code, by bytes a thread."""
    found = {"load": Counter(), "store": Counter()}
    for kind, count, bits in PTX.findall(assembly.get("ptx", "")):
        found[{"ld": "load", "st": "store"}[kind]][int(count or 1) * int(bits) // 8] += 1
    for kind, size in AMD.findall(assembly.get("amdgcn", "")):
        found[kind][AMD_BYTES.get(size, 2)] += 1
    return found


def nvidia(name: str, kernel: Any) -> dict[str, float]:
    log = LOGS[kernel.hash]
    (registers,), stores, loads = (
        [int(value) for value in re.findall(pattern, log)]
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    # Registers go to a warp in 256s, and warps to the four schedulers evenly.
    fitting = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4
    blocks = min(64 // warps, 32, fitting // warps, SHARED[name] // (shared + 1024))
    return {"registers": registers, "spills": sum(stores + loads), "occupancy": blocks * warps / 64}


def amd(name: str, kernel: Any) -> dict[str, float]:
    text = kernel.asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"\.(\w+_count): +(\d+)", text)}
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    # AMD Instinct MI300 ISA guide: four SIMDs in a unit, each of 8 waves at most and 512 vector registers, given to a
    # wave 8 at a time; 64 KiB of shared memory in the unit. 102 scalar registers are every wave's.
    waves = min(8, 512 // (-(-used["vgpr_count"] // 8) * 8))
    groups = min(4 * waves // warps, 64 * 1024 // shared if shared else 32)
    spills = used["vgpr_spill_count"] + used["sgpr_spill_count"]
    return {"registers": used["vgpr_count"], "spills": spills, "occupancy": groups * warps / 32}


def figures(name: str, case: Case, size: int) -> dict[str, tuple[float, str]]:
    """Metric: (value, unit) of one kernel for one target; rows have elements of `size` bytes."""
    kernel, tile = compiled(name, case)
    threads = kernel.metadata.num_warps * TARGETS[name].warp_size
    found = widths(kernel.asm)
    needed = {"load": case.loads * size, "store": case.stores * size}
    used = (nvidia if TARGETS[name].backend == "cuda" else amd)(name, kernel)
    out = {
        "registers": (used["registers"], "registers/thread"),
        "spills": (used["spills"], "bytes/thread" if "cubin" in kernel.asm else "registers/thread"),
        "shared memory": (kernel.metadata.shared, "bytes"),
        "occupancy": (used["occupancy"], "1"),
    }
    for kind, counts in found.items():
        # What a thread needs of its tile, 16 bytes at a time; accesses beyond these are indices and scales.
        complete = counts[16] * 16 * threads >= tile * needed[kind]
        width = 16 if complete else max((size for size in counts if size < 16), default=0)
        out[f"{kind} width"] = (width, "bytes")
    return out


def rows_of(name: str, dtype: torch.dtype, width: int, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all kernels for one target, dtype and width; where one does not compile, a row that says why."""
    out = []
    for label, case in cases(dtype, width, device="cpu", **SIZES).items():
        config = {"target": name, "dtype": str(dtype).removeprefix("torch."), "D": width}
        try:
            found = figures(name, case, dtype.itemsize)
        except Exception as error:  # any of the compiler's
            reason = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            out.append(row(label, "triton", "compiles", "1", [0], config | reason, **shared))
            continue
        out += [
            row(label, "triton", metric, unit, [value], config, **shared) for metric, (value, unit) in found.items()
        ]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels-static.jsonl")
    args = parser.parse_args()
    shared = environment("none: compiled only")
    rows = []
    knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache  # ptxas says nothing about what was compiled before
        for name, dtype, width in itertools.product(args.targets, args.dtypes, args.widths):
            rows += rows_of(name, getattr(torch, dtype), width, shared)
    args.out.unlink(missing_ok=True)
    append(args.out, rows)
    print(f"{len(rows)} rows in {args.out}")


if __name__ == "__main__":
    main()
