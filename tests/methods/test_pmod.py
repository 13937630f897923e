"""p-MoD against what its own code recorded, the dense reference, and one layer written out by hand.

Shape letters: B batch, T tokens, D hidden.
"""

import copy

import families
import pytest
import torch
from helpers import batch, checkpointed, close, dropped, engine_step, llama, reference_step, same, step
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import CASES, cases, made
from test_peers import layer_1

import tokendrop as td
from tokendrop.engine.forward.state import frames
from tokendrop.roles import LayerRoute, Role, Select

BASE, EXACT = llama(spread=0.2), llama(dtype=torch.float64)
SAMPLES = st.lists(st.text("ti", min_size=2, max_size=9), min_size=1, max_size=3)
METHODS = st.sampled_from([td.PMoD(), td.PMoD(0.0, 0.5, 0.25, 0.9), td.PMoD(-0.2, least=0.4)])


def test_the_ratios():
    case, route = CASES["pmod-ratios"], td.PMoD().route(32)
    for layer, ratio, kept in zip(route, case["ratio_of_each_layer"], case["kept_of_576"], strict=True):
        assert (layer.select is None) is (ratio is None)
        if ratio is not None:
            assert layer.select.keep == pytest.approx(ratio, abs=1e-6)
            assert layer.select.count(576) == kept
    counts = [576 if layer.select is None else layer.select.count(576) for layer in route]
    assert sum(counts) / 32 == case["mean_kept"]


@pytest.mark.parametrize("name", cases("pmod-layer"))
def test_one_layer_is_the_peers(name):
    case, given, model = CASES[name], made(name, 1), layer_1(name)
    drop = td.apply(model, td.PMoD(shift=case["settings"]["ratio"] - 0.5))  # of one layer, whose cosine is 1
    router, seen = drop.layers[0]["router"], []
    assert not router.weight.any()
    assert not router.bias.any()
    router.weight.data, router.bias.data = given["router"][None], given["bias"][None]
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad(), drop.layout(td.TokenLayout(given["image"])):
        model(inputs_embeds=given["states"], use_cache=False)
        (group,) = frames(drop.key)[-1].ran[0].groups
    rows = group.active.index[0][group.active.valid[0]].sort().values
    kept = rows[given["image"][0, rows]] - 20
    assert kept.tolist() == case["kept"][0]
    skipped = sorted(set(range(150)) - set(kept.tolist()))
    for row, key in ((20 + kept[0], "first_kept"), (20 + skipped[0], "first_skipped"), (-1, "last")):
        expected = torch.tensor(case[f"output_{key}_row"])
        torch.testing.assert_close(seen[0][row][:8], expected, rtol=0, atol=2e-5)
    assert seen[0].sum().item() == pytest.approx(case["output_sum"], abs=2e-3)
    assert seen[0].square().sum().item() == pytest.approx(case["output_square_sum"], rel=1e-5)


@given(SAMPLES, METHODS, st.sampled_from(["left", "right"]), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=8)
def test_engine_equals_reference(samples, method, side, other, recomputes, seed):
    methods = {"u": method, "g": td.HMGen("1:3") if other else method}
    made = batch(samples, "ugu"[: len(samples)], side, seed)
    for base, tolerance in ((BASE, 1e-5), (EXACT, 1e-9)):
        model, drop = dropped(base, methods, multiple=4)
        if recomputes:
            checkpointed(model)
        assert close(engine_step(model, drop, made), reference_step(base, methods, drop, made), made.real, tolerance)


def test_one_layer_by_hand_with_gradients():
    base = llama(dtype=torch.float64, num_hidden_layers=1)
    made = batch(["tiitiitt"], "g")
    model, drop = dropped(base, td.PMoD(0.0), multiple=1)
    ours = engine_step(model, drop, made)
    hand, layer = copy.deepcopy(base), None
    weight, bias = (p.detach().clone().requires_grad_() for p in drop.layers[0]["router"].parameters())
    layer, x = hand.model.layers[0], hand.model.embed_tokens(made.ids)[0]
    r = (x @ weight.T)[:, 0] + bias
    g = 1 + 0.2 * r.tanh()
    images = made.image[0].nonzero().flatten().tolist()
    kept = sorted(sorted(images, key=lambda t: (-r[t].item(), t))[:2])
    rows = torch.tensor(sorted({*range(8)} - {*images} | {*kept}))
    normed = layer.input_layernorm(x[rows])[None]
    attended = layer.self_attn(normed, position_embeddings=hand.model.rotary_emb(x, rows[None]), attention_mask=None)
    h = x[rows] + attended[0][0]
    ffn = layer.mlp(layer.post_attention_layernorm(h))
    out = h + torch.where(made.image[0, rows], g[rows], 1.0)[:, None] * ffn
    states = (x * torch.where(made.image[0], g, 1.0)[:, None]).index_copy(0, rows, out)
    logits = hand.lm_head(hand.model.norm(states))[None]
    torch.testing.assert_close(ours[0], logits.detach(), rtol=1e-6, atol=1e-8)
    torch.nn.functional.cross_entropy(logits[0, :-1], made.labels[0, 1:], ignore_index=-100, reduction="sum").backward()
    for name, p in hand.named_parameters():
        assert torch.allclose(ours[1][name], p.grad, rtol=1e-6, atol=1e-7), name
    for name, p in (("weight", weight), ("bias", bias)):
        assert torch.allclose(ours[1][f"tokendrop.layers.0.router.{name}"], p.grad, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("name", ["qwen3", "phi3", "falcon_7b", "deepseek_v3", "mixtral", "llava"])
def test_families_equal_the_reference(name):
    from tokendrop.engine.reference import reference

    base, data, methods = families.model(name), families.batch(name, "left"), {"g": td.PMoD(0.2)}
    layout = td.TokenLayout(data.image, "g", padding=data.real, labels=data.trained([True, True]))
    module = copy.deepcopy(base)
    drop = td.apply(module, methods, multiple=4)
    for p in drop.layers.parameters():
        p.data.normal_(0, 0.3)
    sets = copy.deepcopy(drop.layers)
    with drop.layout(layout, step=(0, 0)):
        logits = module(**data.inputs, use_cache=False).logits[data.real]
    dense = copy.deepcopy(base)
    with reference(dense, methods, layout, sets):
        expected = dense(**data.inputs, use_cache=False).logits[data.real]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["gemma3", "paligemma2"])
def test_a_norm_behind_the_ffn_is_refused(name):
    base = families.model(name)
    with pytest.raises(td.UnsupportedError, match=r"weighs what an FFN gives, but .*; use MixtureOfDepths"):
        td.apply(base, td.PMoD())
    assert not hasattr(base, "tokendrop")


@pytest.mark.parametrize("role", [Role.GONE, Role.CONTEXT, Role.ATTEND])
def test_weights_are_for_what_is_carried_past(role):
    class Mine:
        separate = "none"

        def route(self, num_layers, strength=1.0):
            select = Select(0.5, lambda s: s.router, 1, learned=True, gate=0.2)
            return (LayerRoute(), *(LayerRoute(role, select=select),) * (num_layers - 1))

    with pytest.raises(td.UnsupportedError, match="weighs what image tokens get in layer 1"):
        td.apply(copy.deepcopy(BASE), Mine())


def test_a_schedule_begins_dense_and_there_is_no_auxiliary_loss():
    made = batch(["tiitiit", "tttitt"], "uu")
    model, drop = dropped(BASE, td.PMoD())
    with drop.layout(made.layout()):
        model(made.ids, use_cache=False)
        assert drop.auxiliary_loss() == 0
    drop.strength = 0.0
    ours = engine_step(model, drop, made)
    grads = {name: grad for name, grad in ours[1].items() if not name.startswith("tokendrop.")}
    assert same((ours[0], grads), step(copy.deepcopy(BASE), made))
    drop.remove()
    assert same(step(model, made), step(copy.deepcopy(BASE), made))


@pytest.mark.parametrize("change", [{"least": 0.9}, {"shift": float("nan")}, {"gate": 0.0}, {"most": 2}])
def test_values_that_make_no_sense_are_refused(change):
    with pytest.raises(td.MethodError, match=next(iter(change))):
        td.PMoD(**change)
