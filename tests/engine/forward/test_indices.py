"""No row is gathered or scattered twice in one sample: the kernels' backward on an accelerator is written for that."""

import pytest
from generation import METHODS
from helpers import MIXED, batch, dropped, engine_step, llama

import tokendrop as td

MORE = {
    "merge rejoin": td.Drop("1:3", 0.4, "norm", "merge"),
    "random rejoin": td.RandomLTD("1:3", 0.4),
    "mixture of depths": td.MixtureOfDepths("1::2", 0.5),
    "divprune": td.DivPrune(keep=0.5),
    "per image": td.Drop("1:3", 0.5, "norm", per="image"),
}
EVERY = METHODS | MORE


@pytest.mark.parametrize("name", EVERY)
def test_each_row_comes_once(name, monkeypatch):
    """With `TOKENDROP_DEBUG` the kernels look."""
    made = batch(MIXED[0], "uuuuu", "left")
    model, drop = dropped(llama(layers=5), EVERY[name], multiple=4)
    monkeypatch.setenv("TOKENDROP_DEBUG", "1")
    engine_step(model, drop, made)
