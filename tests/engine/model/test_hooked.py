"""A `forward` that other libraries put into an instance: accelerate's hooks, patches of one's own.

Shape letters: B batch, T tokens.
"""

import copy
import types

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from families import model as family
from helpers import MIXED, batch, close, engine_step, llama, perturbed, same, snapshot, step
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import tokendrop as td

MADE = batch(*MIXED, side="left")
METHODS = {
    "none": {"u": td.HiMix("1:"), "g": td.HMGen("1:3")},
    "separate": {"u": td.HiMix("1:", "shared"), "g": td.HMGen("1:3", "per-task")},
    "router": {"u": td.MixtureOfDepths("1:3", 0.5), "g": td.Drop("1:3", 0.5, score="attention")},
}


def gpt2():
    return copy.deepcopy(family("gpt2", "sdpa"))


def untied():
    return llama(tie_word_embeddings=False)


class Watching(ModelHook):
    """A hook that only counts."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def watched(model, folder):
    for module in model.modules():
        add_hook_to_module(module, Watching())
    return model


WAYS = {
    "hooks": watched,
    "dispatch": lambda model, folder: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu") or model,
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu") or model,
}


def logits(model, drop):
    with torch.no_grad(), drop.layout(MADE.layout()):
        return model(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False).logits[MADE.real]


def applied(model, name):
    torch.manual_seed(3)  # of routers
    return perturbed(td.apply(model, METHODS[name], multiple=4))


@pytest.mark.parametrize("make", [untied, gpt2])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_hooks_in_any_order_change_nothing(way, name, make, tmp_path):
    plain = make()
    expected = logits(plain, applied(plain, name))
    before = WAYS[way](make(), tmp_path / "before")
    drop = applied(before, name)
    assert all(not p.is_meta for p in drop.layers.parameters())
    assert torch.equal(logits(before, drop), expected)
    after = make()
    drop = applied(after, name)
    after = WAYS[way](after, tmp_path / "after")
    assert torch.equal(logits(after, drop), expected)


def test_a_device_map_trains_as_without(tmp_path):
    untied().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    plain = untied()
    expected = engine_step(plain, applied(plain, "separate"), MADE)
    assert same(engine_step(model, applied(model, "separate"), MADE), expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("first", ["hooks", "apply"])
def test_remove_beneath_hooks(first, name, tmp_path):
    model = untied()
    expected = step(model, MADE)
    if first == "hooks":
        watched(model, tmp_path)
        before = snapshot(model)
    drop = applied(model, name)
    if first == "apply":
        watched(model, tmp_path)
    engine_step(model, drop, MADE)
    drop.remove()
    assert same(step(model, MADE), expected)
    if first == "hooks":
        # The hook's bound method is made anew, and so is another object that equals the first.
        assert [one[:3] for one in snapshot(model)] == [one[:3] for one in before]
    layer = model.model.layers[1]
    assert layer._hf_hook.calls > 0
    assert layer._old_forward == types.MethodType(type(layer).forward, layer)


@pytest.mark.parametrize("name", METHODS)
def test_hooks_taken_away(name, tmp_path):
    plain = untied()
    expected = logits(plain, applied(plain, name))
    model = watched(untied(), tmp_path)
    drop = applied(model, name)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model, drop), expected)
    drop.remove()
    assert same(step(model, MADE), step(untied(), MADE))


def replaced(module):
    """As a monkey patch does: the class's own forward, whatever is in front of the class."""
    kind = nn.Linear if isinstance(module, nn.Linear) else LlamaDecoderLayer
    module.forward = types.MethodType(lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs), module)


def closure(module):
    """As a wrapper does that goes on to the forward that it found."""
    found = module.forward
    module.forward = lambda *args, **kwargs: found(*args, **kwargs)


PLACES = {"layer": lambda model: model.model.layers[2], "linear": lambda model: model.model.layers[2].self_attn.k_proj}


@pytest.mark.parametrize("patch", [replaced, closure])
@pytest.mark.parametrize("place", PLACES)
def test_a_forward_that_would_go_past_apply_is_refused(place, patch):
    model = untied()
    patch(PLACES[place](model))
    before = snapshot(model)
    name = "decoder layer 2" if place == "layer" else "self_attn.k_proj of decoder layer 2"
    with pytest.raises(td.UnsupportedError, match=rf"^{name} has a `forward` of its own in the instance"):
        td.apply(model, METHODS["separate"])
    assert snapshot(model) == before
    if place == "linear":
        td.apply(model, td.HMGen("1:3"))  # which leaves linears as they are


@pytest.mark.parametrize("name", ["none", "separate"])
@pytest.mark.parametrize("place", PLACES)
def test_one_hung_later_is_refused_where_it_goes_past(place, name):
    model = untied()
    drop = applied(model, name)
    expected = logits(model, drop)
    replaced(PLACES[place](model))
    with pytest.raises(td.UnsupportedError, match="which goes past what apply puts into its class"):
        logits(model, drop)
    with drop.disabled(), torch.no_grad():
        model(MADE.ids)
    del PLACES[place](model).forward
    assert torch.equal(logits(model, drop), expected)


@pytest.mark.parametrize("place", PLACES)
def test_one_hung_later_that_goes_on_works(place):
    model = untied()
    drop = applied(model, "separate")
    expected = engine_step(model, drop, MADE)
    closure(PLACES[place](model))
    assert close(engine_step(model, drop, MADE), expected, MADE.real, 1e-6)


def test_an_error_behind_a_hook_stays_what_it_is(tmp_path):
    model = untied()
    drop = applied(model, "separate")
    watched(model, tmp_path)
    with pytest.raises(td.LayoutError, match="hidden states"), drop.layout(MADE.layout(labels=None)):
        model(MADE.ids[:, :4])
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), drop.layout(MADE.layout()):
        model(MADE.ids)
    hook.remove()
    assert torch.isfinite(logits(model, drop)).all()


def test_layers_on_several_devices_are_refused():
    model = untied()
    for index, layer in enumerate(model.model.layers):
        hook = Watching()
        hook.execution_device = f"cuda:{index // 2}"
        add_hook_to_module(layer, hook)
    before = snapshot(model)
    with pytest.raises(td.UnsupportedError, match=r"run on 3 devices, cpu:0, cuda:0, cuda:1; load the decoder on one"):
        td.apply(model, td.HiMix())
    assert snapshot(model) == before
