"""Every method beside dense training of equal FLOPs: its plans, its table, and the rows that are committed.

Shape letters: none.
"""

import json
import re
import sys
from pathlib import Path

import pytest

from tokendrop import methods
from tokendrop.study.frontier import SCALES, key, one_run
from tokendrop.study.frontier_summary import flops, name_of, names

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.methods import DENSE, METHODS, Comparison, table  # noqa: E402

# Lightning 2.6 calls a function that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

U, G = "understanding", "generation"
ROWS = [json.loads(line) for line in (ROOT / "benchmarks/results/frontier/methods.jsonl").read_text().splitlines()]
# They need a vision encoder, or save no FLOPs.
LEFT_OUT = {"VisionZip", "VScan", "MixtureOfTransformers"}


def row(plan, seed, u, g, updates=1.0, spent=100.0):
    told = {U: {"accuracy": u, "nll": 1 - u}, G: {"nll": g}}
    return {"plan": plan, "updates": updates, "seed": seed, "flops": spent, **told}


def test_every_method_is_compared_or_said_not_to_be():
    assert {type(one).__name__ for one in METHODS.values()} | LEFT_OUT == set(methods.__all__)
    page = (ROOT / "docs" / "comparison.md").read_text()
    assert all(name in page for name in LEFT_OUT)


def test_the_regime_is_that_of_the_frontier():
    study, frontier = Comparison(), SCALES["digits"]
    assert (study.scenes, study.steps, study.tested) == (frontier.scenes, frontier.steps, "val")
    assert {name: list(plan.methods) for name, plan in study.plans().items()} == {
        "dense": [],
        **{name: [U] for name in METHODS},
    }
    assert {plan.tasks for plan in study.plans().values()} == {(U, G)}


def test_a_run_drops_tokens_of_understanding_only():
    sizes = {"codes": 16, "hidden": 16, "heads": 2, "batch_size": 4, "val_scenes": 4, "test_scenes": 8}
    study = Comparison(steps=2, curve_points=1, **sizes)
    dense, made = (one_run(study, name, 0) for name in ("dense", "HiMix, layers 2:"))
    assert made["config"]["methods"] == {U: "HiMix(layers='2:', separate='none')"}
    assert made["flops"] < dense["flops"]
    assert {"accuracy", "nll"} <= made[U].keys()
    assert "nll" in made[G]
    assert "agreement" not in made[G]  # no image is drawn


def test_differences_are_to_dense_training_of_equal_flops():
    rows = [
        *(row("dense", seed, 0.5, 1.75) for seed in range(2)),
        *(row("dense", seed, 0.25, 2.0, 0.5, 50.0) for seed in range(2)),
        *(row("it", seed, 0.5 + seed / 8, 1.75, spent=60.0) for seed in range(2)),
    ]
    shown = {line[0]: line[1:] for line in table(rows).rows}
    # Dense training for 0.6: exact 0.3, NLL of U 0.7, of G 1.95; 0.2625 +- 12.706 * 0.0884 / sqrt 2.
    assert shown["it"] == ("2", "0.60", "0.6 ±0.8", "0.4 ±0.8", "1.750", "+0.3 ±0.8", "+0.3 ±0.8", "+0.200")
    assert shown["dense"] == ("2", "1.00", "0.500", "0.500", "1.750", "", "", "")


def test_committed_rows_are_of_these_methods_at_equal_flops():
    assert len({key(one) for one in ROWS}) == len(ROWS)
    assert {name_of(one) for one in ROWS} == {*DENSE, *METHODS}
    for one in ROWS:
        assert re.fullmatch(r"[0-9a-f]{7,}", one["commit"])  # of clean code
        named = METHODS.get(one["plan"])
        assert one["config"]["methods"] == ({} if named is None else {U: str(named)})
        assert (one["split"], one["config"]["tested"], one["config"]["few"]) == ("val", "val", 300)
    shares = {name: flops(ROWS, name) for name in names(ROWS)}
    target = shares["HiMix, layers 2:"]
    assert all(abs(share - target) < 0.025 for name, share in shares.items() if name not in (DENSE[0], DENSE[2]))
    assert min(shares, key=lambda name: shares[name]) == DENSE[2]
