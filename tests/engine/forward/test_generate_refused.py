"""What generation with a cache refuses, and why.

Shape letters: B batch, T tokens of the prompt.
"""

from typing import Any

import pytest
import torch
from generation import (
    EVEN,
    IMAGE_IDS,
    IMAGE_ONLY,
    NEW,
    RAGGED,
    TEXT_ONLY,
    apart,
    dropped,
    generated,
    prompt,
)
from helpers import llama
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

import tokendrop as td
from tokendrop.errors import LayoutError, NeededRowError, UnsupportedError


@pytest.mark.parametrize(
    ("method", "role"),
    [(td.HiMix(), "CONTEXT"), (td.HiMix("2:"), "CONTEXT")],
)
@pytest.mark.parametrize("search", [{"do_sample": False}, {"num_beams": 2, "do_sample": False}])
def test_an_image_token_made_under_himix(method: Any, role: str, search: dict[str, Any]) -> None:
    model, drop = dropped(method)
    with pytest.raises(NeededRowError, match=rf"a new image token is {role} in the last layer.*use HMGen"):
        generated(model, drop, EVEN, True, suppress_tokens=IMAGE_ONLY, **search)


def test_without_a_cache_an_image_token_made_under_himix() -> None:
    # Design section 6: the last row is needed in generation, so it may be neither CONTEXT nor GONE.
    model, drop = dropped(td.HiMix())
    with pytest.raises(NeededRowError, match="HMGen"):
        generated(model, drop, EVEN, False, suppress_tokens=IMAGE_ONLY, do_sample=False)


def test_a_prompt_that_ends_with_an_image_under_himix() -> None:
    # Its last row makes the first new token, from a stale state.
    model, drop = dropped(td.HiMix())
    with pytest.raises(NeededRowError, match="HMGen"):
        generated(model, drop, prompt(["ttttii", "tttttt"]), True, suppress_tokens=TEXT_ONLY, do_sample=False)


METHODS = {"u": td.HiMix(), "g": td.HMGen("1:4:2"), "d": None}


@pytest.mark.parametrize(
    ("tasks", "names"), [("ug", "ACTIVE and CONTEXT"), ("ud", "ACTIVE and CONTEXT"), ("gd", "ACTIVE and BYPASS")]
)
def test_two_roles_in_one_batch(tasks: str, names: str) -> None:
    model, drop = dropped(METHODS)
    given = type(EVEN)(EVEN.ids, EVEN.real, tuple(tasks))
    options = {"suppress_tokens": TEXT_ONLY, "do_sample": False}
    with pytest.raises(UnsupportedError, match=f"{names} in layer . of one batch.*batches of their own"):
        generated(model, drop, given, True, **options)
    # Without a cache they go together; and each of them alone has one.
    together = generated(model, drop, given, False, **options).sequences
    for row, task in enumerate(tasks):
        one = type(EVEN)(EVEN.ids[row : row + 1], EVEN.real[row : row + 1], task)
        assert torch.equal(generated(model, drop, one, True, **options).sequences, together[row : row + 1])


def test_two_tasks_with_the_same_roles_go_together() -> None:
    model, drop = dropped({"u": td.HMGen("1:4:2", "per-task"), "g": td.HMGen("1:4:2", "per-task")})
    given = type(EVEN)(EVEN.ids, EVEN.real, ("u", "g"))
    cached, plain = (generated(model, drop, given, cached, do_sample=True) for cached in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.isin(cached.sequences[:, 12:], IMAGE_IDS).any()


@pytest.mark.parametrize("method", [td.HMGen("1:4:2"), td.HiMix()])
def test_a_cache_that_does_not_grow_by_tokens(method: Any) -> None:
    model, drop = dropped(method)
    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicIndexedLayer() for _ in cache.layers]
    refused = pytest.raises(UnsupportedError, match=r"DynamicIndexedLayer.*DynamicCache, or a StaticCache")
    with drop.layout(EVEN.layout), torch.no_grad(), refused:
        model(**EVEN.inputs, past_key_values=cache, use_cache=True)


def test_a_cropped_cache() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout), torch.no_grad():
        cache = model(**EVEN.inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="cannot be cropped; use no assisted decoding"):
            cache.crop(-1)


def test_assisted_decoding_with_holes() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    given = prompt(["titiititititiititi"])
    with pytest.raises(UnsupportedError, match="use no assisted decoding"):
        generated(model, drop, given, True, prompt_lookup_num_tokens=2, do_sample=False)


def test_assisted_decoding_without_holes() -> None:
    # HiMix stores every token, so that candidates that are not accepted can be taken back.
    model, drop = dropped(td.HiMix())
    given = prompt(["titiititititiititi" + "tt"])
    options = {"suppress_tokens": TEXT_ONLY, "do_sample": False}
    assisted = generated(model, drop, given, True, prompt_lookup_num_tokens=2, **options)
    assert torch.equal(assisted.sequences, generated(model, drop, given, True, **options).sequences)


def test_a_prompt_in_chunks() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    with pytest.raises(LayoutError, match=r"\(2, 5\), but the layout is for \(2, 12\).*prefill_chunk_size"):
        generated(model, drop, EVEN, True, prefill_chunk_size=5, do_sample=False)


def test_assisted_decoding_with_an_assistant() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    assistant = llama(layers=1, seed=5, eos_token_id=None)
    given = prompt(["ttiiiittt"])
    with pytest.raises(UnsupportedError, match="use no assisted decoding"):
        generated(model, drop, given, True, assistant_model=assistant, do_sample=False)


@torch.no_grad()
def test_a_cache_from_outside() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    token, real = torch.full((2, 1), 5), torch.ones(2, 13, dtype=torch.int64)
    with drop.disabled():
        dense = model(**EVEN.inputs, use_cache=True).past_key_values
    with drop.layout(EVEN.layout):
        other = model(**EVEN.inputs, use_cache=True).past_key_values
    for cache in (dense, other):
        with (
            drop.layout(EVEN.layout),
            pytest.raises(UnsupportedError, match="cache with 12 tokens was not filled inside this layout"),
        ):
            model(input_ids=token, attention_mask=real, past_key_values=cache, use_cache=True)


def test_a_filled_cache_in_training() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout), torch.no_grad():
        cache = model(**EVEN.inputs, use_cache=True).past_key_values
    with drop.layout(EVEN.layout), pytest.raises(UnsupportedError, match="12 tokens reached a training forward"):
        model(input_ids=EVEN.ids, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("method", [td.HMGen("1:4:2"), td.HiMix()])
@pytest.mark.parametrize("given", [EVEN, prompt(["tttttttt"])], ids=["images", "text"])
def test_continuing_while_gradients_are_on(given: Any, method: Any) -> None:
    model, drop = dropped(method)
    token = torch.full((len(given.ids), 1), 5)
    with drop.layout(given.layout):
        with torch.no_grad():
            cache = model(**given.inputs, use_cache=True).past_key_values
        refused = pytest.raises(UnsupportedError, match=r"gradients are on; continue under torch\.no_grad\(\)")
        with refused:
            model(input_ids=token, past_key_values=cache, use_cache=True)
        # Nothing changed: it goes on where it was.
        with torch.no_grad():
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            plain = model(input_ids=torch.cat([given.ids, token], 1), use_cache=False).logits[:, -1:]
    assert apart(logits, plain) < 1e-5


def test_a_prompt_and_its_next_token_while_gradients_are_on() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout):
        cache = model(**EVEN.inputs, use_cache=True).past_key_values
        with pytest.raises(LayoutError, match=r"\(2, 1, 32\).*\(2, 12\).*generate under torch\.no_grad\(\)"):
            model(input_ids=torch.full((2, 1), 5), past_key_values=cache, use_cache=True)


def test_a_filled_cache_beside_labels() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout), torch.no_grad():
        cache = model(**EVEN.inputs, use_cache=True).past_key_values
    layout = td.TokenLayout(EVEN.layout.image, labels=EVEN.ids)
    with drop.layout(layout), pytest.raises(UnsupportedError, match=r"the layout has labels; pass use_cache=False"):
        model(input_ids=EVEN.ids, past_key_values=cache, use_cache=True)


def test_the_layout_of_another_prompt() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(RAGGED.layout), pytest.raises(LayoutError, match=r"\(2, 12\).*layout is for \(3, 12\)"):
        model.generate(**EVEN.inputs, max_new_tokens=NEW, do_sample=False)


@torch.no_grad()
def test_one_layout_serves_two_generations() -> None:
    model, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout):
        first, second = (model.generate(**EVEN.inputs, max_new_tokens=NEW, do_sample=False) for _ in range(2))
        caches = [model(**EVEN.inputs, past_key_values=DynamicCache(config=model.config)) for _ in range(2)]
    assert torch.equal(first, second)
    assert apart(caches[0].logits, caches[1].logits) == 0
