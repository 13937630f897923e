"""Batches that are wrong in every way: an error with the value, a module and a trainer as before, and a next fit."""

import pytest
import torch
from helpers import snapshot
from lit_llama import LIGHTNING_WARNS, METHODS, TOKENS, Batches, Lit, batch, trainer

import tokendrop as td
from tokendrop.engine.forward.span import frames

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)

ROWS = torch.ones(2, TOKENS)
CASES = {
    "no mapping": ([1, 2], td.BatchError, "list"),
    "nothing": ({}, td.BatchError, "[]"),
    "other keys": ({"x": 3}, td.BatchError, "'x'"),
    "image of floats": ({"image_mask": ROWS}, td.LayoutTypeError, "torch.float32"),
    "image of a list": ({"image_mask": [[True]]}, td.LayoutTypeError, "[[True]]"),
    "image of one row": ({"image_mask": ROWS[0].bool()}, td.LayoutTypeError, "(16,)"),
    "image of another length": ({"image_mask": ROWS[:, :3].bool()}, td.LayoutError, "(2, 3)"),
    "image of another batch": ({"image_mask": ROWS.bool()[:1]}, td.LayoutError, "(1, 16)"),
    "labels of floats": ({"labels": ROWS}, td.LayoutTypeError, "torch.float32"),
    "mask of another length": ({"attention_mask": ROWS[:, :3].long()}, td.LayoutError, "(2, 3)"),
    "no task": ({"task": None}, td.LayoutError, "'u', 'g'"),
    "task of a number": ({"task": 3}, td.LayoutTypeError, "3"),
    "too many tasks": ({"task": ["u", "g", "u"]}, td.LayoutError, "3 names for 2"),
    "trained image rows": (batch(0, "g") | {"task": "u"}, td.NeededRowError, "trains 8 image rows"),
    "segments outside": ({"segments": ROWS.long() * 9}, td.LayoutError, "9"),
    "segments of floats": ({"segments": ROWS}, td.LayoutTypeError, "torch.float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_batch_is_refused_and_the_next_fit_works(case):
    wrong, error, value = CASES[case]
    given = wrong if not isinstance(wrong, dict) or not wrong or "x" in wrong else batch(1, "u") | wrong
    module, callback = Lit(), td.TokenDrop(METHODS)
    trainer(callback).fit(module, Batches(batch(0)))
    module.zero_grad()
    before, weights = snapshot(module), {name: x.clone() for name, x in module.state_dict().items()}
    run = trainer(callback)
    with pytest.raises(error) as caught:
        run.fit(module, Batches(given))
    assert value in str(caught.value)
    assert not frames(callback.handle.key)
    assert all(torch.equal(x, weights[name]) for name, x in module.state_dict().items())
    after = snapshot(module)
    assert [one[:3] for one in after] == [one[:3] for one in before]
    trainer(callback).fit(module, Batches(batch(0)))
    assert len(module.losses) == 2


def test_an_unknown_task_warns_and_runs_dense():
    module = Lit()
    with pytest.warns(td.NoEffectWarning, match="'typo'"):
        trainer(td.TokenDrop(METHODS)).fit(module, Batches(batch(0, "typo")))
    assert len(module.losses) == 1
