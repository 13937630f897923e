"""FlashAttention and FlexAttention, as stand-ins with their documented semantics: equal to the reference, and called
as their kernels on a GPU would be.

Shape letters: B batch, T tokens, K computed rows, M context rows, P rows before the image.
"""

import copy
from typing import Any

import families
import generation
import pytest
import torch
from helpers import MIXED, Spy, batch, checkpointed, close, dropped, engine_step, llama, reference_step, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_stand_in import EVERY, FLASH, ignores_masks, kernels, with_attention
from test_attention_rows import Looking
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, StaticCache

import tokendrop as td
from tokendrop.engine.forward.split_attention import lower_right
from tokendrop.engine.model import sight as sights
from tokendrop.engine.model.attention import follows, kind
from tokendrop.engine.model.sight import Sight
from tokendrop.engine.plan.rows import behind_image
from tokendrop.layout import scoring_mask

BASE = llama(dtype=torch.float64)
METHODS: dict[str, dict[str, Any]] = {
    "himix": {"u": td.HiMix("1:", "shared"), "g": td.HMGen("1:3", "shared")},
    "fastv": {"u": td.FastV(2, 0.5), "g": td.Drop("1:3", 0.5, "value_norm")},
    "context": {"u": td.Drop("1:3", 0.5, "attention", "context"), "g": None},
    "pyramid": {"u": td.PyramidDrop((1, 2), (0.6, 0.3)), "g": td.MixtureOfDepths("1::2", 0.5)},
}


def agrees(attention: str, methods: dict[str, Any], made: Any, multiple: int = 4, tolerance: float = 1e-9) -> bool:
    """Whether the engine under a kernel equals the reference, which runs sdpa."""
    model, drop = dropped(BASE, methods, multiple=multiple)
    expected = reference_step(BASE, methods, drop, made)
    with kernels():
        return close(engine_step(with_attention(model, attention), drop, made), expected, made.real, tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attention", EVERY)
def test_every_kernel_equals_the_reference(attention: str, method: str) -> None:
    for side in ("left", "right") if attention == "flash_attention_2" else ("left",):
        assert agrees(attention, METHODS[method], batch(*MIXED, side))


written = st.lists(st.text("ti", min_size=1, max_size=8), min_size=1, max_size=4)


@given(written, st.data(), st.sampled_from(["left", "right"]), st.sampled_from([1, 4]))
@settings(max_examples=12)
def test_any_batch(samples: list[str], data: Any, side: str, multiple: int) -> None:
    tasks = "".join(data.draw(st.sampled_from("ug")) for _ in samples)
    attention, method = data.draw(st.sampled_from(EVERY)), data.draw(st.sampled_from(["himix", "context"]))
    assert agrees(attention, METHODS[method], batch(samples, tasks, side), multiple)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_padding_that_the_layout_does_not_know(attention: str) -> None:
    made, methods = batch(*MIXED, "left"), METHODS["himix"]
    model, drop = dropped(BASE, methods, multiple=4)
    expected = reference_step(BASE, methods, drop, made)
    with kernels():
        layout = made.layout(padding=None, labels=None)
        assert close(engine_step(with_attention(model, attention), drop, made, layout), expected, made.real, 1e-9)


def run(model: Any, drop: Any, made: Any, attention: str) -> Any:
    """The calls of one forward."""
    with kernels() as calls, drop.layout(made.layout(labels=None)), torch.no_grad():
        with_attention(model, attention)(made.ids, attention_mask=made.mask, use_cache=False)
    return calls


@pytest.mark.parametrize("attention", FLASH)
def test_one_image_at_one_place_is_two_causal_sequences_without_a_mask(attention: str) -> None:
    """P = 2 rows before it, and 3 behind it that see all 4 + 5 keys."""
    made = batch(["ttiiiittt"] * 2, "uu")
    model, drop = dropped(BASE, td.HiMix("1:3"), multiple=1)
    calls = run(model, drop, made, attention)
    heads, keys, width = 4, 2, 8
    assert calls.plain == [{"q": (2, 9, heads, width), "k": (2, 9, keys, width), "causal": True}] * 2
    one = {"q": (10, heads, width), "k": (22, keys, width), "causal": True}
    one |= {"queries": [0, 2, 5, 7, 10], "keys": [0, 2, 11, 13, 22], "longest": (3, 9)}
    assert calls.varlen == [one] * 2


@given(st.integers(0, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=20)
def test_around_one_image_sizes_alone_say_the_sequences(before: int, images: int, behind: int, samples: int) -> None:
    queries = torch.cat([torch.arange(before), torch.arange(behind) + before + images]).expand(samples, -1)
    columns = torch.cat([(torch.arange(images) + before).expand(samples, -1), queries], 1)
    own = torch.arange(before + behind).expand(samples, -1) + images
    sights = [Sight(queries, columns, own, None, None, 16, before=one) for one in (None, before)]
    found, said = (one.sequences() for one in sights)
    assert (found.keys is None) == (said.keys is None)
    assert torch.equal(found.query_ends, said.query_ends)
    assert torch.equal(found.key_ends, said.key_ends)
    assert found.longest == said.longest
    assert seen_by(found, columns.numel(), both=False) == seen_by(said, columns.numel(), both=False)


def seen_by(made: Any, count: int, both: bool) -> list[list[int]]:
    """The keys of all rows that each query sees, in their order there, as sequences say it."""
    keys = list(range(count)) if made.keys is None else made.keys.tolist()
    queries, ends = made.query_ends.tolist(), made.key_ends.tolist()
    found = []
    for first, stop, begin, end in zip(queries, queries[1:], ends, ends[1:], strict=False):
        found += [sorted(keys[begin : end if both else end - (stop - 1 - query)]) for query in range(first, stop)]
    return found


def test_compiled_in_one_graph() -> None:
    """As far as the kernel is one operator, as FlashAttention's are."""
    torch._dynamo.reset()
    made = batch(["ttiiiittt"] * 2, "uu")
    model, drop = dropped(llama(dtype=torch.float64, layers=2), td.HiMix("1:"), multiple=1)
    with kernels(operators=True), drop.layout(td.TokenLayout(made.image)), torch.no_grad():
        with_attention(model, "flash_attention_2")
        plain = model(made.ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")(made.ids, use_cache=False).logits
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-9)


def test_rows_that_skip_a_layer_are_causal_without_lengths() -> None:
    """Also in a batch of one row, where positions with gaps look like packed samples."""
    made = batch(["tiitiit"], "u")
    model, drop = dropped(BASE, td.HMGen("1:3"), multiple=1)
    calls = run(model, drop, made, "flash_attention_2")
    assert calls.varlen == []
    assert [(one["q"][1], one["causal"]) for one in calls.plain] == [(7, True), (3, True), (3, True), (7, True)]


def test_ragged_images_and_padding_are_sequences() -> None:
    made = batch(["tiitit", "tii"], "uu", "left")
    model, drop = dropped(BASE, td.HiMix("1:2"), multiple=1)
    calls = run(model, drop, made, "flash_attention_2")
    (one,) = (one for one in calls.varlen if one["q"][0] == 8)
    # Of the first sample text before the images, behind two and behind three, and a row that fills up. Of the second
    # the padding, which computes without labels, beside the key of a third image that it has not; and its text.
    assert (one["queries"], one["keys"]) == ([0, 1, 2, 3, 4, 7, 8], [0, 1, 5, 11, 12, 16, 17])
    assert (one["k"][0], one["longest"], one["causal"]) == (17, (3, 6), True)


def test_flex_attention_is_given_a_compact_block_mask() -> None:
    made = batch(["ttiiiittt", "tttiitttt"], "uu")
    model, drop = dropped(BASE, td.HiMix("1:3"), multiple=1)
    calls = run(model, drop, made, "flex_attention")
    assert [one["mask"].shape for one in calls.flex] == [(2, 1, 9, 9), (2, 1, 7, 11), (2, 1, 7, 11), (2, 1, 9, 9)]
    assert calls.flex[1]["mask"] is calls.flex[2]["mask"]  # made once
    rule, index = calls.flex[1]["mask"].mask_mod, torch.arange
    seen = rule(index(2)[:, None, None], torch.tensor(0), index(7)[:, None], index(11))
    # Context first: of the second sample two images and two rows that fill, which nobody sees.
    first = [[(column < 4 and row >= 2) or 4 <= column <= row + 4 for column in range(11)] for row in range(5)]
    second = [[(column < 2 and row >= 3) or 4 <= column <= row + 4 for column in range(11)] for row in range(7)]
    assert seen[0, :5].tolist() == first
    assert seen[1].tolist() == second


def test_lower_right_in_words_is_the_mask() -> None:
    """What CUDA is given instead of the mask of rows behind one image."""
    for first, size, context in ((2, 7, 4), (0, 3, 5), (4, 5, 1)):
        late = behind_image(first, size, context, torch.device("cpu"))
        assert torch.equal(lower_right(late)._materialize(), late)
        with FlopCounterMode(display=False):
            assert torch.equal(lower_right(late), late)


# transformers runs no sinks in FlexAttention on a CPU.
LOOKED = [(name, "flash_attention_2") for name in ("gemma3", "gpt_oss", "mistral", "deepseek_v3", "gpt2")]
LOOKED += [(name, "flex_attention") for name in ("gemma3", "deepseek_v3", "gpt2")]


@pytest.mark.parametrize(("name", "attention"), LOOKED)
def test_scores_need_no_attention_of_the_model(name: str, attention: str) -> None:
    """Rows equal the probabilities of the eager model, with windows, sinks and latent keys."""
    data, spy = families.batch(name, "left"), Spy()
    at = 2 if name == "gemma3" else 1
    with torch.no_grad():
        dense = families.model(name, "eager")(**data.inputs, output_attentions=True, use_cache=False).attentions[at]
    module = copy.deepcopy(families.model(name, "eager"))
    if name == "gpt2":
        module = module.double()  # of which transformers asks no precision for FlashAttention
    drop = td.apply(module, {"u": Looking(spy, at), "other": None}, multiple=4)
    labels = data.trained([False, False])
    layout = td.TokenLayout(data.image, ["u", "other"], padding=data.real, labels=labels)
    with kernels(), drop.layout(layout), torch.no_grad():
        with_attention(module, attention)(**data.inputs, use_cache=False)
    seen, chosen = spy.given[0].attention, scoring_mask(layout, "prompt")
    assert seen is not None
    found = seen.probabilities[0][:, seen.valid[0]].float()
    torch.testing.assert_close(found, dense[0][:, chosen[0]], rtol=0, atol=1e-5)


def test_scores_need_no_attention_that_is_known() -> None:
    """An attention of somebody's own, without masks: tokens are scored, but none can be CONTEXT."""
    made, spy = batch(["ttiiiitttt", "ttttiiiitt"], "uu"), Spy()
    with torch.no_grad():
        dense = llama("eager")(made.ids, output_attentions=True, use_cache=False).attentions[2]
    model = llama()
    drop = td.apply(model, Looking(spy, 2))
    AttentionInterface.register("ignores_masks", ignores_masks)
    try:
        with_attention(model, "ignores_masks")
        with drop.layout(td.TokenLayout(made.image)), torch.no_grad():
            model(made.ids, use_cache=False)
            context = td.apply(with_attention(llama(), "sdpa"), td.HiMix())
        with_attention(context.owner, "ignores_masks")
        with (
            context.layout(td.TokenLayout(made.image)),
            pytest.raises(td.UnsupportedError, match="'ignores_masks' attention takes no rectangular mask"),
        ):
            context.owner(made.ids, use_cache=False)
    finally:
        AttentionInterface._global_mapping.pop("ignores_masks")
    seen = spy.given[0].attention
    assert seen is not None
    for sample in range(2):
        rows = seen.probabilities[sample][:, seen.valid[sample]]
        torch.testing.assert_close(rows, dense[sample][:, -rows.shape[1] :], rtol=0, atol=1e-5)


GENERATED = [
    (method, "flash_attention_2") for method in ("himix_range", "hmgen_shared", "gone", "context_last", "fastv")
]
GENERATED += [(method, "flex_attention") for method in ("himix_range", "hmgen_shared")]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("method", "attention"), GENERATED)
def test_generation_with_a_cache(attention: str, method: str, padded: bool) -> None:
    """New images that skip layers, too: equal to sdpa."""
    given = generation.PADDED if padded else generation.RAGGED
    model, drop = generation.dropped(generation.METHODS[method])
    more = {"do_sample": False, "max_new_tokens": 4}
    more |= {} if method in generation.MAKES_IMAGES else {"suppress_tokens": generation.TEXT_ONLY}
    expected = generation.generated(model, drop, given, True, **more)
    with kernels():
        found = generation.generated(with_attention(model, attention), drop, given, True, **more)
    assert torch.equal(found.sequences, expected.sequences)
    assert generation.apart(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-5


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_a_cache_of_a_fixed_length(attention: str) -> None:
    made, model = batch(["ttiiiitttt", "ttttiiiitt"], "uu"), llama()
    drop = td.apply(model, td.FastV(2, 0.5))
    with drop.layout(td.TokenLayout(made.image)), torch.no_grad(), kernels():
        expected = model(made.ids, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=24)
        found = with_attention(model, attention)(made.ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_under_activation_checkpointing(attention: str) -> None:
    made = batch(*MIXED, "left")
    model, drop = dropped(BASE, METHODS["himix"], multiple=4)
    expected = reference_step(BASE, METHODS["himix"], drop, made)
    with kernels():
        found = engine_step(checkpointed(with_attention(model, attention)), drop, made)
    assert close(found, expected, made.real, 1e-9)


def test_an_attention_that_sees_both_sides() -> None:
    """Of the text all rows, and of a CONTEXT image too; as sdpa sees them, which is given no mask either."""
    made = batch(["ttiit", "tiiit"], "uu")
    model, drop = dropped(BASE, {"u": td.HiMix("1:3")}, multiple=2)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    found = []
    for attention in ("sdpa", "flash_attention_2"):
        with kernels(), drop.layout(made.layout()):
            logits = with_attention(model, attention)(made.ids, use_cache=False).logits
            loss = logits[made.real].square().sum()
            found.append((logits, *torch.autograd.grad(loss, list(model.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_removing_gives_the_attention_back() -> None:
    model, made = copy.deepcopy(BASE), batch(["ttiit"], "u")
    before = snapshot(model)
    drop = td.apply(model, {"u": td.HiMix("1:")})
    with kernels(), drop.layout(made.layout()):
        with_attention(model, "flash_attention_2")(made.ids, use_cache=False)
        copied = copy.deepcopy(model)
        assert follows(copied.model.layers[1].self_attn)
        assert type(copied.model.layers[1].self_attn) is type(model.model.layers[1].self_attn)
        assert model.model.layers[1].self_attn.config is model.config
    with_attention(model, "sdpa")
    drop.remove()
    assert snapshot(model) == before


def test_kinds_of_attention() -> None:
    with kernels():
        found = {name: kind(name) for name in ("sdpa", "eager", *EVERY, "of_their_own")}
    flash = dict.fromkeys(FLASH, "flash")
    assert found == {"sdpa": "sdpa", "eager": "eager", **flash, "flex_attention": "flex", "of_their_own": None}


tokens_written = st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), min_size=1, max_size=10)


@given(st.lists(tokens_written, min_size=1, max_size=3), st.booleans(), st.integers(0, 3))
@settings(max_examples=40)
def test_sequences_say_what_the_mask_says(rows: list[Any], both: bool, fill: int) -> None:
    """Each token is of a packed sample, is an image or not, and may be seen or not; `fill` rows more compute."""
    tokens = max(map(len, rows))
    packs = torch.tensor([sorted(pack for pack, *_ in row) + [9] * (tokens - len(row)) for row in rows])
    image = torch.tensor([[one for _, one, _ in row] + [False] * (tokens - len(row)) for row in rows])
    real = torch.tensor([[one for *_, one in row] + [False] * (tokens - len(row)) for row in rows])
    size, context = int((~image).sum(1).max()) or 1, int(image.sum(1).max())
    text, rest = ((one.to(torch.uint8).argsort(dim=1, stable=True), one.sum(1)) for one in (image, ~image))
    queries, images = text[0][:, : min(tokens, size + fill)], rest[0][:, :context]
    size = queries.shape[1]
    columns = torch.cat([images, queries], 1)
    valid = torch.cat(
        [torch.arange(context) < rest[1].sub(tokens).neg()[:, None], torch.arange(size) < (~image).sum(1)[:, None]], 1
    )
    valid &= real.gather(1, columns)
    own = torch.arange(context, context + size).expand_as(queries)
    seen = Sight(queries, columns, own, valid, (packs.gather(1, queries), packs.gather(1, columns)), tokens, both=both)
    made, mask = seen.sequences(), seen.mask(None)[:, 0]
    keys = torch.arange(columns.numel()) if made.keys is None else made.keys
    assert made.query_ends[0] == made.key_ends[0] == 0
    assert (int(made.query_ends[-1]), int(made.key_ends[-1])) == (queries.numel(), len(keys))
    assert made.longest == (int(made.query_ends.diff().max()), int(made.key_ends.diff().max()))
    for query, found in enumerate(seen_by(made, columns.numel(), both)):
        row, at = divmod(query, size)
        if valid[row, context + at]:  # else its output is thrown away
            assert found == (row * columns.shape[1] + mask[row, at].nonzero().flatten()).tolist()


MUTATIONS: dict[str, Any] = {
    "keys in another order": lambda x, keys: sights.pick_keys(x, keys.flip(0)),
    "keys of the first sequence": lambda x, keys: sights.pick_keys(x, keys * 0),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_of_the_sequences_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = batch(*MIXED, "left")
    assert agrees("flash_attention_2", METHODS["himix"], made)
    monkeypatch.setattr("tokendrop.engine.model.attention.pick_keys", MUTATIONS[name])
    assert not agrees("flash_attention_2", METHODS["himix"], made)
