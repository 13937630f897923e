"""The advisor: its figures by hand, its promises, and a model that is what it was."""

import copy
import json
import math

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import batch, llama, snapshot

import tokendrop as td
from tokendrop.analysis import advisor
from tokendrop.analysis.advisor import advise
from tokendrop.analysis.memory import saved_bytes

BASE = llama(spread=0.15, num_hidden_layers=6)
BATCHES = [
    (batch(["tt" + "i" * 12 + "tttt"] * 2, "uu", seed=seed), "u", 20) for seed in range(2)
] + [(batch(["tttt" + "i" * 12] * 2, "gg", seed=9), "g", None)]  # fmt: skip


def layout(given):
    made, task, _ = given
    return made.layout(task=task)


def loss_of(model):
    def loss(given):
        made = given[0]
        logits = model(made.ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), made.labels[:, 1:].reshape(-1))

    return loss


@pytest.fixture(scope="module")
def found():
    model = copy.deepcopy(BASE).train()  # plans are for training
    before, state = snapshot(model), torch.get_rng_state()
    advice = advise(model, BATCHES, layout, 0.6, loss_of(model))
    assert snapshot(model) == before
    assert torch.equal(state, torch.get_rng_state())
    return advice


def test_every_plan_meets_the_budget_and_the_one_that_moves_the_loss_least_comes_first(found):
    assert set(found.plans) == {"u", "g"}
    for plans in found.plans.values():
        assert len(plans) >= 2
        assert all(0 < plan.flops_ratio <= 0.6 for plan in plans)
        assert [abs(plan.loss_gap) for plan in plans] == sorted(abs(plan.loss_gap) for plan in plans)
    assert found.methods == {task: plans[0].method for task, plans in found.plans.items()}
    # A loss that falls most is not one that moves least.
    assert any(min(plan.loss_gap for plan in plans) < 0 < plans[0].loss_gap for plans in found.plans.values())


def test_a_kind_is_as_mild_as_the_budget_lets_it_be(found):
    (himix,) = [plan.method for plan in found.plans["u"] if isinstance(plan.method, td.HiMix)]
    start = int(himix.layers.rstrip(":"))
    milder = copy.deepcopy(BASE)
    assert start < 5
    drop = td.apply(milder, td.HiMix(f"{start + 1}:"))
    with drop.layout(layout(BATCHES[0])) as plan:
        (cost,) = td_costs(drop, plan)
    assert cost.flops_ratio > 0.6


def td_costs(drop, plan):
    from tokendrop.analysis.spent import task_costs

    return task_costs(drop, plan, plan.layout.tasks).values()


@pytest.mark.parametrize("task", ["u", "g"])
def test_loss_gap_and_fidelity_by_hand(found, task):
    held = [one for one in BATCHES if one[1] == task]
    for plan in found.plans[task][:4]:
        gaps, cosines = [], []
        for given in held:
            results = []
            for method in (plan.method, None):
                model = copy.deepcopy(BASE).train()  # plans are for training
                drop = td.apply(model, {task: method})
                with drop.layout(layout(given), step=(0, 0)):
                    value = loss_of(model)(given)
                    value.backward()
                flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
                results.append((value.item(), torch.cat([one.flatten() for one in flat])))
            gaps.append(results[0][0] - results[1][0])
            cosines.append(F.cosine_similarity(results[0][1], results[1][1], dim=0).item())
        assert plan.loss_gap == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
        assert plan.fidelity == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_redundancy_is_the_cosine_of_states_before_and_behind_a_layer(found):
    each = []
    for made, task, _ in BATCHES:
        if task != "u":
            continue
        model = copy.deepcopy(BASE).train()  # plans are for training
        seen = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        model(made.ids)
        each.append([F.cosine_similarity(a[made.image], b[made.image], dim=-1).mean().item() for a, b in seen])
    assert found.redundancy["u"] == pytest.approx([sum(one) / len(one) for one in zip(*each, strict=True)], abs=1e-5)


def test_where_image_tokens_are_trained_no_plan_ends_them(found):
    assert {type(plan.method) for plan in found.plans["g"]} <= {td.HMGen, td.RandomLTD}
    assert {td.HiMix, td.FastV, td.Drop} <= {type(plan.method) for plan in found.plans["u"]}


class Two(torch.nn.Module):
    """A model with two decoders, of which one runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = llama(spread=0.15), llama(seed=1)

    def forward(self, input_ids, labels):
        return self.a(input_ids=input_ids, labels=labels, use_cache=False)


def test_the_decoder_that_was_named_is_the_one_that_is_advised_on(monkeypatch):
    monkeypatch.setattr(advisor, "ROUNDS", 1)
    monkeypatch.setattr(advisor.Trials, "_candidates", lambda self, fits: iter([td.HiMix("2:")]))
    made, path = BATCHES[0][0], "a.model.layers"
    given = [{"input_ids": made.ids, "labels": made.labels}], lambda _: made.layout(task="u")
    model = Two()
    found = td.attention_allocation(model, *given, layers=path).advise(0.9)
    alone = td.attention_allocation(model.a, *given).advise(0.9)
    (plan,), (own,) = found.plans["u"], alone.plans["u"]
    assert (plan.method, plan.flops_ratio) == (own.method, own.flops_ratio)
    assert plan.loss_gap == pytest.approx(own.loss_gap, abs=1e-6)
    assert found.redundancy == alone.redundancy
    assert found.code() == alone.code().replace("})", "}, layers='a.model.layers')")
    (callback,) = yaml.safe_load(found.yaml())["trainer"]["callbacks"]
    names = {}
    exec(found.code(), names)  # noqa: S102
    assert names["callback"].layers == callback["init_args"]["layers"] == path
    with pytest.raises(td.DecoderError, match="choose one with layers="):
        advise(model, *given)


def test_the_code_and_the_yaml_say_the_same(found, monkeypatch):
    # jsonargparse 4.53 renamed instantiate_classes to instantiate; Lightning 2.6.6 still calls the former.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    names = {}
    exec(found.code(), names)  # noqa: S102
    assert names["callback"].methods == found.methods
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(td.TokenDrop, "callback")
    (callback,) = yaml.safe_load(found.yaml())["trainer"]["callbacks"]
    assert callback["class_path"] == "tokendrop.TokenDrop"
    parsed = parser.instantiate_classes(parser.parse_object({"callback": callback}))
    assert parsed.callback.methods == found.methods


def test_what_it_says_is_what_it_found(found):
    rows = found.table().rows
    assert len(rows) == sum(map(len, found.plans.values()))
    for task in ("u", "g"):
        best = found.plans[task][0]
        assert f"{task}: {best.method} costs {best.flops_ratio:.2f}" in found.evidence()
        assert f"{best.seconds_ratio:.2f} of the seconds and {best.memory_ratio:.2f} of the memory" in found.evidence()
        for plan, row in zip(found.plans[task], [row for row in rows if row[0] == task], strict=True):
            assert row[1] == repr(plan.method)
            assert row[2:5] == tuple(f"{x:.2f}" for x in (plan.flops_ratio, plan.seconds_ratio, plan.memory_ratio))
            assert plan.seconds_ratio > 0
    assert found.to_dict()["plans"]["u"][0]["method"] == repr(found.methods["u"])
    assert isinstance(found.to_dict()["redundancy"]["u"], list)


def test_memory_of_every_plan_is_what_its_forward_keeps(found):
    given = BATCHES[0]
    kept = {}
    for plan in found.plans["u"]:
        for method in (None, plan.method):
            model = copy.deepcopy(BASE).train()  # plans are for training
            drop = td.apply(model, {"u": method})
            with drop.layout(layout(given), step=(0, 0)):
                kept[method] = saved_bytes(lambda model=model: loss_of(model)(given), model.parameters())
        assert plan.memory_ratio == pytest.approx(kept[plan.method] / kept[None])


def test_a_plan_slower_than_dense_is_named(monkeypatch):
    model = copy.deepcopy(BASE).train()  # plans are for training

    def fake(step, given):
        step(given)
        methods = [one.methods["g"] for one in model.modules() if isinstance(one, td.Handle)]
        return {type(None): 2.0, td.HMGen: 2.5, td.RandomLTD: 1.0}[type(methods[0]) if methods else type(None)]

    monkeypatch.setattr(advisor, "_seconds", fake)
    advice = advise(model, BATCHES[2:], layout, 0.7, loss_of(model))
    seconds = {type(plan.method): plan.seconds_ratio for plan in advice.plans["g"]}
    assert seconds == {td.HMGen: 1.25, td.RandomLTD: 0.5}
    (slow,) = [plan.method for plan in advice.plans["g"] if isinstance(plan.method, td.HMGen)]
    assert advice.evidence().endswith(f"Slower than a dense step here: {slow} (1.25).")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda value: value * 0, td.TaskLossError, "gradient of zeros"),
        (lambda value: value * float("nan"), td.TaskLossError, "expected a finite number"),
        (lambda value: value.item(), td.TaskLossError, "expected a tensor of one number"),
        (lambda value: value.expand(2, 3), td.TaskLossError, r"a tensor of shape \(2, 3\)"),
        (lambda value: {"logits": value}, td.TaskLossError, "dict without a loss"),
        (lambda value: None, td.TaskLossError, "is None"),
    ],
)
def test_a_loss_of_which_nothing_can_be_said_is_refused(change, error, message):
    model = copy.deepcopy(BASE).train()  # plans are for training
    before = snapshot(model)
    with pytest.raises(error, match=message):
        advise(model, BATCHES[2:], layout, 0.7, lambda given: change(loss_of(model)(given)))
    assert snapshot(model) == before


def test_a_plan_without_a_finite_loss_is_left_out_and_a_gradient_of_zeros_has_no_fidelity():
    model = copy.deepcopy(BASE).train()  # plans are for training

    def loss(given):
        methods = [one.methods["g"] for one in model.modules() if isinstance(one, td.Handle)]
        return loss_of(model)(given) * (float("nan") if td.HMGen in map(type, methods) else 0 if methods else 1)

    advice = advise(model, BATCHES[2:], layout, 0.7, loss)
    (plan,) = advice.plans["g"]
    assert isinstance(plan.method, td.RandomLTD)
    assert math.isnan(plan.fidelity)
    assert advice.table().rows[0][-1] == "-"
    assert "its gradient is zero" in advice.evidence()
    assert json.loads(json.dumps(advice.to_dict(), allow_nan=False))["plans"]["g"][0]["fidelity"] is None


def test_a_model_that_is_dropped_or_frozen_is_refused():
    model = copy.deepcopy(BASE).train()  # plans are for training
    drop = td.apply(model, td.HMGen("1:3"))
    with pytest.raises(td.AppliedError, match="remove"):
        advise(model, BATCHES, layout, 0.6, loss_of(model))
    drop.remove()
    with pytest.raises(td.TaskLossError, match="no trained parameter"):
        advise(model.requires_grad_(False), BATCHES, layout, 0.6, loss_of(model))


@pytest.mark.parametrize("kind", ["stacked", "listed", "no linears"])
def test_layers_of_unknown_cost_are_refused_before_anything_runs(kind):
    model = copy.deepcopy(BASE)
    layer = model.model.layers[2]
    if kind == "stacked":
        layer.mlp.register_parameter("experts", torch.nn.Parameter(torch.ones(2, 2, 2)))
    elif kind == "listed":
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    else:
        del layer.self_attn.k_proj
    before, message = snapshot(model), "k and v" if kind == "no linears" else "experts"
    with pytest.raises(td.UnsupportedError, match=rf"a budget is of FLOPs.* but .*{message}.* td\.benchmark"):
        advise(model, BATCHES, lambda _: pytest.fail("asked for a layout"), 0.6, lambda _: pytest.fail("ran"))
    assert snapshot(model) == before


TEXT = (batch(["tttttttt"], "u"), "u", None)
MIXED = (batch(["ttiitttt"] * 2, "uu"), ("u", "g"), None)


@pytest.mark.parametrize("budget", [0, 1, 1.0, 0.0, -0.5, "half", True])
def test_a_budget_is_a_share(budget):
    with pytest.raises(td.MethodError, match=f"budget={budget!r}"):
        advise(BASE, BATCHES, layout, budget, loss_of(BASE))


@pytest.mark.parametrize(
    ("batches", "message"), [([], "no batches"), ([TEXT], "0 image tokens"), ([MIXED], r"\['g', 'u'\]")]
)
def test_batches_that_say_nothing_are_refused(batches, message):
    with pytest.raises(td.LayoutError, match=message):
        advise(BASE, batches, layout, 0.5, loss_of(BASE))


def test_a_budget_that_nothing_meets_is_refused():
    model = copy.deepcopy(BASE).train()  # plans are for training
    before = snapshot(model)
    with pytest.raises(td.MethodError, match="no plan for task 'u' costs so little"):
        advise(model, BATCHES, layout, 0.01, loss_of(model))
    assert snapshot(model) == before
