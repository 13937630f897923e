"""Counted FLOPs equal the formula exactly."""

import warnings

import pytest
import torch
from helpers import MIXED, batch, dropped, llama, loss_of
from torch.nn.functional import interpolate
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations import moe

import tokendrop as td
from tokendrop.analysis.flops import LayerCost, counter, head_flops
from tokendrop.analysis.spent import TaskCost, task_costs

LONG = ["ttt" + "i" * 37 + "t" * 11 + "i" * 9 + "t" * 8, "t" * 5 + "i" * 21 + "t" * 13]
BATCHES = {
    "dense": (["tiittt", "tittti"], "dd"),
    "himix": (["tiittt", "tittti"], "uu"),
    "hmgen": (["tiittt", "tittti"], "gg"),
    "mixed": MIXED,
    "text": (["tttttt", "ttt"], "ug"),
    "one row": (["iiiii"], "u"),
    "long": (LONG, "ug"),
    "attend": (["tiittt", "tittti"], "aa"),
    "attend long": (LONG, "ag"),
}
SIZES = [{}, {"num_key_value_heads": 4, "intermediate_size": 80, "layers": 3}, {"head_dim": 16, "vocab_size": 70}]


def counted(base, methods, made, **kwargs):
    """Counted forward, counted backward, and the costs by formula."""
    model, drop = dropped(base, methods, **kwargs)
    with drop.layout(made.layout()) as plan:
        with counter() as forward:
            logits = model(input_ids=made.ids, attention_mask=made.mask, use_cache=False).logits
        with counter() as backward:
            loss_of(logits, made.labels).backward()
        costs = task_costs(drop, plan, made.tasks)
    return forward.get_total_flops(), backward.get_total_flops(), costs, (drop, plan)


def methods_with(separate):
    return {
        "u": td.HiMix("1:", separate),
        "g": td.HMGen("1:3", separate),
        "d": None,
        "a": td.Drop("1:", 2, then="attend"),
    }


def forward_formula(drop, plan):
    """The forward alone."""
    layer, total = LayerCost.of(drop.decoder_layers[0], drop.spec), 0
    for span in plan.spans:
        for group in span.groups:
            rows = plan.shape[1] if group.active is None else group.active.index.shape[1]
            context = 0 if group.context is None else group.context.index.shape[1]
            attend = 0 if group.ffn_size is None else rows - group.ffn_size
            total += (span.stop - span.start) * len(group.members) * layer.forward(rows, context, None, attend)
    return total + plan.shape[0] * plan.shape[1] * head_flops(drop.owner)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("separate", ["none", "shared", "per-task"])
@pytest.mark.parametrize("name", BATCHES)
def test_counted_is_the_formula(name, separate, attn):
    made = batch(*BATCHES[name], side="left")
    forward, backward, costs, made_plan = counted(llama(attn), methods_with(separate), made)
    assert forward == forward_formula(*made_plan)
    assert forward + backward == sum(cost.flops for cost in costs.values())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["dense", "mixed"])
def test_other_sizes(name, sizes, attn):
    made = batch(*BATCHES[name])
    forward, backward, costs, _ = counted(llama(attn, **sizes), methods_with("shared"), made, multiple=4)
    assert forward + backward == sum(cost.flops for cost in costs.values())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_dense_cost_is_what_the_untouched_model_counts(attn):
    made, model = batch(*MIXED), llama(attn)
    with counter() as count:
        loss_of(model(input_ids=made.ids, attention_mask=made.mask, use_cache=False).logits, made.labels).backward()
    costs = counted(model, methods_with("none"), made)[2]
    assert count.get_total_flops() == sum(cost.dense_flops for cost in costs.values())


def test_by_hand():
    """Two samples of 4 text and 2 image tokens, 4 layers, HiMix from layer 1 on, written out from method.md."""
    d, kv, inner, vocab, text, image = 32, 16, 48, 50, 4, 2
    row = 2 * (2 * d * d + 2 * d * kv + 3 * d * inner)
    dense = 6 * row + 4 * 6 * 6 * d
    context = text * row + image * 2 * 2 * d * kv + 4 * text * (text + image) * d
    head = 6 * 2 * d * vocab
    forward, _, costs, _ = counted(llama(), {"u": td.HiMix("1:")}, batch(["tiittt", "tittti"], "uu"))
    assert forward == 2 * (dense + 3 * context + head)
    (cost,) = costs.values()
    assert cost.kept_ratio == (6 + 3 * 4) / 24
    assert cost.dense_token_layers == 2 * 24


def test_attend_by_hand():
    """4 text and 3 image tokens, of which one is kept: 5 rows of 7 have an FFN in three of four layers."""
    d, kv, inner, vocab = 32, 16, 48, 50
    attention, ffn = 2 * (2 * d * d + 2 * d * kv), 2 * 3 * d * inner
    layer = 7 * attention + 4 * 7 * 7 * d
    methods = {"a": td.Drop("1:", 1, then="attend")}
    forward, _, costs, _ = counted(llama(), methods, batch(["tiitttt"[:5] + "it", "titttii"], "aa"), multiple=1)
    assert forward == 2 * (4 * layer + (7 + 3 * 5) * ffn + 7 * 2 * d * vocab)
    assert costs["a"].kept_ratio == 1  # every token is there


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_head_that_runs_on_labelled_rows(multiple):
    made, model = batch(*MIXED), llama()
    drop = td.apply(model, methods_with("none"), multiple=multiple, labelled_logits=True)
    with drop.layout(made.layout()) as plan, counter() as count:
        model(input_ids=made.ids, attention_mask=made.mask, labels=made.labels, use_cache=False).loss.backward()
    assert count.get_total_flops() == pytest.approx(sum(c.flops for c in task_costs(drop, plan, made.tasks).values()))
    with drop.layout(made.layout(labels=None)) as plan:
        whole = task_costs(drop, plan, made.tasks)
    drop.labelled_logits = False
    assert task_costs(drop, plan, made.tasks) == whole


def test_costs_belong_to_their_tasks():
    """A mixed batch costs what its samples cost alone, where nothing is rounded up."""
    samples, methods = ["tiittt"] * 3, methods_with("none")
    mixed = counted(llama(), methods, batch(samples, "ugu"))[2]
    alone = {task: counted(llama(), methods, batch(["tiittt"], task))[2][task] for task in "ug"}
    assert mixed == {"u": alone["u"] + alone["u"], "g": alone["g"]}
    assert mixed["u"].flops_ratio < 1
    assert TaskCost(1, 2, 3, 4) + TaskCost(1, 2, 3, 4) == TaskCost(2, 4, 6, 8)


def test_counter_sees_attention_on_the_cpu():
    q = torch.ones(1, 2, 3, 4, requires_grad=True)
    k = torch.ones(1, 2, 5, 4, requires_grad=True)
    with counter() as count:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert count.get_total_flops() == 2 * 2 * 3 * 5 * (4 + 4)
    with counter() as count:
        out.sum().backward()
    assert count.get_total_flops() == 2 * 2 * 3 * 5 * 5 * 4


@pytest.mark.parametrize("kind", ["eager", "batched_mm", "grouped_mm", "fallback"])
def test_experts_are_counted_however_they_run(kind, monkeypatch):
    """A gate, three products of each row with two of four experts, and twice that in the backward."""
    sizes = {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 1, "vocab_size": 50}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_attention_heads=4, num_key_value_heads=4, **sizes, **experts))
    model.set_experts_implementation("grouped_mm" if kind == "fallback" else kind)
    if kind == "fallback":  # of older torch
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    mixture, states = model.model.layers[0].mlp, torch.randn(2, 16, 32, requires_grad=True)
    with counter() as forward:
        out = mixture(states)
    with counter() as backward:
        out.sum().backward()
    assert forward.get_total_flops() == 2 * 16 * 2 * (32 * 4 + 2 * 3 * 32 * 24)
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize(
    ("a", "b", "products"),
    [
        ((16, 8), (3, 8, 24), 16 * 8 * 24),  # rows of experts
        ((8, 16), (16, 24), 8 * 16 * 24),  # the gradient of their weights
        ((3, 16, 8), (3, 8, 24), 3 * 16 * 8 * 24),
        ((3, 16, 8), (8, 24), 16 * 8 * 24),  # each column with one group
    ],
)
def test_grouped_products_by_hand(a, b, products):
    ends = None if len(a) == len(b) == 3 else torch.zeros(3, dtype=torch.int32, device="meta")
    a, b = (torch.empty(one, dtype=torch.bfloat16, device="meta") for one in (a, b))
    with counter() as count:
        torch._grouped_mm(a, b, ends)
    assert count.get_total_flops() == 2 * products


@torch.library.custom_op("tokendrop_tests::my_matmul", mutates_args=())
def my_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def test_a_product_without_a_formula_is_said_once():
    a = torch.ones(3, 3)
    with counter() as count, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        my_matmul(a @ a, my_matmul(a, a))
        # Of their names, parts look alike.
        interpolate(torch.lgamma(a).cummax(0).values[None], size=5, mode="linear")
    (one,) = map(str, (one.message for one in said))
    assert "found tokendrop_tests.my_matmul, which looks like a product of matrices" in one
    assert "they are counted as 0" in one
    assert "register_flop_formula" in one
    assert count.get_total_flops() == 2 * 27
