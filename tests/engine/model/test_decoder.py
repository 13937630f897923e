"""Finding a decoder, and learning how its layers are called and made."""

import copy
import inspect

import pytest
import torch
from helpers import checkpointed, llama
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import tokendrop as td
from tokendrop.engine.model.context import keys_values
from tokendrop.engine.model.decoder import decoders, find_layers, is_sharded, layer_spec, reentrant

BASE = llama()


def test_finds_the_layer_list():
    path, layers = find_layers(BASE)
    assert path == "model.layers"
    assert layers is BASE.model.layers
    assert find_layers(BASE.model) == ("layers", layers)
    assert find_layers(nn.ModuleDict({"a": nn.ModuleDict({"b": BASE})}))[0] == "a.b.model.layers"


def test_other_lists_are_no_decoders():
    lists = {"empty": nn.ModuleList(), "linear": nn.ModuleList([nn.Linear(2, 2)] * 3), "net": BASE}
    encoder = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)])
    two_classes = nn.ModuleList([copy.deepcopy(BASE.model.layers[0]), nn.Identity()])
    model = nn.ModuleDict(lists | {"encoder": encoder, "mixed": two_classes})
    assert [name for name, _ in decoders(model)] == ["net.model.layers"]
    bidirectional = copy.deepcopy(BASE)
    for layer in bidirectional.model.layers:
        layer.self_attn.is_causal = False
    assert decoders(bidirectional) == []


def test_a_path_chooses():
    model = nn.ModuleDict({"a": BASE, "b": llama(seed=1)})
    assert find_layers(model, "b.model.layers") == ("b.model.layers", model["b"].model.layers)
    drop = td.apply(model, td.HiMix(), layers="b.model.layers")
    assert drop.decoder_layers is model["b"].model.layers
    assert type(model["a"].model.layers[0]) is LlamaDecoderLayer
    with drop.disabled():
        assert model["a"](torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, 50)
    drop.remove()
    assert type(model["b"].model.layers[0]) is LlamaDecoderLayer


@pytest.mark.parametrize("path", ["model.layer", "model", "", "model.layers.0", "lm_head", "model.layers.9"])
def test_wrong_paths(path):
    with pytest.raises(td.DecoderError, match=f"layers={path!r}"):
        find_layers(BASE, path)


def test_the_spec_of_a_llama_layer():
    layer = BASE.model.layers[0]
    spec = layer_spec(layer, type(layer))
    assert (spec.parameters[0], spec.mask) == ("hidden_states", "attention_mask")
    assert spec.attention == "self_attn"
    assert spec.cache in ("past_key_values", "cache")  # as transformers calls it before 5.24, and from then on
    assert spec.linears == (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"))
    assert spec.context_refusal(layer) is None
    assert spec.backend(layer) == "sdpa"
    x, mask = torch.zeros(1, 2, 32), torch.ones(1, 2)
    hidden, named = spec.bind((x, mask), {"use_cache": False, "more": 3})
    assert hidden is x
    assert named == {"attention_mask": mask, "use_cache": False, "more": 3}
    hidden, named = spec.bind((), {"hidden_states": x})
    assert hidden is x
    assert named == {}


@pytest.mark.parametrize("name", ["cache", "past_key_values", "past_key_value", "layer_past"])
def test_the_cache_is_found_by_each_of_its_names(name):
    class Layer(LlamaDecoderLayer):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    names = ("self", "hidden_states", "attention_mask", name)
    given = [inspect.Parameter(one, inspect.Parameter.POSITIONAL_OR_KEYWORD) for one in names]
    Layer.forward.__signature__ = inspect.Signature(given)
    layer = Layer(BASE.config, 0)
    spec = layer_spec(layer, Layer)
    assert spec.cache == name
    assert spec.context_refusal(layer) is None


def test_a_layer_without_hidden_states_is_refused():
    class Odd(nn.Module):
        def forward(self, *, x):
            return x

    with pytest.raises(td.UnsupportedError, match="Odd"):
        layer_spec(Odd(), Odd)


def test_keys_and_values_are_the_layers_own():
    layer, seen = copy.deepcopy(BASE.model.layers[1]), {}
    spec = layer_spec(layer, type(layer))

    class Cache:
        def update(self, keys, values, *_, **__):
            seen.update(keys=keys, values=values)
            return keys, values

    x = torch.randn(2, 6, 32)
    rotary = BASE.model.rotary_emb(x, torch.arange(6)[None])
    layer(x, position_embeddings=rotary, **{spec.cache: Cache()})
    keys, values = keys_values(layer, type(layer).forward, x, {"position_embeddings": rotary}, spec.cache)
    assert torch.equal(keys, seen["keys"])
    assert torch.equal(values, seen["values"])


def test_reentrant():
    model = copy.deepcopy(BASE)
    assert not any(reentrant(layer) for layer in model.model.layers)
    assert not any(reentrant(layer) for layer in checkpointed(model).model.layers)
    assert all(reentrant(layer) for layer in checkpointed(model, reentrant=True).model.layers)
    assert not any(reentrant(layer) for layer in model.eval().model.layers)


def test_not_sharded():
    assert not is_sharded(BASE)


def test_an_eager_attention_with_a_mask_of_its_own_takes_no_context():
    model = copy.deepcopy(BASE)
    model.set_attn_implementation("eager")
    layer = model.model.layers[0]
    assert layer_spec(layer, type(layer)).context_refusal(layer) is None
    layer.self_attn.register_buffer("bias", torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())
    with pytest.raises(td.UnsupportedError, match="mask of its own by index; load it with attn_implementation='sdpa'"):
        td.apply(model, td.HiMix())
    td.apply(model, td.HMGen("1:3")).remove()
