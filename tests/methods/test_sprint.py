"""SPRINT: by hand, against the dense reference, in training and in evaluation, and what is refused.

Shape letters: B batch, T tokens, D hidden.
"""

import copy
from dataclasses import dataclass
from typing import Any

import families
import pytest
import torch
from helpers import batch, checkpointed, close, dropped, engine_step, llama, reference_step, same, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

import tokendrop as td
from tokendrop.engine.reference import reference
from tokendrop.roles import LayerRoute, Merge, Role, Select

BASE, EXACT = llama(spread=0.2), llama(dtype=torch.float64)
SAMPLES = st.lists(st.text("ti", min_size=2, max_size=9), min_size=1, max_size=3)
METHODS = st.builds(
    td.Sprint, st.sampled_from([":", "1:3", "2:", "0:1", (1, 3)]), st.sampled_from([0, 1, 3, 0.25, 1.0])
)
OTHERS = st.sampled_from([None, td.HMGen("1:3"), td.Sprint("1:2", 0.5), td.Sprint("1:4", 1), td.Drop("1:3", 0.5)])


@dataclass(frozen=True)
class Mine:
    """A method with one selection, in layers 1 and 2, whatever the mode."""

    select: Select
    role: Role = Role.BYPASS
    separate = "none"

    def route(self, num_layers: int, strength: float = 1.0) -> Any:
        inside = LayerRoute(self.role, select=self.select)
        return tuple(inside if index in (1, 2) else LayerRoute() for index in range(num_layers))


def trained(base: Any, methods: Any, **kwargs: Any) -> Any:
    model, drop = dropped(base, methods, **kwargs)
    return model.train(), drop


@given(SAMPLES, METHODS, OTHERS, st.sampled_from(["left", "right"]), st.booleans(), st.integers(0, 99))
@settings(max_examples=8)
def test_engine_equals_reference(samples, method, other, side, recomputes, seed):
    """Also where another task cuts the range, has a part of the same one, or an end of its own."""
    methods = {"u": method, "g": other or method}
    made = batch(samples, "ugu"[: len(samples)], side, seed)
    for base, tolerance in ((BASE, 1e-5), (EXACT, 1e-9)):
        model, drop = trained(base, methods, multiple=4)
        if recomputes:
            checkpointed(model)
        assert close(engine_step(model, drop, made), reference_step(base, methods, drop, made), made.real, tolerance)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "falcon_7b", "deepseek_v3", "mixtral", "llava", "qwen3_vl"])
def test_families_equal_the_reference(name):
    base, data, methods = families.model(name), families.batch(name, "left"), {"g": td.Sprint("0:2", 0.4)}
    layout = td.TokenLayout(data.image, "g", padding=data.real, labels=data.trained([True, True]))
    model, drop = dropped(base, methods, multiple=4)
    drop.in_training = True
    sets = copy.deepcopy(drop.layers)
    with drop.layout(layout, step=(0, 0)), torch.no_grad():
        logits = model(**data.inputs, use_cache=False).logits[data.real]
    with reference(copied := copy.deepcopy(base), methods, layout, sets), torch.no_grad():
        expected = copied(**data.inputs, use_cache=False).logits[data.real]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def by_hand(model: Any, fusion: Any, made: Any, kept: list[int]) -> torch.Tensor:
    """Logits of one sample whose image tokens, but for `kept`, skip layers 1 and 2, from the words."""
    mask, weight, bias = fusion
    every = torch.arange(made.ids.shape[1])
    images = made.image[0].nonzero().flatten().tolist()

    def run(layer: Any, states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        rotary = model.model.rotary_emb(states, at[None])
        return layer(states[None], position_embeddings=rotary, attention_mask=None)[0].view(len(at), -1)

    x = run(model.model.layers[0], model.model.embed_tokens(made.ids)[0], every)
    rows = torch.tensor([t for t in every.tolist() if t not in images or t in kept])
    deep = x[rows]
    for layer in model.model.layers[1:3]:
        deep = run(layer, deep, rows)
    states = list(x.index_copy(0, rows, deep))
    for t in images:
        y = states[t] if t in kept else mask
        states[t] = states[t] + weight[:, :32] @ y + weight[:, 32:] @ x[t] + bias
    return model.lm_head(model.model.norm(run(model.model.layers[3], torch.stack(states), every)))[None]


def test_by_hand_with_gradients():
    made, wanted = batch(["ttiiiiitt"], "g"), torch.tensor([0.0, 0, 0, 1, 0, 1, 0, 0, 0])
    method = Mine(Select(2, lambda s: wanted.expand_as(s.image), 1, fuse=True))
    model, drop = dropped(EXACT, method, multiple=1)
    ours = engine_step(model, drop, made)
    hand = copy.deepcopy(EXACT)
    fusion = [p.detach().clone().requires_grad_() for p in drop.layers[1]["fusion"].parameters()]
    logits = by_hand(hand, fusion, made, [3, 5])
    torch.testing.assert_close(ours[0], logits.detach(), rtol=1e-9, atol=1e-9)
    nn.functional.cross_entropy(logits[0, :-1], made.labels[0, 1:], ignore_index=-100, reduction="sum").backward()
    expected = {name: p.grad for name, p in hand.named_parameters()}
    names = ("mask", "linear.weight", "linear.bias")
    expected |= {f"tokendrop.layers.1.fusion.{name}": p.grad for name, p in zip(names, fusion, strict=True)}
    assert expected.keys() == ours[1].keys()
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-6, atol=1e-8)


MADE = batch(["ttiiitiitt", "tiitttiiitt", "ttttttt"], "ugu")


def test_at_first_it_is_the_drop_that_it_is_made_of():
    """To the bit in training, also under autocast; in evaluation it is the dense model."""
    found = {}
    for name, method in {"sprint": td.Sprint("1:3", 0.5), "drop": td.Drop("1:3", 0.5)}.items():
        model = copy.deepcopy(BASE).train()
        drop = td.apply(model, method)
        with torch.autocast("cpu", torch.bfloat16):
            found[name] = engine_step(model, drop, MADE)[0], engine_step(model, drop, MADE)[1]
        if name == "sprint":
            evaluated = engine_step(model.eval(), drop, MADE)
            assert close(evaluated, step(BASE, MADE), MADE.real, 1e-6)
    assert torch.equal(found["sprint"][0], found["drop"][0])
    assert all(torch.equal(found["sprint"][1][key], gradient) for key, gradient in found["drop"][1].items())
    assert found["sprint"][1]["tokendrop.layers.1.fusion.linear.weight"].any()


def test_in_evaluation_and_at_strength_0_all_image_tokens_compute_and_are_fused():
    model, drop = dropped(EXACT, td.Sprint("1:3", 1))
    made = batch(["ttiiiiitt"], "g")
    fusion = [p.detach() for p in drop.layers[1]["fusion"].parameters()]
    expected = by_hand(EXACT, fusion, made, list(range(2, 7))).detach()
    evaluated = engine_step(model, drop, made)
    drop.strength = 0.0
    torch.testing.assert_close(evaluated[0], expected, rtol=1e-9, atol=1e-9)
    assert same(engine_step(model.train(), drop, made), evaluated)
    drop.strength = 1.0
    assert not torch.allclose(engine_step(model, drop, made)[0], expected, atol=1e-2)


def test_packed_samples_equal_each_alone():
    model, drop = trained(EXACT, td.Sprint("1:3", 0.5), multiple=4)
    samples = ["tttiiiitt", "iittiitit", "tttii"]
    alone = [batch([one], "u", seed=at) for at, one in enumerate(samples)]
    ids, image = (torch.cat([getattr(one, name) for one in alone], 1) for name in ("ids", "image"))
    packs = torch.cat([torch.full((len(one),), at) for at, one in enumerate(samples)])[None]
    positions = torch.cat([torch.arange(len(one)) for one in samples])[None]
    with torch.no_grad():
        with drop.layout(td.TokenLayout(image, labels=ids, packs=packs), step=(0, 0)):
            found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for at, (one, part) in enumerate(zip(alone, found.split([len(one) for one in samples], 1), strict=True)):
            with drop.layout(td.TokenLayout(one.image, labels=one.ids), step=(0, 0), first=at):
                expected = model(input_ids=one.ids, use_cache=False).logits
            torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("sample", ["ttiiitt", "ttttttt"])
def test_new_image_tokens_are_refused(sample, use_cache):
    """Also behind a prompt without an image."""
    image = torch.tensor([[letter == "i" for letter in sample]])
    ids = torch.arange(1, 8)[None] + 30 * image  # from 30 on, ids are of images
    model, drop = dropped(BASE, td.Sprint("1:3"))
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(ids), "suppress_tokens": list(range(30))}
    for what in ({"new": "image"}, {"image_ids": torch.arange(30, 50)}):
        layout = td.TokenLayout(image, "u", **what)
        with drop.layout(layout), pytest.raises(td.UnsupportedError, match=r"1 generated tokens are images.*use HMGen"):
            model.generate(ids, **options)
    with drop.layout(td.TokenLayout(image, "u", new="text")):
        assert model.generate(ids, **options).shape[1] == 10


def test_a_fusion_is_saved_and_loaded_and_kept_by_a_dense_checkpoint(tmp_path):
    method = td.Sprint((1, 3), 0.5)
    model, drop = dropped(BASE, method)
    model.save_pretrained(tmp_path)
    again = td.apply(LlamaForCausalLM.from_pretrained(tmp_path), method)
    state = drop.layers.state_dict()
    parts = ("mask", "linear.weight", "linear.bias")
    assert list(state) == [f"{layer}.fusion.{part}" for layer in (1, 3) for part in parts]
    assert all(torch.equal(value, state[key]) for key, value in again.layers.state_dict().items())
    before = {key: value.clone() for key, value in state.items()}
    model.load_state_dict(llama(seed=3).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in drop.layers.state_dict().items())


def test_copies_and_removal():
    model, drop = dropped(BASE, td.Sprint("1:3"))
    copied = copy.deepcopy(model)
    assert same(engine_step(model, drop, MADE), engine_step(copied, td.handle(copied), MADE))
    assert not close(engine_step(model, drop, MADE), step(BASE, MADE), MADE.real, 1e-3)
    drop.remove()
    assert same(step(model, MADE), step(BASE, MADE))


def nothing(scoring: Any, kept: torch.Tensor) -> Merge:
    raise AssertionError


def score(scoring: Any) -> torch.Tensor:
    raise AssertionError


@pytest.mark.parametrize("more", [{"merge": nothing}, {"learned": True}, {"learned": True, "gate": 0.2}])
def test_a_selection_that_fuses_does_nothing_else(more):
    with pytest.raises(td.MethodError, match="layer 1 fuses where its range ends, and merges or has a router too"):
        Select(0.5, score, 1, fuse=True, **more)


@pytest.mark.parametrize("role", [Role.GONE, Role.CONTEXT, Role.ATTEND])
def test_tokens_that_rejoin_are_fused_and_no_others(role):
    model = copy.deepcopy(BASE)
    with pytest.raises(
        td.UnsupportedError, match=f"fuses image tokens behind layer 1, where the others are {role.name}"
    ):
        td.apply(model, Mine(Select(0.5, score, 1, fuse=True), role))
    assert not hasattr(model, "tokendrop")


class Twice(Mine):
    """The same selection in layers 1 and 3."""

    def route(self, num_layers: int, strength: float = 1.0) -> Any:
        inside = LayerRoute(Role.BYPASS, select=self.select)
        return tuple(inside if index in (1, 3) else LayerRoute() for index in range(num_layers))


@pytest.mark.parametrize(("method", "entered", "said"), [(Mine, 1, 0), (Mine, 1, 2), (Twice, 3, 1)])
def test_a_selection_that_fuses_says_where_its_range_begins(method, entered, said):
    message = f"selects image tokens that enter layer {entered}, but the selection is of layer {said}; say {entered}"
    with pytest.raises(td.UnsupportedError, match=message):
        td.apply(copy.deepcopy(BASE), method(Select(0.5, score, said, fuse=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_and_states_of_a_higher_one(dtype):
    """Parameters are made in the dtype of the layer, and take states of another."""
    model, drop = dropped(llama(dtype=dtype), td.Sprint("1:3"))
    fusion: Any = drop.layers[1]["fusion"]
    assert {p.dtype for p in fusion.parameters()} == {dtype}
    x, yes = torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)
    assert fusion(x, x, yes, yes).dtype == torch.float32
    drop.in_training = True
    with drop.layout(MADE.layout()):
        logits = model(MADE.ids, attention_mask=MADE.mask, use_cache=False).logits
    assert logits.dtype == dtype
    assert logits[MADE.real].isfinite().all()


def test_parameters_are_not_added_inside_ddp():
    class Inside(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(td.UnsupportedError, match=r"Sprint.* adds parameters, whose gradients"):
        td.apply(Inside(copy.deepcopy(BASE)), td.Sprint("1:3"))
