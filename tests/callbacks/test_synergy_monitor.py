"""The monitor in a Trainer: training is the same to the bit, and its figures are those of plain torch.

Shape letters: none.
"""

import copy
import json
import math
import random
import warnings

import lightning as L
import pytest
import torch
from helpers import checkpointed
from lit_llama import LIGHTNING_WARNS, METHODS, Batches, Lit, batch, llama, loader, trainer
from torch import nn

import tokendrop as td
from tokendrop.synergy import heat_map, read_history
from tokendrop.synergy.history import append_history

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
TASKS = ("u", "g")


class Uneven(Lit):
    """With dropout, a buffer that training changes, and an optimiser with state."""

    def __init__(self):
        super().__init__()
        for layer in self.model.model.layers:
            layer.mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.2))
        self.counts = nn.BatchNorm1d(4)
        self.draws = []

    def training_step(self, given, index):
        self.draws.append((torch.rand(1).item(), random.random()))
        return super().training_step(given, index) + 0 * self.counts(torch.randn(3, 4)).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def noisy_loss(module, given):
    """A loss that draws, and changes a buffer."""
    module.counts(torch.randn(3, 4))
    random.random()
    names = ("input_ids", "attention_mask", "labels")
    return module.model(**{name: given[name] for name in names}).loss


def monitor(tmp_path, **options):
    return td.SynergyMonitor(TASKS, **({"every_n_steps": 1, "history": str(tmp_path / "synergy.jsonl")} | options))


def everything(module, run):
    optimizer = run.optimizers[0].state_dict()["state"]
    state = {f"{at}.{key}": value for at, held in optimizer.items() for key, value in held.items()}
    return dict(module.state_dict()) | state


@pytest.mark.parametrize(
    ("training", "options"),
    [
        ({}, {}),
        ({}, {"sketch": 8}),
        ({}, {"every_n_steps": None}),
        ({"accumulate_grad_batches": 2}, {"affinity": 0.1}),
        ({"precision": "bf16-mixed"}, {"affinity": 0.1, "sketch": 8}),
    ],
    ids=str,
)
def test_training_is_the_same_to_the_bit(training, options, tmp_path):
    runs = []
    for watched in (False, True):
        L.seed_everything(3, verbose=False)
        module = Uneven()
        callbacks = [td.TokenDrop(METHODS)]
        if watched:
            callbacks.append(monitor(tmp_path, loss=noisy_loss, **options))
        run = trainer(*callbacks, **training)
        run.fit(module, loader(8))
        runs.append((everything(module, run), module.draws, torch.get_rng_state(), random.getstate()))
    (plain, draws, torch_state, state), (found, again, torch_after, after) = runs
    assert draws == again
    assert torch.equal(torch_state, torch_after)
    assert state == after
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(found[name])), name
    events = read_history(tmp_path / "synergy.jsonl")
    assert events
    assert not any("gap" in event for event in events)


def gradient(model, given, rows=None, methods=None):
    """A task's gradient by plain torch, flattened; `rows` are those that keep their labels."""
    model = copy.deepcopy(model)
    labels = given["labels"].clone()
    if rows is not None:
        labels[[row for row in range(len(labels)) if row not in rows]] = -100
    drop = td.apply(model, methods) if methods else None
    layout = td.TokenLayout(given["image_mask"], given["task"], padding=given["attention_mask"] != 0, labels=labels)
    inputs = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "labels": labels}
    if drop is None:
        loss = model(**inputs).loss
    else:
        with drop.layout(layout):
            loss = model(**inputs).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "tokendrop" not in name]), loss.item()


def cosine(samples):
    a1, a2, b1, b2 = (one.double() for one in samples)
    crossed = (a1 @ b1 + a1 @ b2 + a2 @ b1 + a2 @ b2) / 4
    return (crossed / ((a1 @ a2) * (b1 @ b2)).sqrt()).item()


class Still(Lit):
    """Its weights do not move."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


SHARED = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_figures_are_those_of_plain_torch(mixed, consume, order, tmp_path):
    module = Still()
    if mixed:
        batches = [batch(2, ["u", "g"]), batch(5, ["g", "u"])]  # whose norms are resolved
        samples = [(batches[0], [0]), (batches[1], [1]), (batches[0], [1]), (batches[1], [0])]
    else:
        batches = [batch(0, "u"), batch(1, "g"), batch(2, "u"), batch(3, "g")]
        samples = [(batches[0], None), (batches[2], None), (batches[1], None), (batches[3], None)]
    expected = [gradient(llama(), given, rows, SHARED) for given, rows in samples]
    dense, _ = gradient(llama(), *samples[1])
    callbacks = [td.TokenDrop(SHARED, consume=consume), monitor(tmp_path, affinity=1e-3)][::order]
    trainer(*callbacks).fit(module, Batches(*batches))
    (event,) = [one for one in read_history(tmp_path / "synergy.jsonl") if one["step"] == len(batches)]
    a1, a2, b1, b2 = (one for one, _ in expected)
    assert event["alignment"]["u/g"]["value"] == pytest.approx(cosine((a1, a2, b1, b2)), abs=1e-5)
    assert event["losses"] == pytest.approx({"u": expected[1][1], "g": expected[3][1]})
    opposed = sum((x * y < 0).double().mean() for x in (a1, a2) for y in (b1, b2)) / 4
    assert event["conflict"]["u/g"]["value"] == pytest.approx(opposed.item(), abs=2e-3)
    assert event["noise_floor"]["u"] == pytest.approx((a1 * a2 < 0).double().mean().item(), abs=2e-3)
    similarity = torch.nn.functional.cosine_similarity(a2, dense, dim=0).item()
    assert event["fidelity"]["u"]["value"] == pytest.approx(similarity, abs=1e-5)
    assert event["norm_ratio"]["u"] == pytest.approx((a2.norm() / dense.norm()).item(), rel=1e-4)
    # Affinity: a small step down g_u changes the loss of g by its first order.
    for pair, slope in {"u/g": a1 @ b2, "g/u": b1 @ a2, "u/u": a1 @ a2}.items():
        first = 1e-3 * slope.item() / event["losses"][pair[-1]]
        assert event["affinity_first_order"][pair] == pytest.approx(first, rel=1e-3)
        assert event["affinity"][pair]["value"] == pytest.approx(first, rel=0.2, abs=2e-5)


def test_without_token_drop_the_task_is_the_batchs(tmp_path):
    module, watch = Still(), monitor(tmp_path)
    batches = [batch(0, "u"), batch(1, "g"), batch(2, "u"), batch(3, "g")]
    samples = [gradient(llama(), batches[at])[0] for at in (0, 2, 1, 3)]
    run = trainer(watch)
    run.fit(module, Batches(*batches))
    assert run.logged_metrics["synergy/alignment/u/g"].item() == pytest.approx(cosine(samples), abs=1e-5)
    event = read_history(tmp_path / "synergy.jsonl")[-1]
    assert "fidelity" not in event


def test_names_in_the_log(tmp_path):
    run = trainer(td.TokenDrop(SHARED), monitor(tmp_path, affinity=0.1))
    run.fit(Lit(), loader(12))
    pairs = {
        f"synergy/{kind}/u/g{end}" for kind in ("alignment", "conflict", "magnitude") for end in ("", "/low", "/high")
    }
    tasks = {f"synergy/fidelity/{task}{end}" for task in TASKS for end in ("", "/low", "/high")}
    affinity = {f"synergy/affinity/{a}/{b}{end}" for a in TASKS for b in TASKS for end in ("", "/low", "/high")}
    found = {name for name in run.logged_metrics if name.startswith("synergy/")}
    assert found <= pairs | tasks | affinity
    assert pairs - found <= {
        f"synergy/{kind}/u/g{end}" for kind in ("alignment", "magnitude") for end in ("/low", "/high")
    }
    assert tasks | affinity <= found


def test_layers_and_kinds(tmp_path):
    watch = monitor(tmp_path, params=["model.model.layers"])
    trainer(td.TokenDrop(SHARED), watch).fit(Still(), loader(6))
    event = read_history(tmp_path / "synergy.jsonl")[-1]
    kinds = ("norm", "attention", "mlp")
    assert set(event["groups"]["names"]) == {f"model.model.layers.{n}/{kind}" for n in range(4) for kind in kinds}
    figure = heat_map(read_history(tmp_path / "synergy.jsonl"), "u/g")
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    assert [one.get_text() for one in figure.axes[0].get_yticklabels()] == event["groups"]["names"]
    with pytest.raises(td.BatchError, match=r"pair 'u/x': expected one of \['u/g'\]"):
        heat_map(read_history(tmp_path / "synergy.jsonl"), "u/x")


def test_a_parameter_of_one_task_is_not_shared(tmp_path):
    # Image-only projections of one task get zeros from the other; they would only lengthen its gradient.
    alone = monitor(tmp_path / "alone", params=["model."])
    trainer(td.TokenDrop(METHODS), alone).fit(Still(), loader(6))
    every = monitor(tmp_path / "every")
    trainer(td.TokenDrop(METHODS), every).fit(Still(), loader(6))
    a, b = (read_history(tmp_path / name / "synergy.jsonl")[-1]["alignment"] for name in ("alone", "every"))
    assert a["u/g"]["value"] == pytest.approx(b["u/g"]["value"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_gap(bad, tmp_path):
    def loss(module, given):
        ours = noisy_free(module, given)
        return ours * bad if loss.broken else ours

    def noisy_free(module, given):
        return module.model(input_ids=given["input_ids"], labels=given["labels"]).loss

    loss.broken = True
    watch = monitor(tmp_path, loss=loss)
    with pytest.warns(td.SynergyWarning, match=r"left out step 4: the loss of task 'u' is \[(nan|inf)\]"):
        trainer(watch).fit(Still(), Batches(*(batch(n, "ug"[n % 2]) for n in range(4))))
    assert [("gap" in event, "alignment" in event) for event in read_history(tmp_path / "synergy.jsonl")] == [
        (True, False)
    ]
    loss.broken = False
    watch.next_step = 0
    trainer(watch).fit(Still(), Batches(*(batch(n, "ug"[n % 2]) for n in range(4))))
    assert "alignment" in read_history(tmp_path / "synergy.jsonl")[-1]


def test_tasks_that_never_come(tmp_path):
    watch = td.SynergyMonitor(("u", "typo"), every_n_steps=1, history=str(tmp_path / "synergy.jsonl"))
    with pytest.warns(td.SynergyWarning, match=r"no batch of the tasks \['typo'\] was seen, only of \['g', 'u'\]"):
        trainer(td.TokenDrop(SHARED), watch).fit(Lit(), loader(3))
    assert not (tmp_path / "synergy.jsonl").exists()


def test_tasks_without_a_shared_parameter(tmp_path):
    def loss(module, given):
        part = module.model.model.layers[0 if given["input_ids"].shape[0] == 2 else 1]
        return part.mlp.up_proj.weight.square().sum()

    batches = [batch(n, "ug"[n % 2], size=2 + n % 2) for n in range(4)]
    with pytest.warns(td.SynergyWarning, match=r"the tasks \('u', 'g'\) share no parameter with a gradient"):
        trainer(monitor(tmp_path, loss=loss)).fit(Still(), Batches(*batches))


def test_a_loss_without_a_gradient(tmp_path):
    with pytest.warns(td.SynergyWarning, match="the loss of task 'u' has no gradient"):
        trainer(monitor(tmp_path, loss=lambda *_: torch.tensor(1.0))).fit(
            Still(), Batches(*(batch(n, "ug"[n % 2]) for n in range(4)))
        )


def test_no_parameter_of_that_name(tmp_path):
    with pytest.warns(td.SynergyWarning, match=r"params=\('decoder',\): no trained parameter of Still has such a name"):
        trainer(monitor(tmp_path, params=["decoder"])).fit(Still(), Batches(*(batch(n, "ug"[n % 2]) for n in range(4))))


def test_a_mixed_batch_without_labels(tmp_path):
    given = {key: value for key, value in batch(0, ["u", "g"]).items() if key != "labels"}

    class Plain(Still):
        def training_step(self, given, index):
            return self.model(given["input_ids"]).logits.sum()

    with pytest.raises(td.BatchError, match=r"tasks \['g', 'u'\] has no 'labels'"):
        trainer(monitor(tmp_path)).fit(Plain(), Batches(given))


class Modelless(L.LightningModule):
    pass


def test_a_module_without_a_model_or_a_loss():
    from tokendrop.callbacks.evaluation import model_loss

    with pytest.raises(td.TaskLossError, match="Modelless has no `model`"):
        model_loss(Modelless(), {})
    module = Lit()
    with pytest.raises(td.TaskLossError, match="LlamaForCausalLM returned no loss"):
        model_loss(module, {"input_ids": torch.ones(1, 3, dtype=torch.int64), "task": "u"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "u"}, "two or more different names"),
        ({"tasks": ("u", "u")}, "two or more different names"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"sketch": 1.5}, "sketch=1.5"),
        ({"window": True}, "window=True"),
        ({"affinity": -1.0}, "affinity=-1.0"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(td.MethodError, match=message):
        td.SynergyMonitor(**({"tasks": TASKS} | options))


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_own_the_parameters_are_refused(name):
    watch, run = td.SynergyMonitor(TASKS), trainer()
    run.strategy.__class__ = type(name, (type(run.strategy),), {})
    with pytest.raises(td.UnsupportedError, match=f"beside {name}.*use DDP"):
        watch.setup(run, Lit(), "fit")


def test_alignment_that_stays_negative_warns_once(tmp_path):
    def loss(module, given):
        weight = module.model.lm_head.weight
        target = 1.0 if given["input_ids"].shape[0] == 2 else -1.0
        return (weight * target).mean() + 3 + 1e-3 * (weight * torch.rand(weight.shape)).mean()

    batches = [batch(n, "ug"[n % 2], size=2 + n % 2) for n in range(9)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(monitor(tmp_path, loss=loss)).fit(Still(), Batches(*batches))
    said = [str(one.message) for one in caught if issubclass(one.category, td.SynergyWarning)]
    assert len(said) == 1
    assert said[0].startswith("the gradients of u/g point away from each other: cosine -1.0")


def test_the_interval_follows_the_cost(tmp_path, monkeypatch):
    # A clock on which a step takes 1 s and an event 6 s: 6 / (0.03 * 1) = 200 steps.
    from tokendrop.callbacks import synergy_monitor

    now = [0.0]
    watch = td.SynergyMonitor(TASKS, history=str(tmp_path / "synergy.jsonl"), loss=lambda m, b: slow(m, b))
    monkeypatch.setattr(synergy_monitor.time, "perf_counter", lambda: now[0])

    def slow(module, given):
        now[0] += 1.5  # four evaluations an event
        return module.model(input_ids=given["input_ids"], labels=given["labels"]).loss

    class Steps(Still):
        def training_step(self, given, index):
            now[0] += 1.0
            return super().training_step(given, index)

    trainer(watch).fit(Steps(), Batches(*(batch(n, "ug"[n % 2]) for n in range(12))))
    steps = [event["step"] for event in read_history(tmp_path / "synergy.jsonl")]
    assert steps == [4, 9]
    assert watch.next_step == 9 + 200


def test_state_goes_on_where_it_stopped(tmp_path):
    watch = monitor(tmp_path)
    trainer(watch).fit(Still(), Batches(*(batch(n, "ug"[n % 2]) for n in range(7))))
    torch.save(watch.state_dict(), tmp_path / "state.pt")
    again = monitor(tmp_path)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for kind, found in again.figures.products.compute().items():
        assert found["u/g"] == pytest.approx(watch.figures.products.compute()[kind]["u/g"], nan_ok=True)
    assert (again.next_step, again.events) == (watch.next_step, watch.events)
    fresh = td.SynergyMonitor(TASKS)
    fresh.load_state_dict(td.SynergyMonitor(TASKS).state_dict())
    assert fresh.events == 0


def test_manual_optimization_and_checkpointing(tmp_path):
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            checkpointed(self.model)

        def training_step(self, given, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(given))
            optimizer.step()

    runs = []
    for watched in (False, True):
        module = Manual()
        trainer(td.TokenDrop(SHARED), *([monitor(tmp_path)] if watched else [])).fit(module, loader(6))
        runs.append(module.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert len(read_history(tmp_path / "synergy.jsonl")) >= 2


def test_a_line_left_unfinished(tmp_path):
    path = tmp_path / "synergy.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "al')
    assert read_history(path) == [{"step": 1}]
    append_history(path, {"step": 3})
    append_history(path, {"step": 4})
    assert [one["step"] for one in read_history(path)] == [1, 3, 4]


def test_a_run_that_goes_on_repeats_steps_and_counts_once(tmp_path):
    path = tmp_path / "synergy.jsonl"
    path.write_text("3\n[]\n\xff\n", encoding="latin-1")
    for number, step in enumerate((2, 4, 6, 3, 4)):
        append_history(path, {"step": step, "number": number})
    assert [(one["step"], one["number"]) for one in read_history(path)] == [(2, 0), (3, 3), (4, 4)]


def test_three_tasks(tmp_path):
    watch = td.SynergyMonitor(("u", "g", "v"), every_n_steps=1, history=str(tmp_path / "synergy.jsonl"))
    trainer(watch).fit(Still(), Batches(*(batch(n, "ugv"[n % 3]) for n in range(6))))
    assert set(read_history(tmp_path / "synergy.jsonl")[-1]["alignment"]) == {"u/g", "u/v", "g/v"}
