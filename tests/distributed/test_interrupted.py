"""Runs killed with SIGKILL at random places go on bit-identically from their last checkpoint."""

import signal
from pathlib import Path

import interrupted
import pytest
import torch

from tokendrop.synergy import read_history

RUNS = {"one rank": (1, ""), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}
CHAINS = [("one rank", 0, 3), ("ddp", 1, 4), *(("one rank", seed, 5) for seed in (2, 3, 4)), ("fsdp", 6, 3)]


@pytest.fixture(scope="module")
def preloaded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(interrupted.__file__).parent}:{Path.cwd()}")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, preloaded):
    """What training leaves that nobody kills, made once for each number of ranks."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / "run"
            interrupted.chain(made[name], *RUNS[name])
        return made[name]

    return of


def same(found, expected):
    """Whether two trees of plain data are equal, tensors to the bit."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected or (found != found and expected != expected)


def events(folder):
    return [event | {"seconds": 0} for event in read_history(folder / "synergy.jsonl")]


def loaded(path):
    return torch.load(path, weights_only=True)


def marked(name, seed, kills):
    return pytest.param(name, seed, kills, id=f"{name}-{seed}", marks=[pytest.mark.slow] if name == "fsdp" else [])


@pytest.mark.parametrize(("name", "seed", "kills"), [marked(*chain) for chain in CHAINS])
def test_a_killed_run_goes_on_bit_identically(whole, tmp_path, name, seed, kills):
    expected, found = whole(name), tmp_path / "run"
    ranks, wrap = RUNS[name]
    killed = interrupted.chain(found, ranks, wrap, interrupted.kill_points(seed, kills))
    assert killed == [-signal.SIGKILL] * kills
    assert events(found) == events(expected)
    assert len(events(found)) >= 5
    assert not any("gap" in event for event in events(found))
    for rank in range(ranks):
        assert same(loaded(found / f"left-{rank}.pt"), loaded(expected / f"left-{rank}.pt"))
    ours, theirs = (loaded(folder / "last.ckpt") for folder in (found, expected))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert ours[part]
        assert same(ours[part], theirs[part]), part
    (monitor,) = [key for key in ours["callbacks"] if "SynergyMonitor" in key]
    assert len(ours["callbacks"][monitor]["recent"]) == ranks
    assert same(ours["callbacks"][monitor], theirs["callbacks"][monitor])


def test_twenty_kills_in_all():
    assert sum(kills for name, _, kills in CHAINS if name != "fsdp") >= 20
