"""SynergyMonitor under DDP and FSDP2: the same on both ranks, and equal to one process, with other tasks on each."""

import pytest
from gradients import Case
from monitor_ranks import alone, on_rank
from ranks import on_ranks

LIGHTNING_WARNS = "ignore:.isinstance.treespec, LeafSpec:FutureWarning"
CASES = [Case(wrap, ((), ()), separate) for wrap in ("ddp", "fsdp") for separate in ("none", "shared")]


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(on_rank, CASES)


@pytest.mark.filterwarnings(LIGHTNING_WARNS, "ignore:It is recommended to use .self.log", "ignore:.*bottleneck")
@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{case.wrap}-{case.separate}" for case in CASES])
def test_two_ranks_equal_one_process(ranks, index, tmp_path):
    first, second = (dict(found[index]) for found in ranks)
    assert first.pop("same")
    assert second.pop("same")
    assert first.pop("events") == 1
    assert second.pop("events") is None
    assert first == second
    expected = alone(CASES[index], tmp_path)
    assert first.keys() == expected.keys()
    assert {"synergy/alignment/u/g", "synergy/fidelity/u", "synergy/affinity/u/g"} <= first.keys()
    assert first == pytest.approx(expected, rel=1e-9, abs=1e-9)
