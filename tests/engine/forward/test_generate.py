"""Generation with a cache equals generation without one, and its cache holds what it should.

Shape letters: B batch, T tokens of the prompt, S stored tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generation import (
    EVEN,
    IMAGE_IDS,
    IMAGE_ONLY,
    LAYERS,
    MAKES_IMAGES,
    METHODS,
    NEW,
    PADDED,
    RAGGED,
    SEARCHES,
    TEXT_ONLY,
    Prompt,
    apart,
    dropped,
    elements,
    generated,
    stored,
)
from torch import nn
from transformers import DynamicCache

import tokendrop as td

TOLERANCE = 1e-5


# A search moves rows of the cache, whatever attention reads them: every search under one, one under the other.
@pytest.mark.parametrize(
    ("given", "attention", "search"),
    [
        *(pytest.param(RAGGED, "sdpa", one, id=f"ragged-sdpa-{one}") for one in SEARCHES),
        *(pytest.param(PADDED, "sdpa", one, id=f"left_padded-sdpa-{one}") for one in ("greedy", "beams")),
        pytest.param(RAGGED, "eager", "greedy", id="ragged-eager-greedy"),
        pytest.param(PADDED, "eager", "greedy", id="left_padded-eager-greedy"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_cache_changes_nothing(method: str, given: Prompt, attention: str, search: str) -> None:
    model, drop = dropped(METHODS[method], attention)
    if attention == "sdpa":  # in single precision five layers add up to more than the tolerance; eager has no other
        model.double()
    makes_images = method in MAKES_IMAGES
    more = SEARCHES[search] | ({} if makes_images else {"suppress_tokens": TEXT_ONLY})
    cached, plain = (generated(model, drop, given, cached, **more) for cached in (True, False))
    assert isinstance(cached.past_key_values, DynamicCache)
    assert plain.past_key_values is None
    assert torch.equal(cached.sequences, plain.sequences)
    assert len(cached.logits) == len(plain.logits) == NEW
    assert apart(torch.stack(cached.logits), torch.stack(plain.logits)) < TOLERANCE
    made = torch.isin(cached.sequences[:, given.ids.shape[1] :], IMAGE_IDS)
    assert made.any() == makes_images
    assert not made.all()


@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_seen_in_what_is_generated(method: str) -> None:
    model, drop = dropped(METHODS[method])
    routed = generated(model, drop, RAGGED, True, suppress_tokens=TEXT_ONLY, do_sample=False)
    with drop.layout(RAGGED.layout), drop.disabled():
        dense = model.generate(
            **RAGGED.inputs,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=TEXT_ONLY,
        )
    assert apart(routed.logits[0], dense.logits[0]) > 100 * TOLERANCE


@torch.no_grad()
def prefilled(model: nn.Module, given: Prompt) -> tuple[Any, DynamicCache]:
    cache = DynamicCache(config=model.config)
    return model(**given.inputs, past_key_values=cache, use_cache=True), cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("given", [RAGGED, PADDED], ids=["ragged", "left_padded"])
@pytest.mark.parametrize("method", METHODS)
def test_a_plain_forward_without_labels_equals_the_prefill(method: str, given: Prompt, attention: str) -> None:
    model, drop = dropped(METHODS[method], attention)
    with drop.layout(given.layout), torch.no_grad():
        plain = model(**given.inputs, use_cache=False).logits
        cached, _ = prefilled(model, given)
    real = given.real.bool()
    assert apart(cached.logits[real], plain[real]) < TOLERANCE


def test_shallow_layers_hold_no_image_keys() -> None:
    # 6 of 12 prompt tokens are images, so 2 shallow layers of 5 save 2 * 6 of 5 * 12 pairs: a fifth.
    model, drop = dropped(td.HMGen("1:4:2"), multiple=1)
    with drop.layout(EVEN.layout):
        _, cache = prefilled(model, EVEN)
    with drop.disabled():
        _, dense = prefilled(model, EVEN)
    assert stored(dense) == [12] * LAYERS
    assert stored(cache) == [12, 6, 12, 6, 12]
    assert [layer.get_seq_length() for layer in cache.layers] == [12] * LAYERS
    assert elements(cache) * 5 == elements(dense) * 4
    text = ~EVEN.layout.image
    for index in (1, 3):
        assert torch.equal(cache.layers[index].positions, text.nonzero()[:, 1].view(2, 6))
        assert cache.layers[index].valid.all()


def test_gone_image_tokens_leave_the_cache() -> None:
    model, drop = dropped(td.Drop("1:", 0.5, then="gone"), multiple=1)
    with drop.layout(EVEN.layout):
        _, cache = prefilled(model, EVEN)
    assert stored(cache) == [12, 9, 9, 9, 9]


def test_context_keys_stay_in_the_cache() -> None:
    # They are seen by every later token; HiMix saves work, not bytes.
    model, drop = dropped(td.HiMix(), multiple=1)
    with drop.layout(EVEN.layout):
        _, cache = prefilled(model, EVEN)
    assert stored(cache) == [12] * LAYERS


def test_the_cache_of_generated_images_shrinks() -> None:
    # Of 12 + 9 tokens 15 are images.
    model, drop = dropped(td.HMGen("1:4:2"), multiple=1)
    cache = generated(model, drop, EVEN, True, do_sample=False, suppress_tokens=IMAGE_ONLY).past_key_values
    assert stored(cache) == [21, 6, 21, 6, 21]
    # 2 samples, 2 heads of 8, keys and values.
    assert elements(cache) == (3 * 21 + 2 * 6) * 2 * 2 * 8 * 2
    assert [layer.get_seq_length() for layer in cache.layers] == [21] * LAYERS


@pytest.mark.parametrize("keep", [0.5, 2])
@pytest.mark.parametrize("score", ["random", "uniform", "norm"])
@pytest.mark.parametrize("then", ["rejoin", "gone", "context"])
def test_a_selection_concerns_the_prompt_only(then: Any, score: str, keep: float) -> None:
    # New image tokens compute everywhere, with and without a cache, and take no place of the prompt's.
    model, drop = dropped(td.Drop("1:3", keep, score, then))
    cached, plain = (generated(model, drop, EVEN, cached, do_sample=True) for cached in (True, False))
    assert torch.isin(cached.sequences[:, 12:], IMAGE_IDS).any()
    assert torch.equal(cached.sequences, plain.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(plain.logits)) < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_repeated_rows_of_a_prompt_have_the_same_selection(method: str) -> None:
    # Beams change rows: without a cache they would change what was dropped.
    model, drop = dropped(METHODS[method])
    single = generated(model, drop, EVEN, True, do_sample=False, max_new_tokens=1).logits[0]
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 1}
    repeated = generated(model, drop, EVEN, True, **options).logits[0]
    assert apart(repeated, single.repeat_interleave(3, 0)) < TOLERANCE


@torch.no_grad()
def test_two_caches_in_one_layout() -> None:
    # A second prefill, or a forward without a cache, leaves the first cache usable.
    model, drop = dropped(td.HMGen("1:4:2"))
    token = torch.full((2, 1), 5)
    with drop.layout(EVEN.layout):
        _, one = prefilled(model, EVEN)
        _, other = prefilled(model, EVEN)
        logits = [model(input_ids=token, past_key_values=cache, use_cache=True).logits for cache in (one, other)]
    assert torch.equal(*logits)


@contextmanager
def counted(drop: td.Handle) -> Iterator[list[list[int]]]:
    """For each layer, the tokens of every call of its MLP."""
    calls: list[list[int]] = [[] for _ in drop.decoder_layers]
    hooks = []
    for layer, own in zip(drop.decoder_layers, calls, strict=True):
        hooks.append(layer.mlp.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0].shape[1])))
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("search", ["greedy", "beams"])
@pytest.mark.parametrize("shallow", ["1:4:2", "0:4:2"])
def test_a_new_image_token_skips_a_shallow_layer(shallow: str, search: str) -> None:
    model, drop = dropped(td.HMGen(shallow), multiple=1)
    with counted(drop) as calls:
        generated(model, drop, EVEN, True, suppress_tokens=IMAGE_ONLY, **SEARCHES[search])
    for index, own in enumerate(calls):
        expected = [6] if index in range(*map(int, shallow.split(":"))) else [12] + [1] * (NEW - 1)
        assert own == expected


def test_a_new_text_token_runs_every_layer() -> None:
    model, drop = dropped(td.HMGen("1:4:2"), multiple=1)
    with counted(drop) as calls:
        generated(model, drop, EVEN, True, suppress_tokens=TEXT_ONLY, do_sample=False)
    assert [len(own) for own in calls] == [NEW] * LAYERS


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("given", [RAGGED, PADDED], ids=["ragged", "left_padded"])
@pytest.mark.parametrize("shallow", ["1:4:2", "0:4:2"])
@torch.no_grad()
def test_rows_that_differ_leave_holes(shallow: str, given: Prompt, attention: str) -> None:
    model, drop = dropped(td.HMGen(shallow), attention)
    index = int(shallow[0])
    ids, real = given.ids, given.real
    with drop.layout(given.layout):
        _, cache = prefilled(model, given)
        before = stored(cache)
        for step, new in enumerate(([35, 7, 36], [8, 37, 9], [38, 39, 40], [10, 11, 12])):
            token = torch.tensor(new)[:, None]
            ids, real = torch.cat([ids, token], 1), torch.cat([real, torch.ones_like(token)], 1)
            logits = model(input_ids=token, attention_mask=real, past_key_values=cache, use_cache=True).logits
            # Nobody sees what lies in a hole.
            holed = cache.layers[index]
            holed.keys[(~holed.valid)[:, None].expand(holed.keys.shape[:3])] = 9.0
            holed.values[(~holed.valid)[:, None].expand(holed.keys.shape[:3])] = 9.0
            with drop.layout(given.layout):
                plain = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, -1:]
            assert apart(logits, plain) < TOLERANCE
            if step < 2:
                assert torch.equal(holed.valid[:, -1], token[:, 0] < 30)
    # The third step, images alone, stored nothing there.
    grown = [after - one for after, one in zip(stored(cache), before, strict=True)]
    assert grown == [3 if layer in range(*map(int, shallow.split(":"))) else 4 for layer in range(LAYERS)]
