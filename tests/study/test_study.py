"""The nine runs: what each is, that a method is active in training and in tests, and what a step costs."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_study import NAMES, TINY

import tokendrop as td
from tokendrop.study.costs import Steps, costs
from tokendrop.study.study import Run, Study
from tokendrop.study.train import train
from tokendrop.unified.data import TASKS, layout_of
from tokendrop.unified.metrics import greedy_exact, item_nll
from tokendrop.unified.sampling import sample_codes

# Lightning 2.6 calls a function that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def test_the_nine_runs():
    runs = Study().runs()
    assert tuple(runs) == NAMES
    assert [len(run.tasks) for run in runs.values()] == [1, 1, 2, 2, 1, 1, 2, 2, 2]
    assert not any(runs[name].methods for name in NAMES[:4])
    assert runs["ours"].methods == {
        "understanding": td.HiMix("1:"),
        "generation": td.SkipVision("1:", keep=0),
    }
    assert [Study().batches(run) for run in runs.values()] == [800, 400, 400, 240, 800, 400, 400, 400, 452]
    assert {m.separate for m in runs["share-all"].methods.values()} == {"none"}
    assert {m.separate for m in runs["share-partial"].methods.values()} == {"per-task"}
    assert runs["HMGen-G"].methods["generation"].separate == "shared"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_and_is_scored(name):
    seen = []
    outcome = train(TINY, name, 0, lambda done, due: seen.append((done, due)))
    run = TINY.runs()[name]
    updates = TINY.batches(run) * len(run.tasks)
    assert seen == [(step + 1, updates) for step in range(updates)]
    assert set(outcome.scores) == set(run.tasks)
    assert all(math.isfinite(value) for scores in outcome.scores.values() for value in scores.values())
    assert [batches for batches, _ in outcome.curve] == [TINY.batches(run)]
    assert set(outcome.curve[0][1]) == set(run.tasks)
    assert len(outcome.pictures) == (4 if "generation" in run.tasks else 0)
    for picture in outcome.pictures:
        assert picture.pixels.shape == (8, 16)
        assert len(picture.caption.split()) == 6


@torch.no_grad()
def lively(study):
    """An untrained model whose attention matters: its output projections start small."""
    model = study.model(0)
    for layer in model.model.model.layers:
        layer.self_attn.o_proj.weight.mul_(100)
    return model


@pytest.mark.parametrize("update", ["alternating", "mixed"])
def test_scores_are_taken_under_the_method(monkeypatch, update):
    study = replace(TINY, update=update)
    model = lively(study)
    monkeypatch.setattr(Study, "model", lambda self, seed: model)
    outcome = train(study, "share-all", 0)
    drop, data = td.handle(model), study.data(study.runs()["share-all"], 0)
    for task, batch in zip(TASKS, data.test_dataloader(), strict=True):
        with torch.no_grad(), drop.layout(layout_of(batch)):
            dropped = item_nll(model(batch), batch["labels"]).mean().item()
        with torch.no_grad(), drop.disabled():
            dense = item_nll(model(batch), batch["labels"]).mean().item()
        assert outcome.scores[task]["nll"] == pytest.approx(dropped, rel=1e-5)
        assert outcome.scores[task]["nll"] != pytest.approx(dense, rel=1e-3)


def growing(layout, length):
    return td.TokenLayout(layout.image[:, :length], layout.task)


@torch.no_grad()
@pytest.mark.parametrize("name", ["HMGen-G", "share-partial"])
def test_images_drawn_at_full_length_are_those_drawn_token_by_token(name):
    model = lively(TINY)
    drop = td.apply(model, dict(TINY.runs()[name].methods))
    batch = TINY.scenes.batch("generation", TINY.scenes.draw("val", 2, seed=(0,)), "val")
    layout = layout_of(batch)
    with drop.layout(layout):
        codes = sample_codes(model.model, batch, TINY.codes, seed=3)
    ids, generator = batch["input_ids"][:, :10], torch.Generator().manual_seed(3)
    for length in range(10, 42):
        with drop.layout(growing(layout, length)):
            share = model.model(input_ids=ids, use_cache=False).logits[:, -1, : TINY.codes].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(share, 1, generator=generator)], 1)
    assert torch.equal(ids[:, 10:], codes)


@torch.no_grad()
@pytest.mark.parametrize("name", ["HiMix-U", "ours"])
def test_greedy_decoding_under_a_method_agrees_with_one_forward(name):
    model = lively(TINY)
    drop = td.apply(model, dict(TINY.runs()[name].methods))
    batch = TINY.scenes.batch("understanding", TINY.scenes.draw("val", 3, seed=(0,)), "val")
    layout, ids = layout_of(batch), batch["input_ids"][:, :36]
    for length in range(36, 42):
        with drop.layout(growing(layout, length)):
            ids = torch.cat([ids, model.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    answered = {**batch, "input_ids": ids, "labels": torch.where(batch["labels"] == -100, -100, ids)}
    wrong = {**answered, "labels": answered["labels"].clone()}
    wrong["labels"][0, -2] += 1
    with drop.layout(layout):
        assert greedy_exact(model(answered), answered["labels"]).tolist() == [True, True, True]
        assert greedy_exact(model(answered), wrong["labels"]).tolist() == [False, True, True]


def test_a_run_depends_on_its_seed_alone():
    first, again, other = (train(TINY, "unified", seed) for seed in (0, 0, 1))
    assert first.scores == again.scores
    assert first.curve == again.curve
    assert first.scores != other.scores


def test_routers_depend_on_the_seed_alone(monkeypatch):
    run = Run(TASKS, dict.fromkeys(TASKS, td.MixtureOfDepths("1::2", 0.5)))
    monkeypatch.setattr(Study, "runs", lambda self: {"it": run})
    first = train(TINY, "it", 0)
    torch.rand(7)
    assert train(TINY, "it", 0).scores == first.scores


def test_dropped_steps_cost_less():
    found = costs(replace(TINY, batch_size=8, timing_rounds=2))
    ratios = {name: cost.flops_ratio for name, cost in found.items()}
    assert (ratios["unified"], ratios["unified x0.6"]) == (1, 0.6)
    assert ratios["U-only"] == pytest.approx(2 * ratios["G-only"], rel=0.01) == pytest.approx(1, rel=0.01)
    assert ratios["HiMix-U"] < ratios["ours"] < 0.88
    assert ratios["share-all"] == pytest.approx(ratios["HiMix-U"] / 2 + ratios["HMGen-G"], rel=0.01)
    assert found["HiMix-U"].peak_bytes < 0.7 * found["U-only"].peak_bytes
    assert all(cost.timed_steps == 2 and cost.step_seconds > 0 < cost.step_seconds_spread for cost in found.values())


def test_saved_bytes_are_those_of_activations():
    small, large = (Steps(replace(TINY, batch_size=size), "U-only").peak_bytes() for size in (8, 16))
    assert 1.9 < large / small <= 2.0
    wide = Steps(replace(TINY, codes=64, batch_size=8), "U-only").peak_bytes()
    # 48 more logits for each token: kept once as log-probabilities, and no weight is counted.
    assert 0 < wide - small <= 3 * 8 * 42 * 48 * 4
