"""FLOPs of a batch by formula are those that a run of it counts: what chooses tokens, and what is frozen, too.

Shape letters: none.
"""

import pytest
import torch
from helpers import batch, config, dropped, llama, loss_of
from torch import nn
from transformers import LlamaForSequenceClassification

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
    "all but the norm": ("model.embed_tokens", "model.layers", "lm_head"),
    "the head": ("lm_head",),
    "a linear": ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.v_proj"),
}


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("task", "ug")
def test_what_is_frozen_has_no_gradient_of_its_own(kind, task):
    model, drop = dropped(llama(), {"u": td.HiMix("1:"), "g": td.HMGen("1:3")})
    frozen(model, *FROZEN[kind])
    found, formula = counted(model, drop, batch(SAMPLES, task * 2))
    assert found == formula


def square(width):
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 16))


@pytest.mark.parametrize("head", [lambda: nn.Linear(32, 16), lambda: square(32)], ids=["linear", "MLP"])
@pytest.mark.parametrize("where", ["", "model"])
def test_a_head_of_another_kind_needs_no_backward_of_frozen_layers(head, where):
    """Such as a generation head, which is registered anywhere and did not run on this batch."""
    model, drop = dropped(llama(), {"u": td.HiMix("1:")})
    model.get_submodule(where).gen_head = head()
    frozen(model, "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    found, formula = counted(model, drop, batch(SAMPLES, "uu"))
    assert found == formula


def test_a_trained_classifier_on_frozen_layers():
    model = LlamaForSequenceClassification(config(num_labels=3)).eval()
    model.requires_grad_(False).score.requires_grad_(True)
    made, drop = batch(SAMPLES, "uu"), td.apply(model, {"u": td.HiMix("1:")})
    with drop.layout(made.layout()) as plan:
        with counter() as count:
            model(input_ids=made.ids, labels=torch.tensor([0, 2])).loss.backward()
        (cost,) = task_costs(drop, plan, made.tasks).values()
    score = 2 * 2 * 11 * 32 * 3  # on all 11 tokens of two samples, and for its weights once more
    assert count.get_total_flops() == cost.flops + 2 * score
    assert cost.flops == cost.forward


class Seeing(nn.Module):
    """A decoder that is fed by a projector, registered behind it."""

    def __init__(self, width, inside):
        super().__init__()
        self.decoder = llama()
        holder = self.decoder.model if inside else self
        holder.tower = nn.Sequential(nn.Conv1d(4, width, 1), nn.Flatten(1), nn.Linear(width, width))
        holder.projector = nn.Linear(width, 32)
        self.__dict__["held"] = holder  # no child of its own

    def forward(self, ids, pixels):
        states = self.decoder.model.embed_tokens(ids)
        seen = self.held.projector(self.held.tower(pixels[..., None]))
        return self.decoder(inputs_embeds=states + seen[:, None], use_cache=False).logits


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("trained", ["projector", "tower"])
def test_what_feeds_the_layers_has_its_gradient_through_all_of_them(trained, inside):
    model, made = Seeing(16, inside), batch(SAMPLES, "uu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    drop = td.apply(model, {"u": td.HiMix("1:")})
    with drop.layout(made.layout()) as plan, counter() as count:
        loss_of(model(made.ids, torch.ones(2, 4)), made.labels).backward()
        (cost,) = task_costs(drop, plan, made.tasks).values()
    tower, projector = 2 * 2 * (4 * 16 + 16 * 16), 2 * 2 * 16 * 32
    # Weights of what is trained, and input gradients behind the first of them.
    beside = projector if trained == "projector" else tower + projector + 2 * 2 * 16 * 16
    assert count.get_total_flops() == cost.flops + tower + projector + beside


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
