"""ATTEND: image tokens with attention and without FFN, by a Llama written by hand, by the reference and by formula.

Shape letters: B batch, T tokens, D hidden.
"""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf
from families import FAMILIES
from families import model as family_model
from hand_written import WIDTH, CachedBlock, rotary
from helpers import (
    MIXED,
    batch,
    checkpointed,
    close,
    dropped,
    earlier,
    engine_step,
    llama,
    oracle_step,
    reference_step,
    routed,
    same,
    snapshot,
    step,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokendrop as td
from tokendrop.engine.model.decoder import find_layers
from tokendrop.errors import UnsupportedError
from tokendrop.roles import LayerRoute, Role, Select

BASES = {dtype: llama(dtype=dtype, spread=0.2) for dtype in (torch.float32, torch.float64)}
TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-9)]
RAGGED = ["ttiiitittt", "tiitttiiitt", "iittiitit", "ttttttt", "tttiiiiii"]


def attend(layers=":", keep=0, score="norm"):
    return td.Drop(layers, keep, score, "attend")


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", [":", "1:3"])
def test_a_llama_written_by_hand(layers, side, dtype, tolerance):
    """Every image row is trained, in the last layer too; other tasks share the batch."""
    made, base = batch(RAGGED, "aauga", side), BASES[dtype]
    methods = {"a": attend(layers), "g": td.HMGen("1:3"), "u": td.HiMix("2:")}
    found, drop = routed(base, methods, made)
    expected = oracle_step(base, methods, drop, made)
    assert close(reference_step(base, methods, drop, made), expected, made.real, tolerance)
    assert close(found, expected, made.real, tolerance)
    assert not close(found, step(base, made), made.real, 1e-2)


@pytest.mark.parametrize("keep", [1, 4])
def test_kept_tokens_are_text_to_a_llama_written_by_hand(keep):
    made, base = batch(RAGGED, "aaaaa", "left"), BASES[torch.float64]
    found, _ = routed(base, {"a": attend("1:3", keep, earlier)}, made)
    kept = made.image & (made.image.cumsum(1) <= keep)
    none = {"a": attend("1:3")}
    _, drop = dropped(base, none)
    assert close(found, oracle_step(base, none, drop, replace(made, image=made.image & ~kept)), made.real, 1e-9)


@given(
    st.lists(st.text("ti", min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from([0, 1, 3, 0.3, 1.0]),
    st.sampled_from(["norm", "random", "attention"]),
    st.sampled_from(["1:3", "0:2", (0, 2), ":"]),
    st.sampled_from(["left", "right"]),
    st.sampled_from([1, 4, 64]),
    st.sampled_from(TOLERANCES),
    st.booleans(),
)
def test_the_engine_equals_the_reference(samples, keep, score, layers, side, multiple, kind, recompute):
    dtype, tolerance = kind
    made = batch(samples, ("g" + "hu" * 2)[: len(samples)], side)
    methods = {"g": attend(layers, keep, score), "h": td.HMGen("2:3"), "u": td.HiMix("2:")}
    found, drop = routed(BASES[dtype], methods, made, multiple, lambda one, _: checkpointed(one) if recompute else None)
    assert close(found, reference_step(BASES[dtype], methods, drop, made), made.real, tolerance)


class Custom:
    """A route written out."""

    separate = "none"

    def __init__(self, *layers, separate="none"):
        self.layers, self.separate = layers, separate

    def route(self, num_layers, strength=1.0):
        return self.layers


def test_projections_of_their_own():
    made, base = batch(RAGGED, "aaaaa", "left"), BASES[torch.float64]
    one = LayerRoute(Role.ATTEND, frozenset("qkv"))
    methods = {"a": Custom(LayerRoute(), one, one, LayerRoute(), separate="shared")}
    found, drop = routed(base, methods, made)
    assert close(found, reference_step(base, methods, drop, made), made.real, 1e-9)
    assert not close(found, routed(base, {"a": attend("1:3")}, made)[0], made.real, 1e-2)


def test_a_router_scales_what_the_layer_adds():
    made, base = batch(RAGGED, "aaaaa", "left"), BASES[torch.float64]
    select = Select(2, lambda scoring: scoring.router, 1, learned=True)
    methods = {"a": Custom(LayerRoute(), LayerRoute(Role.ATTEND, select=select), LayerRoute(), LayerRoute())}
    found, drop = routed(base, methods, made)
    assert close(found, reference_step(base, methods, drop, made), made.real, 1e-9)


@pytest.mark.parametrize("keep", [1.0, 100])
def test_all_kept_is_dense_to_the_bit(keep):
    made, base = batch(*MIXED, "left"), BASES[torch.float32]
    made = replace(made, tasks=("a",) * 5)
    found, drop = routed(base, {"a": attend(":", keep)}, made)
    assert same(found, step(base, made))
    assert drop.plan(made.layout()).dense


def test_the_last_layer_gives_an_output_that_may_be_trained():
    made = batch(["tiiit"], "a")
    drop = dropped(BASES[torch.float32], attend())[1]
    assert drop.plan(made.layout()).needed == 4  # no NeededRowError


def test_rows_of_the_ffn():
    """By hand: 4 text and 2 of 6 image tokens have an FFN in layers 1 and 2; the attention is of all 10."""
    drop = dropped(BASES[torch.float32], attend("1:3", 2), multiple=1)[1]
    plan = drop.plan(batch(["tiiiiiittt"], "a").layout())
    found = [(s.start, s.stop, s.groups[0].size, s.groups[0].ffn_rows, s.groups[0].pairs) for s in plan.spans]
    assert found == [(0, 1, 10, 10, 100), (1, 3, 10, 6, 100), (3, 4, 10, 10, 100)]
    assert repr(drop).endswith("ATTEND (without FFN) in 1:3 but for 2 of 576, 100% of image token-layers computed\n)")


def test_the_ffn_runs_on_these_rows_only():
    made, rows = batch(["tiiiiiittt"], "a"), []
    model, drop = dropped(BASES[torch.float32], attend("1:3", 2), multiple=1)
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:2]))
    engine_step(model, drop, made)
    assert rows == [(1, 10), (1, 6), (1, 6), (1, 10)]


# What a layer adds to its input behind the attention, by its family's own code: h = x + part(layer, attention).
PARTS = {
    "gemma3": lambda layer, out: layer.post_attention_layernorm(out),
    "paligemma2": lambda layer, out: layer.post_attention_layernorm(out),
    "olmo2": lambda layer, out: layer.post_attention_layernorm(out),
    "chameleon_swin": lambda layer, out: layer.input_layernorm(out),
    "granite": lambda layer, out: out * layer.residual_multiplier,
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MORE = {
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SIZES)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES | {"num_key_value_heads": 4})),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, residual_multiplier=0.3)),
    "gptj": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    ),
    "gpt_neox_serial": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"}, use_parallel_residual=False
        )
    ),
}


MIXERS = ("self_attn", "attention", "attn", "self_attention")


def made_model(name):
    """A model of a family, its vectors other than at first."""
    torch.manual_seed(0)
    module = MORE[name]() if name in MORE else copy.deepcopy(family_model(name))
    for p in module.parameters():
        p.data += (0.1 if p.dim() == 1 else 0.2) * torch.randn(p.shape)
    return module.eval()


@pytest.mark.parametrize("name", [*(name for name in FAMILIES if name != "minimax"), *MORE])
def test_every_family_gives_x_plus_attention(name, cell):
    """By hooks on the last layer and its attention, from what each family's own forward does with them."""
    module, seen = made_model(name), {}
    last = find_layers(module)[1][-1]

    def keep(key):
        return lambda _, args, kwargs, out: seen.update(
            {key: (args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)}
        )

    for key in ("", "mamba", *MIXERS):
        if child := (last if not key else getattr(last, key, None)):
            child.register_forward_hook(keep("attention" if key in MIXERS else key), with_kwargs=True)
    ids, image = torch.randint(10, 40, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    image[:, :2] = image[:, -1:] = False
    drop = td.apply(module, td.Drop((len(find_layers(module)[1]) - 1,), 0, then="attend"), multiple=4)
    with torch.no_grad(), drop.layout(td.TokenLayout(image)):
        module(ids, use_cache=False)
    x, out = seen[""]
    if name == "falcon_h1":
        part = seen["mamba"][1] * last.ssm_out_multiplier + seen["attention"][1] * last.attn_out_multiplier
    else:
        part = PARTS.get(name, lambda _, out: out)(last, seen["attention"][1])
    torch.testing.assert_close(out[image], (x + part)[image], rtol=1e-5, atol=1e-5)
    assert (out - x - part)[~image].abs().max(-1).values.min() > 1e-3  # text has an FFN
    if name == "falcon_h1":  # the others' cell is of gradients, too
        cell(name, "attend")


def test_a_layer_written_by_hand():
    torch.manual_seed(0)
    layers, hidden = [CachedBlock() for _ in range(3)], torch.randn(2, 8, WIDTH)
    image = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 0]]).bool()
    expected, (cos, sin) = hidden, rotary(8)
    for index, layer in enumerate(layers):
        h = expected + layer.mixer(layer.before(expected), cos, sin, None)
        f = layer.ffn(layer.after(h))
        expected = h + f.masked_fill(image[:, :, None] & (index > 0), 0)
    run = td.DropLayers(copy.deepcopy(layers), attend("1:"), multiple=1)
    with run.tokendrop.layout(td.TokenLayout(image)):
        torch.testing.assert_close(run(hidden, cos, sin), expected, rtol=1e-5, atol=1e-5)


class Added(CachedBlock):
    """What is changed in a layer so that a row without its FFN is no x + attention."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "two":
            self.mlp = nn.Linear(WIDTH, WIDTH)
        if kind == "dict":
            self.ffn = nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH)})
        if kind == "none":
            self.up, self.ffn = self.ffn, None

    def forward(self, x, cos, sin, attention_mask=None, past_key_values=None):
        h = x + self.mixer(self.before(x), cos, sin, attention_mask, past_key_values)
        return {
            "norm": lambda: self.after(h + self.ffn(h)),
            "bias": lambda: h + self.after(self.ffn(h)),  # a LayerNorm of zero is its bias
            "scale": lambda: 0.5 * h + self.ffn(h),
            "inside": lambda: self.ffn(h),
            "twice": lambda: h + self.ffn(h) + self.ffn(x),
            "two": lambda: h + self.ffn(h) + self.mlp(h),
            "dict": lambda: h + self.ffn["up"](h),
            "none": lambda: h + self.up(h),
            "breaks": lambda: h + self.ffn(h) * cos.sum(),
        }[self.kind]()


REFUSED = {
    "norm": "does not add what its 'ffn' makes to x",
    "bias": "does not add what its 'ffn' makes to x",
    "scale": "does not add what its 'ffn' makes to x",
    "inside": "does not add what its 'ffn' makes to x",
    "twice": "does not call its 'ffn' as a module, once",
    "dict": "does not run without its attention and 'ffn' .TypeError",
    "two": "inspection finds 'ffn' and 'mlp'",
    "none": "inspection finds none",
    "breaks": "does not run without its attention and 'ffn' .AttributeError",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_in_which_no_row_goes_without_its_ffn(kind):
    layers = nn.ModuleList([Added(kind)])
    before, state = snapshot(layers), torch.get_rng_state()
    with pytest.raises(UnsupportedError, match=f"ATTEND, without an FFN, but .*{REFUSED[kind]}.*then='rejoin'"):
        td.DropLayers(layers, attend())
    assert snapshot(layers) == before
    assert torch.equal(state, torch.get_rng_state())


WITHOUT = {
    "minimax": "does not add what its 'mlp' makes",
    "bloom": "does not run without its attention and 'mlp'|does not add what its 'mlp' makes",
    "opt": "finds none",
}


@pytest.mark.parametrize("name", WITHOUT)
def test_families_in_which_no_row_goes_without_its_ffn(name, cell, refusal):
    sizes, layers = {"vocab_size": 64, "hidden_size": 32}, None
    if name == "minimax":
        module = copy.deepcopy(family_model(name))
    elif name == "bloom":
        module, layers = hf.BloomForCausalLM(hf.BloomConfig(n_layer=2, n_head=4, **sizes)), "transformer.h"
    else:
        config = hf.OPTConfig(ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, **sizes)
        module = hf.OPTForCausalLM(config)
    with pytest.raises(UnsupportedError, match=WITHOUT[name]) as caught:
        td.apply(module, attend(), layers)
    if name in FAMILIES:
        refusal(name, "`then='attend'`", str(caught.value))
        cell(name, "attend", "refused, as below")


def test_an_ffn_that_is_taken_away_since():
    model, drop = dropped(BASES[torch.float32], attend())
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(UnsupportedError, match="ran without a call of its FFN"):
        engine_step(model, drop, batch(["tiit"], "a"))


def test_an_ffn_that_is_given_more_than_states():
    class Two(CachedBlock):
        def forward(self, x, cos, sin, attention_mask=None, past_key_values=None):
            h = x + self.mixer(self.before(x), cos, sin, attention_mask, past_key_values)
            return h + self.ffn(h, x)

    class Sum(nn.Linear):
        def forward(self, x, y):
            return super().forward(x + y)

    layer = Two()
    layer.ffn = Sum(WIDTH, WIDTH)
    run = td.DropLayers([layer], attend())
    with (
        run.tokendrop.layout(td.TokenLayout(torch.ones(1, 4).bool())),
        pytest.raises(UnsupportedError, match=r"is given tensors of \(1, 4, 16\), \(1, 4, 16\)"),
    ):
        run(torch.randn(1, 4, WIDTH), *rotary(4))


def test_behind_tokens_that_are_gone():
    select = Select(2, earlier, 1)
    layers = LayerRoute(), LayerRoute(Role.GONE, select=select), LayerRoute(Role.ATTEND, select=select), LayerRoute()
    with pytest.raises(UnsupportedError, match="in layer 2, the others ATTEND, behind others that are GONE"):
        td.apply(llama(), Custom(*layers))


def test_removed():
    base = BASES[torch.float32]
    before = snapshot(base)
    model, made = base, batch(RAGGED, "aaaaa")
    drop = td.apply(model, attend())
    engine_step(model, drop, made)
    drop.remove()
    assert snapshot(model) == before


def test_packed_samples_choose_on_their_own():
    """Two samples in one row are what each is in a row of its own."""
    base, method = BASES[torch.float64], attend("1:", 1, "norm")
    model, drop = dropped(base, method)
    ids = batch(["tiiitttiiitt"], "a").ids
    image = torch.tensor([[c == "i" for c in "tiiitttiiitt"]])
    packs = torch.tensor([[0] * 6 + [1] * 6])
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    with torch.no_grad(), drop.layout(td.TokenLayout(image, packs=packs)):
        found = model(ids, position_ids=positions, use_cache=False).logits
    with torch.no_grad(), drop.layout(td.TokenLayout(image.view(2, 6))):
        expected = model(ids.view(2, 6), use_cache=False).logits
    torch.testing.assert_close(found.view(2, 6, -1), expected, rtol=1e-9, atol=1e-9)


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    made = batch(["ttiiitittt", "tiitttiiitt"], "ag", "left")
    methods = {"a": attend("0:1", 2), "g": attend("1:")}
    model, drop = dropped(llama(layers=2), methods, multiple=4)
    with torch.no_grad(), drop.layout(made.layout()):
        expected = model(made.ids, attention_mask=made.mask, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = compiled(made.ids, attention_mask=made.mask, use_cache=False).logits
    torch.testing.assert_close(found, expected)
