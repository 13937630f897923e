"""The kernels compiled for devices that are not here: no spills, and rows moved 16 bytes at a time. And result rows."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("benchmark_results", ROOT / "benchmarks/results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TOKENDROP_KERNELS")}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**clean, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_no_spills_and_16_bytes(tmp_path, results):
    out = tmp_path / "static.jsonl"
    done = run("benchmarks.kernels.static", "--dtypes", "bfloat16", "--widths", "512", "4096", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    results.append(tmp_path / "again.jsonl", rows)
    assert not [row for row in rows if row["metric"] == "compiles"]
    cases = {(row["case"], row["config"]["target"], row["config"]["D"]) for row in rows}
    assert len(cases) == 6 * 4 * 2
    figures = {(row["case"], *row["config"].values(), row["metric"]): row["median"] for row in rows}
    for key, value in figures.items():
        expected = {"spills": value == 0, "load width": value == 16, "store width": value == 16}
        assert expected.get(key[-1], value >= 0), (key, value)
        assert key[-1] != "occupancy" or 0.2 < value <= 1, (key, value)


def test_bandwidth_needs_a_gpu(tmp_path):
    done = run("benchmarks.kernels.bandwidth", "--out", str(tmp_path / "bandwidth.jsonl"))
    assert done.returncode == 0 or "bandwidth is measured on a GPU" in done.stderr


def test_rows_follow_the_schema(tmp_path, results):
    path, shared = tmp_path / "new" / "rows.jsonl", results.environment("a device")
    row = results.row("case", "ours", "time", "s", [3.0, 1.0, 2.0, 5.0, 4.0], {"B": 1}, **shared)
    results.append(path, [row])
    results.append(path, [row])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row, row]
    assert (row["median"], row["p20"], row["p80"], row["n"]) == (3.0, 1.8, 4.2, 5)
    assert set(row["versions"]) == {"python", "torch", "triton", "tokendrop"}
    assert row["device"] == "a device"
    assert len(row["commit"]) >= 7


@pytest.mark.parametrize(
    ("change", "message"),
    [({"extra": 1}, "found .*extra"), ({"n": "5"}, "n: expected .*'5'"), ({"median": True}, "median: .*True")],
)
def test_other_rows_are_refused(tmp_path, results, change, message):
    row = results.row("case", "ours", "time", "s", [1.0], {}, **results.environment("a device"))
    with pytest.raises(ValueError, match=message):
        results.append(tmp_path / "rows.jsonl", [row, row | change])
    assert not (tmp_path / "rows.jsonl").exists()
