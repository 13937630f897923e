"""Ways to generate: caches of a fixed length, text alone, a second prompt, several turns, rows that come and go.

Shape letters: B batch, T tokens of the prompt, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from generation import (
    EVEN,
    IMAGE_IDS,
    LAYERS,
    MAKES_IMAGES,
    METHODS,
    NEW,
    PADDED,
    TEXT_ONLY,
    Prompt,
    apart,
    dropped,
    generated,
    prompt,
    stored,
)
from helpers import llama
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import tokendrop as td
from tokendrop.engine.reference import reference
from tokendrop.errors import UnsupportedError

TEXT = prompt(["tttttttttttt", "  tttttttttt"])
LINE = prompt(["tttttttttttt"])
GREEDY: dict[str, Any] = {"do_sample": False}
ROUTED: dict[str, Any] = {
    "hmgen": td.HMGen("1:4:2"),
    "himix": td.HiMix(),
    "fastv": td.FastV(2, 0.5),
    "mixture_of_depths": td.MixtureOfDepths("1:3", 0.5),
}


def agree(found: Any, right: Any) -> None:
    assert torch.equal(found.sequences, right.sequences)
    assert apart(torch.stack(found.logits), torch.stack(right.logits)) < 1e-5


def texts(name: str) -> dict[str, Any]:
    """Options under which a method makes no image that it cannot make."""
    return GREEDY if name in MAKES_IMAGES else GREEDY | {"suppress_tokens": TEXT_ONLY}


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", [EVEN, PADDED], ids=["even", "left_padded"])
@pytest.mark.parametrize("method", METHODS)
def test_a_cache_of_a_fixed_length(method: str, given: Prompt, attention: str) -> None:
    model, drop = dropped(METHODS[method], attention)
    static = generated(model, drop, given, True, cache_implementation="static", **texts(method))
    assert isinstance(static.past_key_values, StaticCache)
    agree(static, generated(model, drop, given, False, **texts(method)))
    agree(static, generated(model, drop, given, True, **texts(method)))


@pytest.mark.parametrize("method", ["himix", "gone"])
def test_a_cache_of_a_fixed_length_where_transformers_compiles(method: str) -> None:
    """As it does on a GPU: decoding is what it is, and nothing compiles anew for each token."""
    model, drop = dropped(METHODS[method])
    options, frames = CompileConfig(backend="eager", mode=None, fullgraph=False), []
    options._compile_all_devices = True
    compiled = {"cache_implementation": "static", "disable_compile": False, "compile_config": options}
    for new in (4, NEW):
        torch._dynamo.reset()
        counters.clear()
        vars(model).pop("_compiled_call", None)
        some = texts(method) | {"max_new_tokens": new}
        agree(generated(model, drop, EVEN, True, **some, **compiled), generated(model, drop, EVEN, True, **some))
        assert "_compiled_call" in vars(model)  # it did
        frames.append(counters["frames"]["ok"])
    assert frames[0] == frames[1]


def windowed(name: str, window: int) -> Any:
    """A model whose layers, all or some, look back `window` tokens."""
    shape: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": window, "eos_token_id": None}
    shape |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
    torch.manual_seed(0)
    if name == "mistral":
        model: Any = MistralForCausalLM(MistralConfig(**shape))
    else:
        kinds = ["sliding_attention" if kind == "s" else "full_attention" for kind in "sfssf"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=8, layer_types=kinds))
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("window", [4, 15])
@pytest.mark.parametrize("method", [td.HMGen("1:4:2"), td.HMGen("0:4:2"), td.HiMix("1:3")])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_cache_of_a_fixed_length_and_windows(name: str, method: Any, window: int) -> None:
    model = windowed(name, window)
    drop = td.apply(model, method, multiple=4)
    plain = generated(model, drop, PADDED, False, **GREEDY)
    agree(generated(model, drop, PADDED, True, cache_implementation="static", **GREEDY), plain)
    agree(generated(model, drop, PADDED, True, **GREEDY), plain)


@torch.no_grad()
def test_a_cache_that_is_emptied() -> None:
    model, drop = dropped(METHODS["hmgen"], multiple=1)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with drop.layout(EVEN.layout):
        first = model(**EVEN.inputs, past_key_values=cache, use_cache=True).logits
        assert stored(cache) == [12, 6, 12, 6, 12]
        cache.reset()
        assert torch.equal(first, model(**EVEN.inputs, past_key_values=cache, use_cache=True).logits)
    cache.reset()
    with drop.disabled():
        dense = model(**EVEN.inputs, past_key_values=cache, use_cache=True).logits
    assert stored(cache) == [12] * LAYERS
    assert torch.equal(dense, llama(layers=LAYERS, eos_token_id=None)(**EVEN.inputs).logits)


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "disabled"])
@torch.no_grad()
def test_a_cache_with_holes_in_a_dense_model(removed: bool) -> None:
    model, drop = dropped(METHODS["hmgen"])
    with drop.layout(EVEN.layout):
        cache = model(**EVEN.inputs, use_cache=True).past_key_values
    dense = nullcontext() if removed else drop.disabled()
    if removed:
        drop.remove()
    with dense, pytest.raises(UnsupportedError, match=r"holds . of 12 tokens is continued by a model that runs dense"):
        model(input_ids=torch.full((2, 1), 5), past_key_values=cache, use_cache=True)


def dense_text(**options: Any) -> Any:
    return llama(layers=LAYERS, eos_token_id=None).generate(
        **LINE.inputs,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=TEXT_ONLY,
        **GREEDY | options,
    )


@pytest.mark.parametrize(
    "way",
    [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 5}, {"own": 1}],
    ids=["dynamic", "static", "lookup", "chunks", "assistant"],
)
@pytest.mark.parametrize("image_ids", [True, False])
@pytest.mark.parametrize("method", ROUTED)
def test_without_an_image_there_is_nothing_to_drop(method: str, image_ids: bool, way: dict[str, Any]) -> None:
    model, drop = dropped(ROUTED[method])
    way = {"assistant_model": llama(layers=1, seed=5, eos_token_id=None)} if "own" in way else way
    layout = LINE.layout if image_ids else td.TokenLayout(torch.zeros_like(LINE.ids, dtype=torch.bool))
    options: dict[str, Any] = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    with drop.layout(layout):
        found = model.generate(**LINE.inputs, suppress_tokens=TEXT_ONLY, **options | GREEDY | way)
    agree(found, dense_text())


def test_two_tasks_without_an_image_go_together() -> None:
    model, drop = dropped({"u": td.HiMix(), "g": td.HMGen("1:4:2")})
    given = Prompt(TEXT.ids, TEXT.real, ("u", "g"))
    options = GREEDY | {"suppress_tokens": TEXT_ONLY}
    agree(generated(model, drop, given, True, **options), generated(model, drop, given, False, **options))


def test_the_first_image_behind_a_prompt_of_text_leaves_a_hole() -> None:
    model, drop = dropped(METHODS["hmgen"], multiple=1)
    found = generated(model, drop, TEXT, True, **GREEDY)
    agree(found, generated(model, drop, TEXT, False, **GREEDY))
    assert torch.isin(found.sequences[:, 12:], IMAGE_IDS).any()
    with drop.layout(LINE.layout), torch.no_grad():
        cache = model(**LINE.inputs, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[35]]), past_key_values=cache, use_cache=True)
    assert stored(cache) == [13, 12, 13, 12, 13]


@torch.no_grad()
def guided_by_definition(method: Any, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Greedy ids (B, NEW) under guidance by a second prompt, densely under masks and without a cache."""
    model, new = llama(layers=LAYERS, eos_token_id=None), torch.zeros(len(first), 0, dtype=torch.int64)
    for _ in range(NEW):
        scores = []
        for given in (first, second):
            ids = torch.cat([given, new], 1)
            with reference(model, {None: method}, td.TokenLayout(torch.isin(ids, IMAGE_IDS))):
                scores.append(model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1))
        chosen = scores[1] + scale * (scores[0] - scores[1])
        new = torch.cat([new, chosen.argmax(-1, keepdim=True)], 1)
    return new


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("negative", [1, 5, 12, 15])
def test_guidance_by_a_second_prompt(negative: int, cached: bool) -> None:
    # As Emu3 makes images: the other prompt is shorter, or longer, and has a cache of its own.
    model, drop = dropped(METHODS["hmgen"])
    given = prompt(["tttttttttttt", "tttttttttttt"])
    second = prompt(["t" * 15, "t" * 15]).ids[:, -negative:] if negative > 1 else given.ids[:, -1:]
    more = {"negative_prompt_ids": second} if negative > 1 else {}
    if negative == 5 and not cached:
        # With its images it grows to the first one's shape, of which the layout says something else.
        with pytest.raises(td.LayoutError, match="another prompt"):
            generated(model, drop, given, cached, guidance_scale=2.0, **GREEDY | more)
        return
    found = generated(model, drop, given, cached, guidance_scale=2.0, **GREEDY | more).sequences[:, 12:]
    right = guided_by_definition(METHODS["hmgen"], given.ids, second, 2.0)
    assert torch.equal(found, right)
    assert torch.isin(right, IMAGE_IDS).any()


@pytest.mark.parametrize("search", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_guidance_of_a_search(search: dict[str, Any]) -> None:
    model, drop = dropped(METHODS["hmgen"])
    given = prompt(["tttttttttttt", "tttttttttttt"])
    agree(*(generated(model, drop, given, c, guidance_scale=2.0, **GREEDY | search) for c in (True, False)))


@pytest.mark.parametrize("method", ["hmgen", "hmgen_first"])
@torch.no_grad()
def test_two_turns_on_one_cache(method: str) -> None:
    # The second turn brings an image of its own.
    model, drop = dropped(METHODS[method])
    turn = prompt(["ttiiiitt", "tiiitttt"]).ids
    with drop.layout(EVEN.layout):
        cache = DynamicCache(config=model.config)
        first = generated_inside(model, EVEN.ids, cache)
        second = generated_inside(model, torch.cat([first.sequences, turn], 1), cache)
        ids = second.sequences
    whole = Prompt(ids[:, :-NEW], torch.ones_like(ids[:, :-NEW]))
    right = generated(model, drop, whole, False, **GREEDY)
    agree(second, right)


def generated_inside(model: Any, ids: Tensor, cache: Any) -> Any:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
    )


@pytest.mark.parametrize("method", ["hmgen", "hmgen_first", "hmgen_shared", "himix_range"])
@torch.no_grad()
def test_candidates_that_come_and_go(method: str) -> None:
    # Contrastive search: k rows for each sample, of which one is kept. 35 is an image.
    model, drop = dropped(METHODS[method])
    ids, candidates = EVEN.ids, torch.tensor([[7, 35, 9], [36, 8, 37], [35, 38, 39], [4, 35, 5]])
    with drop.layout(EVEN.layout):
        cache = model(**EVEN.inputs, use_cache=True).past_key_values
        for step, kept in enumerate([1, 0, 2, 0]):
            rows = candidates[step].repeat(2)[:, None]
            cache.batch_repeat_interleave(3)
            logits = model(input_ids=rows, past_key_values=cache, use_cache=True).logits[:, -1]
            plain = model(input_ids=torch.cat([ids.repeat_interleave(3, 0), rows], 1), use_cache=False).logits[:, -1]
            assert apart(logits, plain) < 1e-5
            cache.batch_select_indices(torch.tensor([kept, 3 + kept]))
            ids = torch.cat([ids, candidates[step, kept].repeat(2, 1)], 1)


@torch.no_grad()
def test_a_sample_that_leaves_the_batch() -> None:
    model, drop = dropped(METHODS["hmgen"])
    with drop.layout(EVEN.layout):
        cache = model(**EVEN.inputs, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        token = torch.tensor([[35]])
        alone = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        plain = model(input_ids=torch.cat([EVEN.ids, token.repeat(2, 1)], 1), use_cache=False).logits[1:, -1:]
    assert apart(alone, plain) < 1e-5


def test_which_of_several_tasks_left_is_not_guessed() -> None:
    model, drop = dropped({"u": td.HMGen("1:4:2", "per-task"), "g": td.HMGen("1:4:2", "per-task")})
    given = Prompt(EVEN.ids, EVEN.real, ("u", "g"))
    with drop.layout(given.layout), torch.no_grad():
        cache = model(**given.inputs, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(td.LayoutError, match="filled by 2 rows of several tasks is continued by 1"):
            model(input_ids=torch.tensor([[35]]), past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_an_exported_program() -> None:
    model = llama(layers=2)
    drop, given = td.apply(model, td.HiMix("1:"), multiple=1), {"input_ids": EVEN.ids, "use_cache": False}
    with drop.layout(EVEN.layout):
        exported = torch.export.export(model, (), given, strict=True)
        assert apart(exported.module()(**given).logits, model(**given).logits) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("method", ["himix", "fastv"])
def test_an_export_that_cannot_see_a_layer_end(method: str) -> None:
    model, drop = dropped(METHODS[method])
    refused = pytest.raises(UnsupportedError, match=r"torch\.export without strict=True.*export with strict=True")
    with drop.layout(EVEN.layout), refused:
        torch.export.export(model, (), {"input_ids": EVEN.ids, "use_cache": False})
