"""Losses other than the labels' own, against plain torch on models of their own.

Shape letters: B batch, T tokens, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch

import tokendrop as td
from tokendrop.study.costs import Steps
from tokendrop.study.frontier import SCALES, one_run
from tokendrop.study.learnt import LearntVLM
from tokendrop.study.plans import FrontierError
from tokendrop.unified.data import TASKS, layout_of
from tokendrop.unified.model import UnifiedVLM

# Lightning 2.6 calls a function that torch 2.13 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

SIZES = {"codes": 16, "hidden": 16, "heads": 2, "batch_size": 4, "val_scenes": 4, "test_scenes": 8, "curve_points": 1}
TINY = replace(SCALES["digits, one digit"], steps=10, **SIZES)
MADE = TINY.scenes, 16, 2, 2, 3e-3, 0
BATCHES = {task: TINY.scenes.batch(task, TINY.scenes.draw("train", 6, (1,), task)) for task in TASKS}
HALF, TAUGHT = "U 2:, G 2:5 no FFN, half of the labels", "U 2:, G 2:5 no FFN, distilled each 10th"


def lively(model):
    """The model with output projections large enough for what is dropped to matter."""
    with torch.no_grad():
        for layer in model.model.model.layers:
            layer.self_attn.o_proj.weight.mul_(100)
            layer.mlp.down_proj.weight.mul_(100)
        model.model.lm_head.weight.mul_(10)
    return model


def test_some_of_the_labels_of_generation():
    model, whole = LearntVLM(*MADE, labelled=0.5), UnifiedVLM(*MADE)
    assert model.training_step(BATCHES[TASKS[0]], 0) == whole.training_step(BATCHES[TASKS[0]], 0)
    batch = BATCHES[TASKS[1]]
    logits, labels = whole(batch)[:, :-1], batch["labels"][:, 1:]
    nll = -logits.detach().log_softmax(-1).gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    losses = [model.training_step(batch, index).detach() for index in range(40)]
    assert len(set(map(float, losses))) == 40
    assert float(torch.stack(losses).mean()) == pytest.approx(float(nll[labels >= 0].mean()), rel=2e-2)
    assert model.training_step(batch, 7) == losses[7]


@pytest.mark.parametrize("task", TASKS)
def test_the_dense_forward_teaches_the_dropped_one(task):
    methods = {TASKS[0]: td.HiMix(), TASKS[1]: td.SkipVision("1:", keep=0)}
    model, dense, pupil = (lively(made(*MADE)) for made in (LearntVLM, UnifiedVLM, UnifiedVLM))
    model.distil, batch = 3, BATCHES[task]
    drops = [td.apply(one, methods) for one in (model, pupil)]
    assert [model.lesson(index) for index in range(12)] == [False] * 4 + [True] * 2 + [False] * 4 + [True] * 2
    with drops[0].layout(layout_of(batch)):
        found = model.training_step(batch, 4)
        found.backward()
    asked = batch["labels"][:, 1:] >= 0
    taught = dense(batch)[:, :-1][asked].log_softmax(-1)
    with drops[1].layout(layout_of(batch)):
        learnt = pupil(batch)[:, :-1][asked].log_softmax(-1)
        divergence = (taught.detach().exp() * (taught.detach() - learnt)).sum(-1).mean()
        divergence.backward()
    own = -taught.gather(1, batch["labels"][:, 1:][asked][:, None]).mean()
    own.backward()
    assert divergence > 1e-3
    assert float(found.detach()) == pytest.approx(float((own + divergence).detach()), rel=1e-5)
    for one, first, second in zip(*(made.model.parameters() for made in (model, dense, pupil)), strict=True):
        parts = [part.grad for part in (first, second) if part.grad is not None]
        torch.testing.assert_close(one.grad, sum(parts), rtol=1e-4, atol=1e-6)
    # Other batches are the dropped model's own.
    with drops[0].layout(layout_of(batch)), torch.no_grad():
        plain = model.training_step(batch, 0)
    with drops[1].layout(layout_of(batch)), torch.no_grad():
        assert plain == pupil.training_step(batch, 0)


@pytest.mark.parametrize("given", [{"labelled": 0.0}, {"labelled": 1.5}, {"distil": -1}])
def test_shares_and_counts_that_are_none(given):
    with pytest.raises(FrontierError, match=r"found labelled=.*, distil=.*; give a share above 0, at most 1, and a"):
        LearntVLM(*MADE, **given)


@pytest.mark.parametrize("given", [{"labelled": 0.5}, {"distil": 2}])
def test_a_batch_of_several_tasks_has_no_lesson(given):
    mixed = {**BATCHES[TASKS[0]], "task": [TASKS[0]] * 6}
    with pytest.raises(FrontierError, match=r"found a batch of several tasks; lessons and .* update='alternating'"):
        LearntVLM(*MADE, **given).training_step(mixed, 0)


def test_a_lesson_costs_a_dense_batch_more():
    u, g = (Steps(TINY, name).flops() for name in ("U alone", "G alone"))
    best, taught = (one_run(TINY, name, 0) for name in ("U 2:, G 2:5 no FFN", TAUGHT))
    assert taught["flops"] == best["flops"] + u + g
    assert taught["config"]["distil"] == 10
    assert taught["generation"]["nll"] != best["generation"]["nll"]


def test_weights_of_images_own_and_fewer_labels_cost_nothing():
    best, own, half = (one_run(TINY, f"U 2:, G 2:5 no FFN{more}", 0) for more in ("", ", own FFN and norms", HALF[18:]))
    assert best["flops"] == own["flops"] == half["flops"]
    assert len({one["generation"]["nll"] for one in (best, own, half)}) == 3
    assert (half["config"]["labelled"], best["config"]["labelled"]) == (0.5, 1.0)
