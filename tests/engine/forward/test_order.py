"""Gradients arrive in one order where ZeRO stage 2 listens, and are what they are without.

DeepSpeed itself: tests/distributed/test_zero.py. Here its hooks have a double, under the name of its module.

Shape letters: B batch, T tokens.
"""

import copy
import sys
from types import ModuleType

import pytest
import torch
from families import FAMILIES, HYBRID, batch, model
from helpers import batch as text_batch
from helpers import checkpointed, dropped, llama, loss_of
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import tokendrop as td

METHODS = [
    td.HiMix("1:"),
    td.HiMix("1:", "per-task"),
    td.HMGen("1:3"),
    td.HMGen("1:3", "shared"),
    td.RandomLTD("1:3"),
    td.Sprint("1:3"),
    td.MixtureOfDepths("1:3"),
    td.MixtureOfTransformers(),
    td.FastV(2, 0.5),
    td.PyramidDrop((1, 3), (0.6, 0.3)),
    td.HiDrop(entry=1, layers=(2,), keep=(0.5,), exit=3),
    td.DuetVLM(text_layers=(1, 3), text_keep=(0.5, 0)),
    td.Drop("1:3", keep=0.5, score="leverage"),
    td.Drop("1:3", keep=0.5, score="norm", then="context"),
]
SAMPLES = [["tiiittt"], ["ttttttt"], ["tiiittt", "ttttttt"], ["tiitttt", "tiiiitt"]]


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))


def listen(module, name="deepspeed.runtime.zero.stage_1_and_2"):
    """A list to which each gradient's name is added when it arrives, by hooks of the module of that name."""
    order = []
    for key, parameter in module.named_parameters():

        def hook(one, key=key):
            assert one.grad is not None
            order.append(key)

        hook.__module__ = name
        parameter.register_post_accumulate_grad_hook(hook)
    return order


def orders(made, drop, run, samples=SAMPLES):
    """The order in which gradients arrive, for several batches of one task, with others beside it, and dense."""
    order, found = listen(made), []
    for each in samples:
        for tasks in ("u", "dense", None):
            data = text_batch(each, ["u", tasks or "u"][: len(each)])
            order.clear()
            with drop.layout(data.layout()) if tasks else drop.disabled():
                loss_of(run(data.ids, use_cache=False).logits, data.labels).backward()
            found.append(list(order))
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{type(method).__name__} {method.separate}")
def test_gradients_arrive_in_one_order(method):
    made, drop = dropped(llama(), {"u": method, "dense": None}, multiple=2)
    if method.separate == "per-task":
        checkpointed(made)
    found = orders(made, drop, made)
    assert len(found[0]) == len(list(made.parameters())) > 20
    assert all(order == found[0] for order in found)


@pytest.mark.parametrize("method", [td.HiMix("1:"), td.HMGen("1:3", "shared"), td.MixtureOfDepths("1:3")])
def test_without_the_rule_they_would_not(method, monkeypatch):
    monkeypatch.setattr("tokendrop.engine.inject.ordered", lambda _, args, kwargs: (args, kwargs))
    made, drop = dropped(llama(), {"u": method, "dense": None}, multiple=2)
    found = orders(made, drop, made)
    assert any(order != found[0] for order in found)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks, where its graph breaks
@pytest.mark.parametrize("whole", [pytest.param(False, marks=pytest.mark.slow), True], ids=["layers", "model"])
def test_compiled_they_arrive_in_one_order(whole):
    torch.compiler.reset()
    made, drop = dropped(llama(layers=2), {"u": td.HMGen("0:1"), "dense": None}, multiple=2)
    if not whole:
        for layer in made.model.layers:
            layer.compile(backend="aot_eager")
    found = orders(made, drop, torch.compile(made, backend="aot_eager") if whole else made, SAMPLES[:1])
    assert len(found[0]) == len(list(made.parameters()))
    assert all(order == found[0] for order in found)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if family.alike else name for name, family in FAMILIES.items()]
)
def test_every_family_has_the_same_gradients_in_one_order(name):
    method = td.HMGen("1:3") if name in HYBRID else td.HiMix("1:")
    data, found = batch(name, None), []
    labels = data.trained([False, False])
    for listens in (False, True):
        made = copy.deepcopy(model(name))
        drop = td.apply(made, {"u": method, "g": None}, multiple=4)
        order, orders = listen(made) if listens else [], []
        for tasks in (("u", "u"), ("u", "g"), ("g", "g")):
            order.clear()
            with drop.layout(td.TokenLayout(data.image, tasks, labels=labels)):
                loss_of(made(**data.inputs, use_cache=False).logits, labels).backward()
            orders.append([one for one in order if one.startswith(drop.path)])
        assert not listens or (len(orders[0]) > 20 and all(one == orders[0] for one in orders))
        found.append({key: p.grad for key, p in made.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_frozen_parameters_and_models_run():
    made, drop = dropped(llama(), {"u": td.HiMix("1:")}, multiple=2)
    made.requires_grad_(False)
    made.model.layers[2].self_attn.q_proj.weight.requires_grad_(True)
    order, data = listen(made.model.layers[2].self_attn.q_proj), text_batch(["tiiittt"], ["u"])
    with drop.layout(data.layout()):
        loss_of(made(data.ids, use_cache=False).logits, data.labels).backward()
        assert order == ["weight"]
        made.requires_grad_(False)
        assert not made(data.ids, use_cache=False).logits.requires_grad


def test_what_nothing_uses_has_a_gradient_of_zeros_as_under_zero():
    made, drop = dropped(llama(), {"u": td.HMGen("1:3")}, multiple=2)
    made.model.layers[1].expert = torch.nn.Linear(3, 2)
    made.model.embed_tokens.requires_grad_(False)  # the first of all, which is not listened to
    listen(made.model.layers)
    data = text_batch(["tiiittt"], ["u"])
    with drop.layout(data.layout()):
        loss_of(made(data.ids, use_cache=False).logits, data.labels).backward()
    assert not made.model.layers[1].expert.weight.grad.any()


@pytest.mark.parametrize("name", ["torchtune.optimizer_in_backward", "deepspeed.runtime.zero.stage3"])
def test_other_hooks_are_left_alone(name):
    made, drop = dropped(llama(), {"u": td.HiMix("1:"), "dense": None}, multiple=2)
    for parameter in made.parameters() if "zero" in name else ():
        parameter.ds_id = 0
    order, data = listen(made, name), text_batch(["tiiittt"], ["u"])
    made.model.layers[1].expert = torch.nn.Linear(3, 2)
    with drop.layout(data.layout()):
        assert not drop.listened
        loss_of(made(data.ids, use_cache=False).logits, data.labels).backward()
    assert len(order) == len(set(order))
    assert made.model.layers[1].expert.weight.grad is None


def test_a_layer_may_write_into_its_input(monkeypatch):
    forward, found = LlamaDecoderLayer.forward, []

    def writes(self, hidden_states, *args, **more):
        hidden_states *= 2
        return forward(self, hidden_states, *args, **more)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", writes)
    for listens in (False, True):
        made, data = llama(), text_batch(["tiiittt"], ["u"])
        made.model.embed_tokens.register_forward_hook(lambda _, args, out: out.clone())
        drop = td.apply(made, td.HMGen("2:3"), multiple=2)
        if listens:
            listen(made)
        with drop.layout(data.layout()):
            loss_of(made(data.ids, use_cache=False).logits, data.labels).backward()
        found.append([p.grad for p in made.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_in_a_re_entrant_backward_gradients_arrive_once():
    made, drop = dropped(llama(), {"u": td.HMGen("1:3")}, multiple=2)
    checkpointed(made, reentrant=True)
    order, data = listen(made), text_batch(["tiiittt"], ["u"])
    with drop.layout(data.layout()):
        loss_of(made(data.ids, use_cache=False).logits, data.labels).backward()
    assert len(order) == len(set(order)) == len(list(made.parameters()))
