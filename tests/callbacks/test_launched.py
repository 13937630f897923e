"""Trainers that run in processes which they start: what is added there comes home, or is refused."""

import pytest
import torch
from lit_llama import LIGHTNING_WARNS, Batches, Lit, batch, llama, trainer

import tokendrop as td

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
SHARED = td.HiMix(separate="shared")


def loader(count=3):
    return Batches(*(batch(seed, "u") for seed in range(count)))


def by_hand(method):
    model = llama()
    drop = td.apply(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for given in loader():
        with drop.layout(td.TokenLayout(given["image_mask"], labels=given["labels"])):
            model(given["input_ids"], attention_mask=given["attention_mask"], labels=given["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_trained(module, expected):
    found = {name.removeprefix("model."): value for name, value in module.named_parameters()}
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_what_was_trained_comes_home_and_is_tested(strategy):
    module = Lit()
    trainer(td.TokenDrop(SHARED), strategy=strategy).fit(module, loader())
    expected = by_hand(SHARED)
    assert_trained(module, expected)
    given = batch(9, "u")
    (found,) = trainer(td.TokenDrop(SHARED)).test(module, Batches(given), verbose=False)
    with torch.no_grad(), td.handle(expected).layout(td.TokenLayout(given["image_mask"], labels=given["labels"])):
        loss = expected(given["input_ids"], labels=given["labels"]).loss.item()
    assert found["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_method_that_adds_nothing_comes_home_in_two_processes():
    # Two processes see the same batches: Lightning shards only loaders that it knows, so averages are one's gradients.
    module = Lit()
    trainer(td.TokenDrop(td.HMGen("1:3")), strategy="ddp_notebook", devices=2).fit(module, loader())
    assert_trained(module, by_hand(td.HMGen("1:3")))


def test_dropped_by_hand_before_comes_home():
    module = Lit()
    td.apply(module, SHARED)
    trainer(td.TokenDrop(SHARED), strategy="ddp_fork").fit(module, loader())
    assert_trained(module, by_hand(SHARED))


def started(strategy, method=SHARED, stage="fit"):
    """As in a started process, where TokenDrop came too late for the caller's: from `configure_callbacks`."""
    module, callback = Lit(), td.TokenDrop(method)
    run = trainer(callback, strategy=strategy)
    run.state.fn = stage
    callback.setup(run, module, stage)
    callback.teardown(run, module, stage)
    return module


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_what_is_added_in_a_started_process_only_is_refused(strategy, monkeypatch):
    removed = []
    monkeypatch.setattr(td.Handle, "remove", lambda self, remove=td.Handle.remove: removed.append(self) or remove(self))
    with pytest.raises(td.UnsupportedError, match=r"DDPStrategy .* the 8 parameters that were added to Lit there"):
        started(strategy)
    assert len(removed) == 1
    assert "tokendrop" not in removed[0].owner._modules


@pytest.mark.parametrize(
    ("strategy", "method", "stage"),
    [("ddp_fork", td.HiMix(), "fit"), ("ddp_fork", SHARED, "test"), ("auto", SHARED, "fit"), ("ddp", SHARED, "fit")],
)
def test_what_loses_nothing_is_taken(strategy, method, stage):
    assert hasattr(started(strategy, method, stage), "tokendrop")


def test_a_wrong_method_is_refused_before_a_process_starts():
    with pytest.raises(td.LayerRangeError):
        trainer(td.TokenDrop(td.HMGen("7:9")), strategy="ddp_fork").fit(Lit(), loader())
