"""The Triton kernels without a GPU: interpreted in a process of their own, as Triton decides when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "TOKENDROP_KERNELS": "triton", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
