"""What cannot be dropped is refused before anything changes, and an apply that breaks leaves nothing behind.

What depends on the attention implementation is asked where it is used, since it may change after apply.
"""

import copy

import pytest
import torch
from families import model
from helpers import batch as written
from helpers import llama, snapshot
from kernels_stand_in import ignores_masks
from torch import nn
from transformers import (
    AttentionInterface,
    CodeGenConfig,
    CodeGenForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import tokendrop as td
from tokendrop.engine.reference import reference

METHODS = [td.HMGen("1:3"), td.HiMix(), td.HiMix(separate="shared"), td.FastV(2, 0.5)]
MADE = written(["ttiiiitttt", "ttttiiiitt"], "uu")


def shared():
    built = llama()
    layers = built.model.layers
    built.model.layers = nn.ModuleList([layers[0], layers[1], layers[0], layers[1]])
    return built


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_layer_that_stands_in_the_list_twice_is_refused(method):
    built = shared()
    before = snapshot(built)
    with pytest.raises(td.UnsupportedError, match=r"layers 0 and 2 of 'model\.layers' are one LlamaDecoderLayer"):
        td.apply(built, method)
    assert snapshot(built) == before
    assert "layers 0 and 2" in td.inspect(built).support["HMGen"]


def test_hand_written_layers_that_are_one_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(td.UnsupportedError, match="layers 0 and 1 of 'layers' are one TransformerEncoderLayer"):
        td.DropLayers([layer, layer], td.Drop(":", 0.5))
    assert type(layer) is nn.TransformerEncoderLayer


def test_layers_may_share_their_parameters_and_their_linears():
    # Layers 2 and 3 are modules of their own, made of the linears of 0 and 1.
    built = shared()
    for index in (2, 3):
        of = built.model.layers[index]
        own = copy.deepcopy(of)
        for name, child in of.self_attn.named_children():
            setattr(own.self_attn, name, child)
        own.self_attn.layer_idx = index
        built.model.layers[index] = own
    plain, before = copy.deepcopy(built), snapshot(built)
    methods = {"u": td.HiMix("1:")}
    with reference(plain, methods, MADE.layout()):
        expected = plain(MADE.ids, use_cache=False).logits
    drop = td.apply(built, {"u": td.HiMix("1:", "shared")}, multiple=1)
    with drop.layout(MADE.layout()):
        found = built(MADE.ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    drop.remove()
    assert snapshot(built) == before


class Final(nn.Linear):
    """A linear that may not be derived from, as those of some quantisers."""

    def __init_subclass__(cls, **_):
        raise TypeError("final")


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("methods", [td.HiMix(), {"u": td.HiMix(separate="per-task"), "g": td.HMGen("1:3")}])
def test_an_apply_that_breaks_leaves_the_model_as_it_was(methods, labelled):
    built = llama()
    built.model.layers[2].self_attn.v_proj = Final(32, 16, bias=False)
    before, expected = snapshot(built), built(MADE.ids).logits
    hooks = len(built._load_state_dict_pre_hooks)
    with pytest.raises(TypeError, match="final"):
        td.apply(built, methods, labelled_logits=labelled)
    assert snapshot(built) == before
    assert len(built._load_state_dict_pre_hooks) == hooks
    assert torch.equal(built(MADE.ids).logits, expected)
    with pytest.raises(td.AppliedError):
        td.handle(built)
    td.apply(built, td.HMGen("1:3")).remove()  # which swaps no linear


def test_a_breaking_vision_encoder_or_head_leaves_the_model_as_it_was(monkeypatch):
    built = copy.deepcopy(model("llava", "sdpa"))
    before = snapshot(built)

    def broken(*_):
        raise RuntimeError("broken")

    for place in ("routers.inject", "head.inject"):
        with monkeypatch.context() as patched:
            patched.setattr(f"tokendrop.engine.forward.{place}", broken)
            with pytest.raises(RuntimeError, match="broken"):
                td.apply(built, td.VScan(0.5, (2,), (0.5,), -1, -1, 1), labelled_logits=True)
        assert snapshot(built) == before


@pytest.fixture
def registered():
    AttentionInterface.register("ignores_masks", ignores_masks)
    yield "ignores_masks"
    AttentionInterface._global_mapping.pop("ignores_masks")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("method", [td.HiMix("1:"), td.Drop("1:", 0.5, "norm", "context")], ids=repr)
def test_another_attention_after_apply_is_refused_where_it_is_used(method, cached, registered):
    built = llama()
    drop = td.apply(built, method)
    built.set_attn_implementation(registered)
    layout = td.TokenLayout(MADE.image)
    with drop.layout(layout), torch.no_grad():
        with pytest.raises(td.UnsupportedError, match=r"'ignores_masks' attention takes no rectangular mask"):
            built(MADE.ids, use_cache=cached)
        built.set_attn_implementation("eager")
        eager = built(MADE.ids, use_cache=cached).logits
        built.set_attn_implementation("sdpa")
        torch.testing.assert_close(eager, built(MADE.ids, use_cache=cached).logits, rtol=1e-4, atol=1e-4)
    with drop.layout(td.TokenLayout(torch.zeros_like(MADE.image))), torch.no_grad():
        built.set_attn_implementation(registered)
        built(MADE.ids, use_cache=False)  # nothing is dropped


def test_generation_behind_skipped_tokens_needs_a_mask(registered):
    built = llama()
    drop = td.apply(built, td.HMGen("1:3"), multiple=1)
    built.set_attn_implementation(registered)
    with drop.layout(td.TokenLayout(MADE.image)), torch.no_grad():
        cache = built(MADE.ids, use_cache=True).past_key_values
        with pytest.raises(td.UnsupportedError, match=r"layer 1 generates behind.*'ignores_masks'.*'sdpa'"):
            built(MADE.ids[:, :1], past_key_values=cache, use_cache=True)


def fused(name):
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
    drop = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if name == "codegen":
        return CodeGenForCausalLM(CodeGenConfig(**sizes, **drop, **ids, rotary_dim=4)), "transformer.h"
    return GPTBigCodeForCausalLM(GPTBigCodeConfig(**sizes, **drop, **ids, multi_query=name == "one key")), None


@pytest.mark.parametrize("separate", ["none", "shared"])
@pytest.mark.parametrize("name", ["one key", "a key for each head", "codegen"])
def test_fused_linears_in_other_orders(name, separate):
    torch.manual_seed(0)
    built, path = fused(name)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.2)
    plain, methods = copy.deepcopy(built), {"u": td.HiMix("1:", separate)}
    if name == "codegen":
        # Its linear is in four blocks of q, v and k, which inspection does not know, and takes whole.
        if separate == "shared":
            with pytest.raises(td.UnsupportedError, match="no linears for q, k and v"):
                td.apply(built, methods, layers=path)
            return
        built.transformer.h[0].attn.is_causal = plain.transformer.h[0].attn.is_causal = None
    with reference(plain, {"u": td.HiMix("1:")}, MADE.layout(), layers=path):
        expected = plain(MADE.ids, use_cache=False).logits
    drop = td.apply(built, methods, layers=path, multiple=1)
    with drop.layout(MADE.layout()):
        found = built(MADE.ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_biases_without_a_batch_dimension_are_refused():
    # MPT slices the last columns of its biases itself, which would be those of other tokens.
    config = MptConfig(vocab_size=50, d_model=32, n_heads=4, n_layers=3, expansion_ratio=2, max_seq_len=32)
    built = MptForCausalLM(config)
    drop = td.apply(built, td.HMGen("1:2"), layers="transformer.blocks")
    message = r"'position_bias' of shape \(4, 1, 32\)"
    with drop.layout(MADE.layout()), pytest.raises(td.UnsupportedError, match=message):
        built(MADE.ids, use_cache=False)


class Stateful(nn.Module):
    """A layer that keeps something else than keys and values in its cache."""

    def __init__(self, asks):
        super().__init__()
        self.linear, self.asks = nn.Linear(8, 8), asks

    def forward(self, x, attention_mask=None, past_key_values=None):
        if self.asks and past_key_values is not None:
            past_key_values.get_state(0)
        return x + self.linear(x)


@pytest.mark.parametrize(
    ("asks", "message"), [(True, "asks its cache for 'get_state'"), (False, "without handing keys")]
)
def test_layers_that_keep_no_keys_in_their_cache_are_refused_where_they_run(asks, message):
    layers = td.DropLayers([Stateful(asks) for _ in range(3)], td.HiMix("1:")).eval()
    with layers.tokendrop.layout(td.TokenLayout(MADE.image)), pytest.raises(td.UnsupportedError, match=message):
        layers(torch.ones(2, 10, 8))
