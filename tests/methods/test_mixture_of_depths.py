"""Mixture-of-Depths, against the dense reference and against one layer written out by hand.

Shape letters: B batch, T tokens, D hidden.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from helpers import batch, close, dropped, engine_step, llama, reference_step, same, step, without_labels
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.engine.model.sets import Router

BASE, EXACT = llama(spread=0.2), llama(dtype=torch.float64)
SAMPLES = st.lists(st.text("ti", min_size=2, max_size=9), min_size=1, max_size=3)
METHODS = st.builds(
    td.MixtureOfDepths, st.sampled_from([":", "1::2", "2:", (0, 3)]), st.sampled_from([1, 3, 0.25, 0.5, 1.0])
)


@given(SAMPLES, METHODS, st.sampled_from(["left", "right"]), st.booleans(), st.integers(0, 99))
def test_engine_equals_reference(samples, method, side, other, seed):
    methods = {"u": method, "g": td.HMGen("1:3") if other else method}
    made = batch(samples, "ugu"[: len(samples)], side, seed)
    for base, tolerance in ((BASE, 1e-5), (EXACT, 1e-9)):
        model, drop = dropped(base, methods, multiple=4)
        assert close(engine_step(model, drop, made), reference_step(base, methods, drop, made), made.real, tolerance)


def by_hand(layer, rotary, router, x, image, keep):
    """One sample through one layer, from the definition: rows cut out, the layer's own modules, the scaled update."""
    weights = (x @ router.T)[:, 0]
    tokens = [t for t in range(len(x)) if image[t]]
    kept = sorted(sorted(tokens, key=lambda t: (-weights[t].item(), t))[:keep])
    rows = sorted([t for t in range(len(x)) if not image[t]] + kept)
    cos, sin = rotary(x[None], torch.tensor([rows]))
    out = layer(x[None, rows], position_embeddings=(cos, sin), attention_mask=None)
    out = (out[0] if isinstance(out, tuple) else out)[0]
    states = list(x)
    for at, t in enumerate(rows):
        scale = weights[t] if image[t] else 1
        states[t] = x[t] + scale * (out[at] - x[t])
    logits, target = weights[tokens], x.new_tensor([float(t in kept) for t in tokens])
    loss = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()
    return torch.stack(states), loss, kept


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_one_layer_equals_the_definition(keep):
    base = llama(dtype=torch.float64, num_hidden_layers=1)
    made = batch(["tiitiitt"], "u")
    model, drop = dropped(base, td.MixtureOfDepths(":", keep))
    hand, router = copy.deepcopy(base), drop.layers[0]["router"].weight.detach().clone().requires_grad_()
    x = hand.model.embed_tokens(made.ids)[0]
    states, auxiliary, kept = by_hand(hand.model.layers[0], hand.model.rotary_emb, router, x, made.image[0], keep)
    assert len(kept) == keep
    (hand.lm_head(hand.model.norm(states)).logsumexp(-1).sum() + auxiliary).backward()
    with drop.layout(made.layout()):
        logits = model(made.ids, use_cache=False).logits
        assert torch.allclose(drop.auxiliary_loss(), auxiliary, rtol=1e-6)
        (logits.logsumexp(-1).sum() + drop.auxiliary_loss()).backward()
    for name, p in hand.named_parameters():
        assert torch.allclose(p.grad, model.get_parameter(name).grad, rtol=1e-6, atol=1e-8), name
    assert torch.allclose(router.grad, drop.layers[0]["router"].weight.grad, rtol=1e-5, atol=1e-7)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.sampled_from([0, 1, 5, 0.125, 0.5, 1.0]))
def test_each_sample_keeps_the_asked_count(images, keep):
    made = batch(["t" + "i" * count + "t" for count in images], "u" * len(images))
    model, drop = dropped(BASE, td.MixtureOfDepths(":", keep), multiple=1)
    with torch.no_grad(), drop.layout(made.layout()) as plan:
        model(made.ids, use_cache=False)
    expected = [min(n, max(1, round(keep * n)) if isinstance(keep, float) else keep) for n in images]
    for group in plan.span_of[2].groups:
        if group.choice is not None:
            assert group.choice.kept.tolist() == [expected[member] for member in group.members]


def test_the_auxiliary_loss_is_the_mean_over_routed_layers_and_zero_without_images():
    model, drop = dropped(BASE, td.MixtureOfDepths("1::2", 2))
    with drop.layout(batch(["ttt"], "u").layout()):
        step(model, batch(["ttt"], "u"))
        assert drop.auxiliary_loss() == 0
    made = batch(["tiitiit"], "u")
    with drop.layout(made.layout()):
        model(made.ids)
        both = drop.auxiliary_loss()
    ones = []
    for layer in (1, 3):
        drop.layers[layer]["router"].register_forward_hook(
            lambda _, args, out: (
                ones.append(F.binary_cross_entropy_with_logits(*target(out[0], made.image[0]))) if len(out) else None
            )
        )
    with drop.layout(made.layout()):
        model(made.ids)
    assert torch.allclose(both, torch.stack(ones).mean())


def target(router, image):
    logits = router[image]
    return logits, torch.zeros_like(logits).scatter(0, logits.topk(2).indices, 1.0)


def test_without_a_layout_there_is_no_auxiliary_loss():
    drop = dropped(BASE, td.MixtureOfDepths())[1]
    with pytest.raises(td.MissingLayoutError, match=r"inside drop\.layout"):
        drop.auxiliary_loss()
    with drop.disabled():
        assert drop.auxiliary_loss() == 0


def test_a_schedule_begins_dense():
    made = batch(["tiitiit", "tttitt"], "uu")
    model, drop = dropped(BASE, td.MixtureOfDepths())
    drop.strength = 0.0
    ours = engine_step(model, drop, made)
    grads = {name: grad for name, grad in ours[1].items() if not name.startswith("tokendrop.")}
    assert same((ours[0], grads), step(copy.deepcopy(BASE), made))


def test_generation_is_refused():
    made = without_labels(batch(["tiitiit"], "u"))
    model, drop = dropped(BASE, td.MixtureOfDepths())
    for use_cache in (True, False):
        with drop.layout(made.layout(labels=None)), pytest.raises(td.UnsupportedError, match="cannot know"):
            model.generate(made.ids, max_new_tokens=2, do_sample=False, use_cache=use_cache)
    with drop.disabled():
        assert model.generate(made.ids, max_new_tokens=2, do_sample=False).shape == (1, 9)


def test_a_dense_checkpoint_keeps_the_routers():
    model, drop = dropped(BASE, td.MixtureOfDepths())
    before = {name: p.clone() for name, p in drop.named_parameters()}
    assert before.keys() == {"layers.1.router.weight", "layers.3.router.weight"}
    model.load_state_dict(BASE.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in drop.named_parameters())
    assert drop.dense_state_dict().keys() == BASE.state_dict().keys()
    drop.remove()
    assert not any(isinstance(module, Router) for module in model.modules())


def test_the_router_is_exact_under_autocast():
    router, x = Router(8, 1, bias=False), torch.randn(2, 3, 8)
    expected = F.linear(x, router.weight)[..., 0]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(router(x), expected)


@pytest.mark.parametrize("keep", [0.0, 1.5, -1, True, "all"])
def test_a_keep_that_makes_no_sense_is_refused(keep):
    with pytest.raises(td.MethodError, match="keep="):
        td.MixtureOfDepths(keep=keep)
