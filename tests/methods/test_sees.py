"""A score function of one's own sees what the built-in ones see, where it asks for it.

Shape letters: B batch, T tokens.
"""

import copy

import families
import pytest
import torch
from helpers import Spy, batch, close, dropped, engine_step, llama, reference_step
from transformers import DynamicCache

import tokendrop as td
from tokendrop import scores
from tokendrop.engine.plan.selection import highest

BASE = llama(dtype=torch.float64)
SAMPLES = ["ttiiiiiittt", "tiitiitt", "tttt"]


def run(score, layers="1:3", made=None):
    made = made or batch(SAMPLES, "uuu", "left")
    methods = {"u": td.Drop(layers, 0.5, score)}
    model, drop = dropped(BASE, methods, multiple=1)
    ours = engine_step(model, drop, made)
    assert close(ours, reference_step(BASE, methods, drop, made), made.real, 1e-9)
    return ours


@td.sees(attention="answer")
def looked_at(scoring):
    return scores.attention(*scoring.attention[:2])


@td.sees(attention="answer")
def longest_values(scoring):
    return scores.value_norm(scoring.attention.values)


@td.sees(attention="prompt", before=True)
def keys_like_those_of_the_text(scoring):
    keys = scoring.attention.keys.mean(1)
    text = (keys * scoring.text[:, :, None]).sum(1) / scoring.text.sum(1)[:, None].clamp(min=1)
    return torch.cosine_similarity(keys, text[:, None], -1)


@pytest.mark.parametrize(("own", "built_in"), [(looked_at, "attention"), (longest_values, "value_norm")])
def test_a_function_is_the_built_in_score(own, built_in):
    assert torch.equal(run(own)[0], run(built_in)[0])


@pytest.mark.parametrize("layers", ["0:2", "1:3", "2:"])
def test_the_engine_equals_the_reference_for_a_function_of_keys_and_text(layers):
    run(keys_like_those_of_the_text, layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_are_those_that_a_cache_holds(attention):
    spy = td.sees(attention="answer", before=True)(Spy())
    model, drop = dropped(llama(attention, dtype=torch.float64), td.Drop("2:", 0.5, spy), multiple=1)
    made = batch(["ttiiiitt"], "u")
    with drop.layout(td.TokenLayout(made.image)), torch.no_grad():
        cache = model(made.ids, past_key_values=DynamicCache()).past_key_values
    (scoring,) = spy.given
    torch.testing.assert_close(scoring.attention.keys, cache.layers[1].keys)
    torch.testing.assert_close(scoring.attention.values, cache.layers[1].values)


def test_the_text_is_that_of_the_prompt():
    """No image, no padding, nothing that is trained, nothing that was generated."""
    spy, made = Spy(), batch(["ttiiiitttt", "tiitttt"], "uu", "left")
    labels = made.ids.clone()
    labels[:, :-2] = -100
    model, drop = dropped(BASE, td.Drop("2:", 0.5, spy), multiple=1)
    with drop.layout(td.TokenLayout(made.image, padding=made.real, labels=labels)):
        model(made.ids, attention_mask=made.mask, use_cache=False)
    text = made.real & ~made.image
    text[:, -2:] = False
    assert torch.equal(spy.given[-1].text, text)
    one = batch(["ttiiiitt"], "u")
    with drop.layout(td.TokenLayout(one.image)):
        model.generate(one.ids, max_new_tokens=3, do_sample=False, use_cache=False)
    assert spy.given[-1].text.tolist() == [[True, True, False, False, False, False, True, True, False, False]]


def test_the_encoder():
    spy = td.sees(encoder=(-1,))(Spy())
    module, data = copy.deepcopy(families.model("llava")), families.batch("llava", None)
    drop = td.apply(module.eval(), td.Drop("2:4", 2, spy))
    with drop.layout(td.TokenLayout(data.image)), torch.no_grad():
        module(**data.inputs, use_cache=False)
    encoded = spy.given[0].encoded
    assert encoded.attention.shape == (1, *data.image.shape)
    assert (encoded.attention[0] > 0).equal(data.image)


def test_what_is_not_asked_for_is_not_there():
    spy = Spy()
    run(spy)
    assert spy.given[0].attention is None
    assert spy.given[0].encoded is None


@pytest.mark.parametrize("wrong", ["attention", ("answer",), True])
def test_another_attribute_of_that_name_is_refused(wrong):
    def score(scoring):
        return scoring.states[..., 0]

    score.sees = wrong
    with pytest.raises(td.MethodError, match=r"write @td\.sees"):
        td.apply(copy.deepcopy(BASE), td.Drop("1:", 0.5, score))


def test_it_stands_above_a_function():
    with pytest.raises(td.MethodError, match="above a score function; found 3"):
        td.sees()(3)


def test_what_takes_no_attribute_is_refused():
    with pytest.raises(td.MethodError, match="takes no attribute; write a function around it"):
        td.sees(attention="answer")(len)


def dart_by_hand(module, made, layer, count, images, texts):
    """Kept tokens of one sample, from a dense run: keys as a cache holds them, states as they enter the layer."""
    with torch.no_grad():
        out = module(made.ids, use_cache=True, output_hidden_states=True)
    keys, x = out.past_key_values.layers[layer - 1].keys[0], out.hidden_states[layer][0]
    length, image = keys.abs().sum((0, 2)), made.image[0]
    tokens = image.nonzero().flatten().tolist()
    behind = [t for t in range(len(x)) if t > max(tokens)]
    first = sorted(tokens, key=lambda t: -length[t].item())[:images]
    pivots = first + sorted(behind, key=lambda t: -length[t].item())[:texts]
    left, chosen = [t for t in tokens if t not in first], list(first)
    size, more = divmod(count - images, len(pivots))
    for at, pivot in enumerate(pivots):
        near = sorted(left, key=lambda t: torch.cosine_similarity(x[t], x[pivot], 0).item())
        chosen += near[: size + (at < more)]
        left = [t for t in left if t not in chosen]
    return sorted(chosen)


def test_dart_from_a_dense_run():
    made = batch(["tttiiiiiiiiiiiitttt"], "u")
    model, drop = dropped(BASE, td.DART(2, 7, 2, 2), multiple=1)
    with drop.layout(td.TokenLayout(made.image)), torch.no_grad():
        held = model(made.ids, use_cache=True).past_key_values.layers[2]
    kept = [t for t in held.positions[0][held.valid[0]].tolist() if made.image[0, t]]
    assert sorted(kept) == dart_by_hand(copy.deepcopy(BASE), made, 2, 7, 2, 2)


def test_div_prune_from_the_embeddings():
    made = batch(["tttiiiiiiiiiiiitttt"], "u")
    model, drop = dropped(BASE, td.DivPrune(5), multiple=1)
    with drop.layout(td.TokenLayout(made.image)), torch.no_grad():
        held = model(made.ids, use_cache=True).past_key_values.layers[0]
        states = model.model.embed_tokens(made.ids)
    expected = highest(scores.diverse(states, made.image, torch.tensor([5])), made.image, torch.tensor([5]))
    kept = [t for t in held.positions[0][held.valid[0]].tolist() if made.image[0, t]]
    assert sorted(kept) == expected[0].nonzero().flatten().tolist()
