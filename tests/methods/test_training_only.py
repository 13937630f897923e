"""Methods for training only: dense while the decoder is in eval mode, and never half of each."""

from dataclasses import dataclass

import pytest
import torch
from helpers import MIXED, batch, checkpointed, dropped, llama, reference_step, same, step

import tokendrop as td

BASE = llama()  # in eval mode
MADE = batch(*MIXED)
METHODS = {"u": td.RandomLTD(":", keep=1), "g": td.RandomLTD("1:3", keep=0.5)}
# The same selection, in whatever mode.
ALWAYS = {"u": td.Drop(":", keep=1), "g": td.HMGen("1:3")}


def run(model, drop):
    """Logits and gradients, with the random choices of the first step."""
    with drop.layout(MADE.layout(), step=(0, 0)):
        return step(model, MADE)


def test_random_ltd_is_dense_in_evaluation_and_drops_in_training():
    model, drop = dropped(BASE, METHODS, multiple=1)
    assert same(run(model, drop), step(BASE, MADE))
    model.train()
    ours, theirs = run(model, drop), reference_step(BASE, METHODS, drop, MADE)
    torch.testing.assert_close(ours[0][MADE.real], theirs[0][MADE.real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours[0][MADE.real], step(BASE, MADE)[0][MADE.real], atol=1e-2)
    assert not same(ours, step(BASE, MADE))


def test_other_methods_do_not_ask_for_the_mode():
    model, drop = dropped(BASE, ALWAYS, multiple=1)
    evaluated = run(model, drop)
    model.train()
    assert same(run(model, drop), evaluated)
    assert not same(evaluated, step(BASE, MADE))


@dataclass(frozen=True)
class Mine:
    """Somebody's method that is for training, too."""

    separate = "none"
    training_only = True

    def route(self, num_layers, strength=1.0):
        return td.HMGen(":").route(num_layers, strength)


def test_any_method_may_be_for_training_only():
    model, drop = dropped(BASE, {"u": Mine(), "g": td.HMGen("1:3")})
    found, _ = run(model, drop)
    model, drop = dropped(BASE, {"u": None, "g": td.HMGen("1:3")})
    assert torch.equal(found, run(model, drop)[0])
    model, drop = dropped(BASE, {"u": Mine(), "g": td.HMGen("1:3")})
    found, _ = run(model.train(), drop)
    model, drop = dropped(BASE, {"u": td.HMGen(":"), "g": td.HMGen("1:3")})
    assert torch.equal(found, run(model, drop)[0])


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_changes_inside_a_layout_holds(training):
    """A sample looked at in eval mode inside a training step, or a student and a teacher."""
    expected = {}
    for mode in (True, False):
        model, drop = dropped(BASE, METHODS, multiple=1)
        with drop.layout(MADE.layout(), step=(3, 0)):
            expected[mode] = step(model.train(mode), MADE)
    model, drop = dropped(BASE, METHODS, multiple=1)
    model.train(training)
    with drop.layout(MADE.layout(), step=(3, 0)):
        found = [step(model.train(mode), MADE) for mode in (training, not training, training)]
    assert same(found[0], expected[training])
    assert same(found[1], expected[not training])
    assert same(found[2], expected[training])


def test_a_recompute_in_another_mode_takes_the_forwards_tokens():
    plain, drop = dropped(BASE, METHODS, multiple=1)
    plain.train()
    with drop.layout(MADE.layout(), step=(3, 0)):
        expected = step(plain, MADE)
    model, drop = dropped(checkpointed(llama()), METHODS, multiple=1)
    with drop.layout(MADE.layout(), step=(3, 0)):
        logits = model(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False).logits
        model.eval()
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), MADE.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).backward()
    assert torch.equal(logits, expected[0])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[1][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_dense(use_cache):
    made = batch(["ttiiitt", "tiitttt"], "uu")
    model, drop = dropped(BASE, td.RandomLTD(":", keep=1))
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": use_cache, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(made.ids)}
    expected = BASE.generate(made.ids, **options)
    layout = td.TokenLayout(made.image, "u")
    with drop.layout(layout):
        found = model.generate(made.ids, **options)
    model.train()
    with drop.layout(layout):
        model.eval()
        toggled = model.generate(made.ids, **options)
    for one in (found, toggled):
        assert torch.equal(one.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(one.logits, expected.logits, strict=True))


def test_costs_are_those_of_training():
    """`td.flops` makes a model in eval mode of its own."""
    method = td.RandomLTD("1:3", keep=4)
    report = td.flops(BASE, method, text=8, image=12)
    assert report == td.flops(BASE, td.Drop("1:3", keep=4), text=8, image=12)
    assert report == td.flops(BASE, method, text=8, image=12, counted=True)
    assert report.ratio < 1


def test_compiled_in_both_modes():
    model, drop = dropped(BASE, METHODS, multiple=1)
    compiled = torch.compile(model, backend="eager")
    for mode in (True, False, True):
        model.train(mode)
        with drop.layout(MADE.layout(), step=(3, 0)):
            expected = model(input_ids=MADE.ids, use_cache=False).logits
        with drop.layout(MADE.layout(), step=(3, 0)):
            assert torch.equal(compiled(input_ids=MADE.ids, use_cache=False).logits, expected)
