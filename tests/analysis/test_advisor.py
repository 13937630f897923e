"""The advisor: its figures by hand, its promises, and a model that is what it was."""

import copy

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import batch, llama, snapshot

import tokendrop as td
from tokendrop.analysis.advisor import advise

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
    model = copy.deepcopy(BASE)
    before, state = snapshot(model), torch.get_rng_state()
    advice = advise(model, BATCHES, layout, 0.6, loss_of(model))
    assert snapshot(model) == before
    assert torch.equal(state, torch.get_rng_state())
    return advice


def test_every_plan_meets_the_budget_and_the_mildest_gap_comes_first(found):
    assert set(found.plans) == {"u", "g"}
    for plans in found.plans.values():
        assert len(plans) >= 2
        assert all(0 < plan.flops_ratio <= 0.6 for plan in plans)
        assert [plan.loss_gap for plan in plans] == sorted(plan.loss_gap for plan in plans)
    assert found.methods == {task: plans[0].method for task, plans in found.plans.items()}


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
    from tokendrop.analysis.flops import task_costs

    return task_costs(drop, plan, plan.layout.tasks).values()


@pytest.mark.parametrize("task", ["u", "g"])
def test_loss_gap_and_fidelity_by_hand(found, task):
    held = [one for one in BATCHES if one[1] == task]
    for plan in found.plans[task][:4]:
        gaps, cosines = [], []
        for given in held:
            results = []
            for method in (plan.method, None):
                model = copy.deepcopy(BASE)
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
        model = copy.deepcopy(BASE)
        seen = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        model(made.ids)
        each.append([F.cosine_similarity(a[made.image], b[made.image], dim=-1).mean().item() for a, b in seen])
    assert found.redundancy["u"] == pytest.approx([sum(one) / len(one) for one in zip(*each, strict=True)], abs=1e-5)


def test_where_image_tokens_are_trained_no_plan_ends_them(found):
    assert {type(plan.method) for plan in found.plans["g"]} <= {td.HMGen, td.RandomLTD}
    assert {td.HiMix, td.FastV, td.Drop} <= {type(plan.method) for plan in found.plans["u"]}


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
        assert 0 < found.memory_ratio[task] < 1
        assert found.seconds_ratio[task] > 0
    assert found.to_dict()["plans"]["u"][0]["method"] == repr(found.methods["u"])
    assert isinstance(found.to_dict()["redundancy"]["u"], list)


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
    model = copy.deepcopy(BASE)
    before = snapshot(model)
    with pytest.raises(td.MethodError, match="no plan for task 'u' costs so little"):
        advise(model, BATCHES, layout, 0.01, loss_of(model))
    assert snapshot(model) == before
