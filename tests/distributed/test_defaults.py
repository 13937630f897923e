"""Every callback with nothing but its defaults ends on two ranks, whose tasks differ, and says the same on both."""

import math

import pytest
from defaults_ranks import allocation, on_rank
from gradients import Case
from ranks import on_ranks

CASES = [Case(wrap, ((), ())) for wrap in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(on_rank, CASES, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.wrap for case in CASES])
def test_no_rank_waits_for_another(ranks, index):
    first, second = (found[index] for found in ranks)
    assert first["steps"][:2] == [1, 6]
    # Equal to the bit, also where nothing is known.
    assert repr(first["synergy"]) == repr(second["synergy"])
    assert math.isfinite(first["synergy"]["synergy/conflict/u/g"])
    assert {"synergy/fidelity/u", "synergy/fidelity/g"} <= first["synergy"].keys()


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.wrap for case in CASES])
def test_allocation_is_that_of_all_batches(ranks, index):
    expected = allocation()
    for found in (one[index] for one in ranks):
        assert found["layers"].keys() == set(expected.tasks) == {"u", "g", "dense"}
        for task, share in zip(expected.tasks, expected.share.tolist(), strict=True):
            for layer, segments in zip(found["layers"][task], share, strict=True):
                assert layer == pytest.approx(segments, abs=1e-9)
            for name, value in zip(expected.segments, zip(*share, strict=True), strict=True):
                assert found["allocation"][f"allocation/{task}/{name}"] == pytest.approx(
                    sum(value) / len(value), abs=1e-6
                )
