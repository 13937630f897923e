"""Parts of their own for image tokens: output projection, norms and FFN beside projections.

Shape letters: B batch, T tokens, H heads, W width of a head.
"""

import copy
from dataclasses import replace

import pytest
import torch
from families import NAMES
from families import model as family_model
from helpers import (
    MIXED,
    batch,
    checkpointed,
    close,
    dropped,
    engine_step,
    llama,
    oracle_step,
    reference_step,
    snapshot,
    step,
)
from torch import nn

import tokendrop as td
from tokendrop.engine.model import norms
from tokendrop.engine.model.decoder import find_layers
from tokendrop.errors import MethodError, UnsupportedError
from tokendrop.roles import LayerRoute, Select

ALL = "qkv+o+norm+ffn"
BASES = {dtype: llama(dtype=dtype, spread=0.2) for dtype in (torch.float32, torch.float64)}
MADE = replace(batch(MIXED[0], "ugggg", "left"), tasks=tuple("ugmgm"))


def three(separate="per-task", parts=ALL):
    context = "+".join(one for one in parts.split("+") if one not in ("o", "ffn")) or "k"
    return {
        "u": td.HiMix("1:", separate, context),
        "g": td.HMGen("1:3", separate, parts),
        "m": td.MixtureOfTransformers("1:", separate, parts),
    }


@pytest.mark.parametrize("parts", ["o", "norm", "ffn", "v+ffn", ALL])
@pytest.mark.parametrize("separate", ["shared", "per-task"])
def test_a_llama_written_by_hand(separate, parts):
    methods, base = three(separate, parts), BASES[torch.float64]
    model, drop = dropped(base, methods, multiple=2)
    found, expected = engine_step(model, drop, MADE), oracle_step(base, methods, drop, MADE)
    assert close(reference_step(base, methods, drop, MADE), expected, MADE.real, 1e-9)
    assert close(found, expected, MADE.real, 1e-9)
    plain = {"u": td.HiMix("1:"), "g": td.HMGen("1:3"), "m": None}
    assert not close(found, engine_step(*dropped(base, plain), MADE), MADE.real, 1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_float32(recompute):
    methods, base = three(), BASES[torch.float32]
    model, drop = dropped(base, methods)
    found = engine_step(checkpointed(model) if recompute else model, drop, MADE)
    assert close(found, oracle_step(base, methods, drop, MADE), MADE.real, 1e-5)


def states(out):
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


# What a layer holds beside the parts: sinks of attention, the latents of latent attention, a mixer beside attention.
BESIDE = ("sinks", "q_a_", "q_b_", "kv_a_", "kv_b_", "mamba")


@pytest.mark.parametrize("name", [*NAMES, "falcon_h1"])
def test_a_batch_of_images_is_another_model(name):
    """In every family: with another model's weights as their own, image tokens are what that makes of them."""
    pair = [copy.deepcopy(family_model(name)), copy.deepcopy(family_model(name))]
    for path, p in find_layers(pair[1])[1].named_parameters():
        if not any(one in path for one in BESIDE) or "layernorm" in path:
            p.data += 0.1 * torch.randn(p.shape)
    base, other = (getattr(getattr(one, "model", one), "language_model", one).eval() for one in pair)
    method = td.MixtureOfTransformers(parts="o+norm+ffn" if name == "deepseek_v3" else ALL)
    ids = torch.randint(10, 40, (2, 9))
    with torch.no_grad():
        dense, expected = (states(one(ids, use_cache=False)) for one in (base, other))
    theirs, drop = td.apply(other, method).layers.state_dict(), td.apply(base, method)
    with torch.no_grad(), drop.layout(td.TokenLayout(torch.ones_like(ids).bool())):
        copied = states(base(ids, use_cache=False))
        drop.layers.load_state_dict(theirs)
        found = states(base(ids, use_cache=False))
    allowed = expected > torch.finfo(expected.dtype).min
    scale = expected[allowed].abs().max()
    assert (copied - dense)[allowed].abs().max() < 1e-5 * scale  # they start as copies
    assert (found - expected)[allowed].abs().max() < 1e-5 * scale
    assert (found - dense)[allowed].abs().max() > 1e-2 * scale


def test_they_cost_what_the_dense_model_costs():
    model, method = BASES[torch.float32], td.MixtureOfTransformers("1:")
    report = td.flops(model, method, text=6, image=10, backward=True, counted=True)
    assert report == td.flops(model, method, text=6, image=10, backward=True)
    assert report.ratio == 1
    own = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert report.per_part["image-only projections"].dropped == 3 * 3 * 10 * own


def test_names_in_a_checkpoint_and_the_way_back():
    model, drop = dropped(BASES[torch.float32], td.MixtureOfTransformers((1,)))
    added = [key for key in model.state_dict() if key.startswith("tokendrop.")]
    assert added == [
        f"tokendrop.layers.1.image.{name}.weight"
        for name in (
            "ffn.gate_proj",
            "ffn.up_proj",
            "ffn.down_proj",
            "k",
            "norm.input_layernorm",
            "norm.post_attention_layernorm",
            "o",
            "q",
            "v",
        )
    ]
    assert list(drop.dense_state_dict()) == list(BASES[torch.float32].state_dict())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3", "mixtral"])
def test_a_dense_checkpoint_gives_copies_of_its_weights(name):
    """Into a model whose own are others, also of a linear that is fused or stored the other way round."""
    model, file = copy.deepcopy(family_model(name)), copy.deepcopy(family_model(name))
    for p in file.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    method = td.MixtureOfTransformers("1:3")
    drop = td.apply(model, method)
    expected = td.apply(copy.deepcopy(file), method).layers.state_dict()
    model.load_state_dict(file.state_dict())
    assert all(torch.equal(value, expected[key]) for key, value in drop.layers.state_dict().items())
    assert len(expected) >= 2 * 9 - 4


def test_every_added_parameter_has_a_gradient_on_a_rank_without_images():
    model, drop = dropped(BASES[torch.float32], td.MixtureOfTransformers())
    _, grads = engine_step(model, drop, batch(["ttttt"], "m"))
    assert all(grads[f"tokendrop.layers.{name}"].eq(0).all() for name, _ in drop.layers.named_parameters())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("heads", [3, 4])
def test_rows_of_what_a_norm_is_given(heads, turned):
    """Also where there are as many heads as rows."""
    by_row = torch.randn(2, 4, heads, 5)
    x = by_row.transpose(1, 2) if turned else by_row
    flat, back = norms.flat_rows(x, (2, 4))
    assert torch.equal(flat, by_row.reshape(8, heads, 5))
    assert torch.equal(back(flat), x)
    flat, back = norms.flat_rows(by_row.reshape(8, -1), (2, 4))
    assert torch.equal(back(flat), by_row.reshape(8, -1))
    with pytest.raises(UnsupportedError, match=r"tensor of \(5, 8\) for \(2, 4\) rows.*leave 'norm' out"):
        norms.flat_rows(torch.zeros(5, 8), (2, 4))


def test_removed():
    base = copy.deepcopy(BASES[torch.float32])
    before = snapshot(base)
    drop = td.apply(base, three())
    engine_step(base, drop, MADE)
    drop.remove()
    assert snapshot(base) == before


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    made = batch(["ttiiitittt", "tiitttiiitt"], "mm", "left")
    model, drop = dropped(llama(layers=1), {"m": td.MixtureOfTransformers()})
    with torch.no_grad(), drop.layout(made.layout()):
        expected = model(made.ids, attention_mask=made.mask, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = compiled(made.ids, attention_mask=made.mask, use_cache=False).logits
    torch.testing.assert_close(found, expected)


PART = "join letters of 'qkv', 'o', 'norm' and 'ffn'"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.HMGen("1:3", "shared", "qkv+head"), rf"parts='qkv\+head' is unknown; {PART}"),
        (lambda: td.HMGen("1:3", "shared", "qq"), f"parts='qq' is unknown; {PART}"),
        (lambda: td.HMGen("1:3", "shared", ""), f"parts='' is unknown; {PART}"),
        (lambda: td.HMGen("1:3", "shared", None), f"parts=None is unknown; {PART}"),
        (
            lambda: td.HiMix(":", "shared", "kv+ffn"),
            "tokens use no 'ffn' under this method; they use 'k', 'norm', 'v'",
        ),
        (lambda: td.HMGen("1:3", parts="qkv+o"), r"parts='qkv\+o' has no effect with separate='none'"),
        (lambda: td.MixtureOfTransformers(separate="none"), "separate='none' is the dense model"),
    ],
)
def test_parts_that_make_no_sense(make, message):
    with pytest.raises(MethodError, match=message):
        make()


def test_shown_where_they_are_not_the_default():
    assert repr(td.HiMix(separate="shared")) == "HiMix(layers=':', separate='shared')"
    assert repr(td.HMGen("1:", "shared", "o")) == "HMGen(shallow='1:', separate='shared', parts='o')"


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.mlp(x)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("qkv", "image-only projections, but inspection finds no linears for q, k and v in Bare"),
        ("o", "image-only parts, but inspection finds no linear that makes the output of the attention in Bare"),
        ("norm", "image-only parts, but inspection finds no norm with weights in Bare"),
    ],
)
def test_parts_that_a_layer_does_not_have(parts, message):
    with pytest.raises(UnsupportedError, match=message):
        td.DropLayers([Bare()], td.MixtureOfTransformers(parts=parts))


def test_a_layer_without_an_ffn_of_its_own():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(UnsupportedError, match="one child of TransformerEncoderLayer that is its FFN"):
        td.DropLayers([layer], td.MixtureOfTransformers(parts="ffn"))


@pytest.mark.parametrize("part", ["mlp", "input_layernorm"])
def test_a_part_that_is_taken_away_since(part):
    model, drop = dropped(BASES[torch.float32], td.MixtureOfTransformers())
    setattr(model.model.layers[1], part, nn.Identity())
    with pytest.raises(UnsupportedError, match=f"({part}|ffn) of LlamaDecoderLayer is not found any more"):
        engine_step(model, drop, batch(["tiit"], "m"))


def test_a_forward_of_its_own_in_a_part():
    for part in ("mlp", "input_layernorm", "self_attn.o_proj"):
        model = copy.deepcopy(BASES[torch.float32])
        model.model.layers[2].get_submodule(part).forward = lambda x: x
        with pytest.raises(UnsupportedError, match=f"{part} of decoder layer 2 has a `forward` of its own"):
            td.apply(model, td.MixtureOfTransformers())


class Custom:
    separate = "shared"

    def route(self, num_layers, strength=1.0):
        from tokendrop.methods.drop import SCORES
        from tokendrop.roles import Queries, Role

        select = Select(0.5, SCORES["attention"], 2, queries=Queries("answer", 1))
        own = LayerRoute(separate=frozenset("qkv"))
        return (LayerRoute(), own, LayerRoute(Role.BYPASS, select=select), LayerRoute())


def test_attention_with_projections_of_their_own_scores_nothing():
    with pytest.raises(UnsupportedError, match="of layer 1, where image tokens have own projections"):
        td.apply(llama(), Custom())


class Says(Custom):
    """Gives the second of four layers `own`."""

    def __init__(self, own, separate):
        self.own, self.separate = own, separate

    def route(self, num_layers, strength=1.0):
        return (LayerRoute(), LayerRoute(separate=frozenset(self.own)), LayerRoute(), LayerRoute())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("own", "separate", "message"),
    [
        (
            {"ffn", "q"},
            "none",
            r"separate='none', and gives image tokens \['ffn', 'q'\] of their own; use 'shared'",
        ),
        ({"q"}, "per_task", r"separate='per_task' is unknown; use 'none', 'shared' or 'per-task'"),
    ],
)
def test_parts_of_which_a_method_does_not_say_whose_they_are(own, separate, message, mapped):
    model = llama()
    before = snapshot(model)
    with pytest.raises(MethodError, match=message):
        td.apply(model, {"a": Says(own, separate)} if mapped else Says(own, separate))
    assert snapshot(model) == before


def test_weights_that_do_not_show_are_refused():
    model = copy.deepcopy(BASES[torch.float32])
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"LlamaRMSNorm holds weights of torch.int8.*leave 'norm' and 'ffn' out"):
        td.apply(model, td.MixtureOfTransformers())
    assert snapshot(model) == before


def test_dense_steps_are_the_untouched_model_to_the_bit():
    made = replace(MADE, tasks=("d",) * 5)
    model, drop = dropped(BASES[torch.float32], three() | {"d": None})
    found, dense = engine_step(model, drop, made), step(BASES[torch.float32], made)
    assert torch.equal(found[0], dense[0])
    assert all(torch.equal(found[1][name], grad) for name, grad in dense[1].items())
