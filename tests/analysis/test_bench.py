"""What `td.benchmark` says of methods on a user's own model and batches, by hand, and what it leaves untouched.

Shape letters: B batch, T tokens.
"""

import gc
import json
from collections import UserDict
from dataclasses import dataclass

import lightning as L
import pytest
import torch
from helpers import batch, checkpointed, llama, snapshot
from kernels_stand_in import kernels, with_attention
from torch.utils.flop_counter import FlopCounterMode

import tokendrop as td
from tokendrop.analysis import bench, bench_setup, bench_work, equality, timing
from tokendrop.analysis.memory import saved_bytes
from tokendrop.analysis.spent import task_costs
from tokendrop.analysis.timing import now, spread
from tokendrop.engine.model import context

U, G = batch(["ttiiittitt", "iittiitit"], "uu"), batch(["tiiiittttt"], "g")
METHODS = {"u": td.HiMix(), "g": td.HMGen("1:3")}


def made(one=U, **more):
    return {"input_ids": one.ids, "attention_mask": one.real.long(), "labels": one.labels, "use_cache": False} | more


def layout(one):
    return next(found for found in (U, G) if found.ids.shape == one["input_ids"].shape).layout()


def run(model, methods=METHODS, batches=(U, G), **options):
    return td.benchmark(model, [made(one) for one in batches], layout, methods, **{"rounds": 1} | options)


def test_every_row_by_hand():
    model = llama("eager")  # whose FLOPs torch's own counter sees in full
    found = run(model, {"u": td.HiMix(), "g": None}, [U])
    forward, backward, step = found.rows
    assert [row["part"] for row in found.rows] == ["forward", "backward", "step"]
    assert {row["method"] for row in found.rows} == {"u=HiMix(), g=dense"}
    model.train()
    with FlopCounterMode(display=False) as counted:
        loss = model(**made()).loss
    assert forward["dense_flops"] == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        loss.backward()
    assert backward["dense_flops"] == counted.get_total_flops()
    assert step["dense_flops"] == forward["dense_flops"] + backward["dense_flops"]
    assert step["dense_memory"] == saved_bytes(lambda: model(**made()).loss, model.parameters())
    drop = td.apply(model, {"u": td.HiMix()})
    with drop.layout(U.layout()) as plan:
        (cost,) = task_costs(drop, plan, ("u", "u")).values()
        assert step["memory"] == saved_bytes(lambda: model(**made()).loss, model.parameters())
    assert step["flops_ratio"] == pytest.approx(cost.flops_ratio, abs=1e-9)
    assert step["kept_ratio"] == cost.kept_ratio
    assert step["memory_ratio"] == step["memory"] / step["dense_memory"]
    for row in found.rows:
        (seconds, dense), samples = (row[f"{one}seconds"]["median"] for one in ("", "dense_")), len(U.ids)
        assert seconds > 0
        assert row["time_ratio"]["median"] == seconds / dense
        assert row["capture"]["median"] == row["flops_ratio"] / (seconds / dense)
        assert row["samples_per_second"]["median"] == pytest.approx(samples / seconds)
        assert row["dense_samples_per_second"]["median"] == pytest.approx(samples / dense)
        assert row["flops_ratio"] == row["flops"] / row["dense_flops"]
        assert {row[name]["n"] for name in ("seconds", "time_ratio", "capture")} == {1}


def test_nothing_that_a_forward_keeps_outlives_its_count():
    """A saved tensor that is handed back as it is holds the node that holds it, and no collector sees it."""

    def alive():
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    model, batch = llama(), made()

    def kept():
        return saved_bytes(lambda: model(**batch).loss, model.parameters())

    assert kept() > 0
    before = alive()
    assert kept() > 0
    assert alive() <= before


def test_figures_are_of_all_batches():
    model = llama()
    one, other, both = (run(model, batches=each, rounds=2).rows[2] for each in ([U], [G], [U, G]))
    assert both["flops"] == one["flops"] + other["flops"]
    assert both["memory"] == max(one["memory"], other["memory"])
    assert both["seconds"]["n"] == 2
    samples, seconds = both["samples_per_second"]["median"], both["seconds"]["median"]
    assert spread([samples]) == pytest.approx(spread([3 / (2 * seconds)]), rel=0.5)


def test_several_methods_each_beside_the_dense_model():
    methods = [td.HiMix(separate="shared"), {"u": td.MixtureOfDepths(), "g": td.Drop(":", 0.5)}, td.FastV(1)]
    found = run(llama(), methods, [U])
    names = ["HiMix(separate='shared')", "u=MixtureOfDepths(), g=Drop(layers=':', keep=0.5)", "FastV(layer=1)"]
    assert list(dict.fromkeys(row["method"] for row in found.rows)) == names
    assert len({row["dense_flops"] for row in found.rows if row["part"] == "step"}) == 1
    assert all(row["gradient_gap"] < 1e-5 for row in found.rows)
    shown = found.table()
    assert [line[:2] for line in shown.rows[:3]] == [(names[0], part) for part in ("forward", "backward", "step")]
    assert "n = 1 rounds" in found.notes()[0]
    assert "Equal to the reference" in found.notes()[2]
    assert json.loads(json.dumps(found.to_dict()))["rows"] == [dict(row) for row in found.rows]


@pytest.mark.parametrize("broken", [False, True])
def test_everything_is_given_back(broken):
    model = llama().eval()
    model.model.layers[1].train()
    model.model.register_buffer("seen", torch.zeros(1))
    model.lm_head.weight.requires_grad_(False)
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for name, one in grads.items():
        model.get_parameter(name).grad = one
    weights, before = {name: p.clone() for name, p in model.named_parameters()}, snapshot(model)
    random = torch.random.get_rng_state()
    calls = []

    def loss(one):
        model.model.seen += 1
        calls.append(model.training)
        if broken and len(calls) == 7:
            raise KeyError("mine")
        return model(**one).loss + 0 * torch.rand(())

    if broken:
        with pytest.raises(KeyError, match="mine"):
            run(model, loss=loss, rounds=3)
    else:
        run(model, loss=loss)
    assert snapshot(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(model.get_parameter(name).grad is one for name, one in grads.items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert float(model.model.seen) == 0
    # Compared in eval mode, timed in training mode.
    assert calls[:4] == [False] * 4
    assert all(calls[4:])


def test_an_optimizers_update_ends_a_step():
    updates = []

    class Counting(torch.optim.SGD):
        def step(self, *given):
            updates.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
            return super().step(*given)

    model = llama()
    own, added = sum(p.numel() for p in model.parameters()), 4 * 2 * 32 * 16  # keys and values of 4 layers
    run(model, td.HiMix(separate="shared"), [U], optimizer=lambda trained: Counting(trained, lr=1.0))
    assert set(updates) == {own, own + added}
    run(model, td.HiMix(), [U], optimizer=None)
    assert run(model, td.HiMix(), [U], optimizer=None).rows[0]["setup"]["optimizer"] is None
    with pytest.raises(td.MethodError, match="it made NoneType"):
        run(model, optimizer=lambda trained: None)


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = llama()

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss


def test_a_lightning_module_is_run_by_its_training_step():
    own, plain = run(Lit()).rows, run(llama()).rows
    assert [row["flops"] for row in own] == [row["flops"] for row in plain]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_equal_to_the_reference(dtype):
    rows = run(llama(dtype=dtype)).rows
    assert rows[0]["gradient_gap"] <= (1e-9 if dtype is torch.float64 else 0.06)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_kernels_that_take_no_mask_are_equal_to_the_reference(attention):
    """The reference runs sdpa, as a model does that was loaded so, and so do steps whose FLOPs are counted."""
    model, plain = with_attention(llama(), attention), run(llama()).rows
    with kernels():
        rows = run(model).rows
    for name in ("flops", "dense_flops"):
        assert [row[name] for row in rows] == [row[name] for row in plain]
    assert rows[0]["gradient_gap"] <= 1e-4
    assert model.config._attn_implementation == attention


def test_under_autocast_too():
    model = llama()

    def loss(one):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**one).loss

    assert 1e-5 < run(model, loss=loss).rows[0]["gradient_gap"] <= 0.06


@pytest.fixture
def wrong(monkeypatch):
    """An engine whose image keys lie the wrong way round."""
    update = context.ContextKeys.update

    def reversed_update(self, keys, values, *_):
        k, v = update(self, keys, values)
        rows = keys.shape[2]
        return (torch.cat([x[:, :, :-rows].flip(2), x[:, :, -rows:]], 2) for x in (k, v))

    monkeypatch.setattr(context.ContextKeys, "update", reversed_update)


def test_a_model_that_is_not_equal_to_the_reference_is_refused(wrong, tmp_path):
    model = llama()
    before = snapshot(model)
    with pytest.raises(td.UnsupportedError, match=r"HiMix.* on LlamaForCausalLM is not equal to the reference") as said:
        run(model, [td.HMGen("1:3"), td.HiMix()], [U], out=tmp_path / "out")
    assert "unchecked=True" in str(said.value)
    assert snapshot(model) == before
    assert not (tmp_path / "out").exists()  # nothing at all is reported
    rows = run(model, [td.HMGen("1:3"), td.HiMix()], [U], unchecked=True)
    assert {row["gradient_gap"] for row in rows.rows} == {None}
    assert "Not compared with the reference" in rows.notes()[2]
    assert run(model, td.HMGen("1:3")).rows[0]["gradient_gap"] < 1e-5


def test_each_task_is_compared_on_its_first_batch(wrong):
    model = llama()
    with pytest.raises(td.UnsupportedError, match="not equal to the reference"):
        run(model, {"u": td.HiMix(), "g": None}, [G, U])


@pytest.mark.parametrize("value", [0.0, float("nan"), 1.0])
def test_a_reference_that_says_otherwise_is_seen(monkeypatch, value):
    measured, calls = equality._measured, []

    def other(*given):
        calls.append(measured(*given))
        return calls[-1] if len(calls) == 1 else [calls[-1][0], *(one * value + value for one in calls[-1][1:])]

    monkeypatch.setattr(equality, "_measured", other)
    with pytest.raises(td.UnsupportedError, match="not equal"):
        run(llama())


def test_a_reference_that_cannot_run_is_said(monkeypatch):
    def broken(*_):
        raise RuntimeError("no mask")

    monkeypatch.setattr(equality, "reference", broken)
    with pytest.raises(td.UnsupportedError, match=r"reference cannot run .*RuntimeError: no mask.*--unchecked"):
        run(llama())


def test_a_broken_benchmark_goes_on_where_it_stopped(tmp_path):
    model, said = llama(), []

    def progress(*given):
        said.append(given)

    out = {"out": tmp_path, "progress": progress}
    first = run(model, [td.HiMix()], [U], **out)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"method": "HMGen(shallow=\'1:3\')", "part": "forw')  # killed there
    second = run(model, [td.HiMix(), td.HMGen("1:3")], [U], **out)
    assert said == [(1, 1, "HiMix()"), (1, 1, "HMGen(shallow='1:3')")]
    assert second.rows[:3] == first.rows
    assert len(second.rows) == 6
    assert run(model, [td.HMGen("1:3")], [U], **out).rows == second.rows[3:]
    assert len(said) == 2


@pytest.mark.parametrize("change", ["rounds", "model", "batches", "threads", "unchecked", "multiple", "part"])
def test_rows_of_another_setup_are_not_taken(tmp_path, change, monkeypatch):
    said = []
    out = {"out": tmp_path, "progress": lambda *given: said.append(given)}
    run(llama(), td.HiMix(), [U], **out)
    given = {"rounds": {"rounds": 2}, "unchecked": {"unchecked": True}, "multiple": {"multiple": 1}}.get(change, {})
    batches = [U, U] if change == "batches" else [U]
    model = llama(rope_theta=500.0) if change == "model" else llama()
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if change == "part":
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    run(model, td.HiMix(), batches, **out | given)
    assert len(said) == 2


MOVED = batch(["tttttiiiit", "iittiitit"], "uu")  # as long, and with as many image tokens of the same ids, as U


def other_batch(tmp_path, one, made_layout, **more):
    said = []
    out = {"rounds": 1, "out": tmp_path, "progress": lambda *given: said.append(given), "unchecked": True}
    td.benchmark(llama(), [one], lambda _: made_layout, td.HiMix(), **out | more)
    return len(said)


CHANGES = {
    "place of images": (made(MOVED), MOVED.layout()),
    "layout only": (made(), U.layout(images=U.image.long())),
    "segments": (made(), U.layout(segments=U.image.long())),
    "frames": (made(), U.layout(frames=U.image.long())),
    "packs": (made(), U.layout(packs=torch.zeros_like(U.ids))),
    "tasks": (made(), U.layout(task=("u", "g"))),
    "ids": (made() | {"input_ids": U.ids.flip(1)}, U.layout()),
    "labels": (made() | {"labels": U.labels.roll(1, 1)}, U.layout()),
    "an argument": (made(logits_to_keep=0), U.layout()),
    "labels of the layout": (made(), U.layout(labels=U.labels.index_fill(1, torch.tensor([9]), -100))),
}


def test_rows_of_a_batch_of_the_same_shape_are_not_taken(tmp_path):
    assert MOVED.image.sum() == U.image.sum()
    assert other_batch(tmp_path, made(), U.layout()) == 1
    assert {name: other_batch(tmp_path, *change) for name, change in CHANGES.items()} == dict.fromkeys(CHANGES, 1)
    assert other_batch(tmp_path, made(), U.layout()) == 0


def test_batches_are_known_by_what_they_hold_and_pixels_by_their_shape():
    @dataclass
    class Held:
        one: object

    def known(value):
        return bench_setup._described(value, U.layout())

    for wrap in (lambda one: [one], lambda one: {"x": (one,)}, Held, lambda one: UserDict(x=one)):
        ids, flags = torch.arange(6), torch.ones(6, dtype=torch.bool)
        assert known(wrap(ids)) == known(wrap(ids.clone())) != known(wrap(ids + 1))
        assert known(wrap(flags)) != known(wrap(~flags))
        assert known(wrap(torch.zeros(2, 3))) == known(wrap(torch.ones(2, 3))) != known(wrap(torch.zeros(3, 2)))
        assert known(wrap("a")) != known(wrap("b"))
        assert known(wrap(object())) == known(wrap(object()))
    json.dumps(known([1]))


def partly_eval(model):
    model.train().model.layers[1].eval()


@pytest.mark.parametrize("change", [checkpointed, partly_eval])
def test_rows_of_a_model_that_runs_otherwise_are_not_taken(tmp_path, change):
    model, said = llama(), []
    out = {"out": tmp_path, "progress": lambda *given: said.append(given)}
    plain = run(model, td.HiMix(), [U], **out).rows
    change(model)
    other = run(model, td.HiMix(), [U], **out).rows
    assert len(said) == 2
    if change is checkpointed:
        assert other[2]["memory"] < plain[2]["memory"]
    run(model, td.HiMix(), [U], **out)
    assert len(said) == 2


def test_rows_of_another_optimizer_or_precision_are_not_taken(tmp_path):
    model, said = llama(), []
    out = {"out": tmp_path, "progress": lambda *given: said.append(given), "unchecked": True}
    for rate in (0.1, 0.2, 0.1):
        run(model, td.HiMix(), [U], optimizer=lambda trained, rate=rate: torch.optim.SGD(trained, lr=rate), **out)
    assert len(said) == 2
    groups = run(model, td.HiMix(), [U], optimizer=lambda trained: torch.optim.SGD([
        {"params": trained[:1]}, {"params": trained[1:]}], lr=0.1), **out)  # fmt: skip
    assert len(said) == 3
    assert groups.rows[0]["setup"]["optimizer"] == "SGD"
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(model, td.HiMix(), [U], **out)
    assert len(said) == 4
    run(model, td.HiMix(), [U], **out)
    assert len(said) == 5


@pytest.mark.parametrize("compiled", [torch.compile, lambda model, **how: model.compile(**how) or model])
def test_a_compiled_model_is_refused(compiled):
    with pytest.raises(td.UnsupportedError, match=r"before torch\.compile"):
        run(compiled(llama(), backend="eager"))


def test_what_else_is_refused():
    model = llama()
    drop = td.apply(model, td.HiMix())
    with pytest.raises(td.AppliedError, match=r"remove\(\)"):
        run(model)
    drop.remove()
    with pytest.raises(td.TaskLossError, match="no gradient"):
        run(model, loss=lambda one: model(**one).loss.detach() + 0.0, unchecked=True)
    with pytest.raises(td.TaskLossError, match="no trained parameter"):
        run(llama().requires_grad_(False))
    with pytest.raises(td.NeededRowError):
        run(model, td.HiMix(), [G])


def test_the_clock(monkeypatch):
    assert timing.clock() == "process"
    assert now() <= now()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert timing.clock() == "wall"


def test_accelerators_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *given: waited.append(given))
    now([torch.device("cuda", 1), torch.device("cpu")])
    now()
    assert waited == [(torch.device("cuda", 1),), ()]
    assert timing.clock() == "wall"


def test_spread_is_numpys():
    import numpy as np

    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3]
    assert list(spread(values).values()) == pytest.approx([*np.quantile(values, [0.5, 0.2, 0.8]), 7])


def test_dense_and_dropped_take_turns(monkeypatch):
    turns = []
    work = bench_work.Work.seconds

    def seen(self):
        turns.append(self.drop is not None)
        return work(self)

    monkeypatch.setattr(bench_work.Work, "seconds", seen)
    run(llama(), td.HMGen("1:3"), rounds=6)
    assert [sorted(turns[at : at + 2]) for at in range(0, 12, 2)] == [[False, True]] * 6
    assert len({tuple(turns[at : at + 2]) for at in range(0, 12, 2)}) == 2  # in changing order


def test_methods_are_named_as_a_command_line_takes_them():
    from tokendrop.methods.text import each_from_text

    for one in (td.HiMix("2:", separate="shared"), td.HMGen([1, 2]), td.Drop(":", 0.5, "norm", "gone", 3)):
        assert each_from_text([bench.named(one)]) == [one]
    assert each_from_text(["FastV", "u=HiMix", "g=HMGen('1:3')", "u=FastV(1)"]) == [
        td.FastV(), {"u": td.HiMix(), "g": td.HMGen("1:3")}, {"u": td.FastV(1)},
    ]  # fmt: skip
