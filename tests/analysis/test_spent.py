"""FLOPs of a batch by formula are those that a run of it counts: what chooses tokens, and what is frozen, too.

Shape letters: none.
"""

import pytest
import torch
from helpers import batch, dropped, llama, loss_of

import tokendrop as td
from tokendrop.analysis.flops import counter
from tokendrop.analysis.spent import task_costs

SAMPLES = ["ttiiiiiittt", "tiiiitttttt"]
CHOOSING = {
    "FastV": td.FastV(1),
    "PyramidDrop": td.PyramidDrop((1, 2), (0.5, 0.25)),
    "HiDrop": td.HiDrop(1, (2,), (0.5,), 3),
    "DuetVLM": td.DuetVLM((1, 3), (0.5, 0)),
    "Drop by attention": td.Drop("1:3", 0.5, "attention"),
    "Drop to context": td.Drop("1:3", 0.5, "attention", "context"),
    "Drop to attend": td.Drop("1:3", 0.5, "attention", "attend"),
    "MixtureOfDepths": td.MixtureOfDepths("1::2", 0.5),
    "Sprint": td.Sprint("1:3", 0.5),
    "Sprint, to another end": td.Sprint("2:", 0.5),
}


def counted(model, drop, made):
    """Forward and both, counted and by formula."""
    with drop.layout(made.layout()) as plan:
        with counter() as forward:
            logits = model(input_ids=made.ids, attention_mask=made.mask, use_cache=False).logits
        with counter() as backward:
            loss_of(logits, made.labels).backward()
        costs = task_costs(drop, plan, made.tasks).values()
    once = forward.get_total_flops()
    both = once + backward.get_total_flops()
    return (once, both), (sum(cost.forward for cost in costs), sum(cost.flops for cost in costs))


@pytest.mark.parametrize("tasks", ["uu", "gu"])
@pytest.mark.parametrize("name", CHOOSING)
def test_what_chooses_tokens_is_counted(name, tasks):
    model, drop = dropped(llama(), {"u": CHOOSING[name], "g": td.HMGen("2:3")})
    drop.owner.train()
    found, formula = counted(model, drop, batch(SAMPLES, tasks))
    assert found == formula


def frozen(model, *names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(names))


FROZEN = {
    "nothing": (),
    "layers": ("model.layers",),
    "two layers and all before": ("model.embed_tokens", "model.layers.0", "model.layers.1"),
    "all but the head": ("model",),
    "all but norm and head": ("model.embed_tokens", "model.layers"),
    "the head": ("lm_head",),
    "a linear": ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.v_proj"),
}


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("task", "ug")
def test_what_is_frozen_has_no_gradient_of_its_own(kind, task):
    model, drop = dropped(llama(), {"u": td.HiMix("1:"), "g": td.HMGen("1:3")})
    frozen(model, *FROZEN[kind])
    found, formula = counted(model, drop, batch(SAMPLES, task * 2))
    if kind == "all but norm and head":  # whose gradient stops at the norm, behind the layers
        formula = formula[0], formula[1] + model.lm_head.weight.numel() * 2 * 2 * 11
    assert found == formula


@pytest.mark.parametrize("trained", ["tokendrop", "tokendrop.layers.1"])
@pytest.mark.parametrize("name", ["Sprint", "MixtureOfDepths", "PMoD"])
def test_what_works_behind_a_layer_needs_no_backward_of_it(name, trained):
    """A router and a fusion, in a decoder that is frozen."""
    methods = CHOOSING | {"PMoD": td.PMoD(0.0)}
    model, drop = dropped(llama(), {"u": methods[name]})
    model.train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(trained))
    found, formula = counted(model, drop, batch(SAMPLES, "uu"))
    assert found == formula


def test_what_is_unfrozen_later_is_counted_from_then_on():
    model, drop = dropped(llama(), {"u": td.HiMix("1:")})
    frozen(model, "model")
    before = counted(model, drop, batch(SAMPLES, "uu"))
    frozen(model)
    after = counted(model, drop, batch(SAMPLES, "uu"))
    assert before[0] == before[1]
    assert after[0] == after[1]
    assert after[0][1] > before[0][1]


def test_a_tied_head_is_trained_with_the_embeddings():
    model, drop = dropped(llama(tie_word_embeddings=True), {"u": td.HiMix("1:")})
    frozen(model, "model.layers")
    found, formula = counted(model, drop, batch(SAMPLES, "uu"))
    assert found == formula


def test_layers_behind_the_last_context_are_dense_again():
    """A hand-made sum: one sample of 3 text and 2 image tokens, four layers, the last two of HMGen."""
    drop = dropped(llama(), {"g": td.HMGen("2:4")})[1]
    d, kv, inner, vocab = 32, 16, 48, 50
    row, head = 2 * (2 * d * d + 2 * d * kv + 3 * d * inner), 2 * d * vocab
    forward = 2 * (5 * row + 25 * 4 * d) + 2 * (3 * row + 9 * 4 * d) + 5 * head
    backward = 2 * (10 * row + 25 * 10 * d) + 2 * (6 * row + 9 * 10 * d) + 10 * head
    with drop.layout(td.TokenLayout(torch.tensor([[False, True, True, False, False]]), "g")) as plan:
        (cost,) = task_costs(drop, plan, ("g",)).values()
    assert (cost.forward, cost.flops) == (forward, forward + backward)
