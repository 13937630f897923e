"""Attention split at the image equals the dense reference, and is split only where that is exact.

Shape letters: B batch, T tokens, P computing rows before the image.
"""

import copy

import pytest
import torch
from families import FAMILIES, batch, model
from helpers import SIZES, close, dropped, engine_step, llama, oracle_step, reference_step
from helpers import batch as written
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.engine.forward import split_attention
from tokendrop.engine.reference import reference


@pytest.fixture
def splits(monkeypatch):
    """P of each attention that was split."""
    found, run = [], split_attention._split

    def counted(late, query, *args, **kwargs):
        found.append(query.shape[2] - len(late))
        return run(late, query, *args, **kwargs)

    monkeypatch.setattr(split_attention, "_split", counted)
    return found


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_one_image_at_any_place(before, images, behind, size, multiple):
    made = written(["t" * before + "i" * images + "t" * behind] * size, "u" * size)
    methods = {"u": td.HiMix("1:", "shared")}
    base = llama()
    model, drop = dropped(base, methods, multiple=multiple)
    found = engine_step(model, drop, made)
    assert close(found, reference_step(base, methods, drop, made), made.real, 1e-5)
    assert close(found, oracle_step(model, methods, drop, made, SIZES), made.real, 1e-5)


BATCHES = {
    "one place": (["ttiiit", "ttiiit"], "uu", [2] * 3),
    "first": (["iiittt"], "u", [0] * 3),
    "beside another task": (["ttiiit", "ttiiit", "tiiitt"], "uug", [2] * 3),
    "two places": (["ttiiit", "tiiitt"], "uu", []),
    "two images": (["titit", "titit"], "uu", []),
    "other counts": (["ttiiit", "ttiitt"], "uu", []),
    "padding": (["ttiiit", "ttiii"], "uu", []),
}


@pytest.mark.parametrize("name", BATCHES)
def test_where_attention_is_split(name, splits):
    samples, tasks, expected = BATCHES[name]
    made, methods = written(samples, tasks), {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}
    base = llama()
    model, drop = dropped(base, methods, multiple=1)
    found = engine_step(model, drop, made)
    assert splits == expected
    assert close(found, reference_step(base, methods, drop, made), made.real, 1e-5)


def test_a_mask_of_the_model_or_eager_attention_splits_nothing(splits):
    samples, tasks, _ = BATCHES["one place"]
    made, methods = written(samples, tasks), {"u": td.HiMix("1:")}
    model, drop = dropped(llama("eager"), methods, multiple=1)
    engine_step(model, drop, made)
    model, drop = dropped(llama(), methods, multiple=1)
    tokens = made.ids.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    with drop.layout(made.layout()):
        model(made.ids, attention_mask=mask, use_cache=False)
    assert splits == []


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.inputs is None and not family.alike]
)
def test_families(name, checkpoint, splits):
    data = batch(name, None)
    image = torch.zeros_like(data.image)
    image[:, 3:11] = True
    labels = data.inputs["input_ids"].clone()
    labels[:, :12] = -100
    layout = td.TokenLayout(image, labels=labels)
    methods = {None: td.HiMix("1:")}

    def run(module):
        out = module(data.inputs["input_ids"], labels=labels, use_cache=False)
        grads = torch.autograd.grad(out.loss, list(module.parameters()), allow_unused=True)
        return out.logits.detach(), [grad for grad in grads if grad is not None]

    base = model(name, "sdpa")
    with reference(base, methods, layout):
        expected, wanted = run(base)
    module = copy.deepcopy(base)
    if checkpoint:
        getattr(module, "activation_checkpointing_enable", None)({"use_reentrant": False})
    drop = td.apply(module, td.HiMix("1:"), multiple=1)
    with drop.layout(layout):
        found, grads = run(module)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    largest = max(grad.abs().max() for grad in wanted)
    assert max((a - b).abs().max() for a, b in zip(grads, wanted, strict=True)) <= 1e-4 * largest
    # A sliding layer whose window is shorter than the sequence has a mask of its own.
    assert set(splits) <= {3}
    assert bool(splits) == (name != "mistral")
