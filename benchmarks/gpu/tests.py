"""The tests that a GPU runs: kernels, engine and methods on the device of TOKENDROP_TEST_DEVICE, a process each file.

    TOKENDROP_TEST_DEVICE=cuda python -m benchmarks.gpu.tests --seconds 150 --out rows.jsonl --log failures.txt

Only files that import nothing beyond torch, transformers, lightning, pytest and hypothesis. Which of them test lower
precisions: tests/kernels/test_gpu.py and tests/engine/test_precision.py.
Shape letters: none.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.results import ROOT, append, environment, row

FIRST = ("tests/kernels/test_gpu.py", "tests/engine/test_precision.py", "tests/engine/test_equivalence.py")
ROOMS = ("tests/kernels", "tests/methods", "tests/engine")
# PEFT, accelerate and bitsandbytes; and what runs on the CPU by its nature: offline compilation, the interpreter.
LEFT_OUT = (
    "tests/engine/forward/test_head.py", "tests/engine/model/test_hooked.py", "tests/engine/model/test_peft.py",
    "tests/engine/model/test_quantised.py", "tests/kernels/test_static.py", "tests/kernels/test_interpreted.py",
)  # fmt: skip
# Of torch 2.11 and its compiler, which pyproject.toml makes errors.
TORCHS_OWN = (
    "`torch.jit.script_method` is deprecated:DeprecationWarning",
    "The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
)
REHEARSED = ("tests/engine/plan/test_plan.py",)
OUTCOME = re.compile(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)


def selected() -> list[str]:
    """The files, in order: those that generate take minutes, and come last."""
    found = [file.relative_to(ROOT).as_posix() for room in ROOMS for file in sorted((ROOT / room).rglob("test_*.py"))]
    rest = sorted((one for one in found if one not in FIRST + LEFT_OUT), key=lambda one: "test_generate" in one)
    return [*FIRST, *rest]


def outcome(file: str, stop: float) -> tuple[str, dict[str, int], str]:
    """How many tests of a file passed, failed and were skipped; and what was printed."""
    left = stop - time.monotonic()
    if left < 5:
        return file, {"not run": 1}, ""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "-m", "not slow"]
    command += [*(word for warning in TORCHS_OWN for word in ("-W", f"ignore:{warning}")), file]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)  # noqa: S603
        said, broken = ran.stdout + ran.stderr, ran.returncode not in (0, 1, 5)
    except subprocess.TimeoutExpired as ended:
        said, broken = (ended.stdout or b"").decode(errors="replace") + "\nout of time", True
    found = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    for kind in OUTCOME.findall(said):
        found[kind] = found.get(kind, 0) + 1
    return file, {key.lower(): count for key, count in found.items()} | {"broken off": int(broken)}, said


def main() -> None:
    """Run them side by side, and write a row for each file and what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) * 3 // 4))
    parser.add_argument("--rehearse", action="store_true", help="one file")
    parser.add_argument("--only", nargs="+", help="files or tests; by default all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    given = parser.parse_args()
    stop, config = time.monotonic() + given.seconds, {"test device": os.environ.get("TOKENDROP_TEST_DEVICE", "cpu")}
    files, shared, bad = given.only or (REHEARSED if given.rehearse else selected()), environment(), 0
    with ThreadPoolExecutor(given.workers) as pool:
        for file, counts, said in pool.map(lambda one: outcome(one, stop), files):
            append(given.out, [row("tests", file, kind, "tests", [n], config, **shared) for kind, n in counts.items()])
            print(file, {kind: n for kind, n in counts.items() if n}, flush=True)
            if counts.get("failed") or counts.get("error") or counts.get("broken off"):
                bad += 1
                with given.log.open("a") as log:
                    log.write(f"==== {file}\n{said[-60_000:]}\n")
    sys.exit(f"{bad} of {len(files)} files failed" if bad else 0)


if __name__ == "__main__":
    main()
