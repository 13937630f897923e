"""Pairs of attention as computed: by hand, and by the masks that a run gives its attention.

Shape letters: T tokens, M image tokens, D hidden, L layers.
"""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import batch, checkpointed, config, dropped, llama
from typer.testing import CliRunner

import tokendrop as td
from tokendrop.analysis.flops import LayerCost
from tokendrop.analysis.pairs import Pairs, window_of
from tokendrop.analysis.spent import hidden_flops
from tokendrop.cli import app
from tokendrop.engine.forward import split_attention

D = 32
WINDOWED = {"hidden_size": D, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOWED |= {"vocab_size": 50, "num_hidden_layers": 4, "pad_token_id": 0}


def triangle(rows):
    return rows * (rows + 1) // 2


def test_himix_by_hand():
    """T 9 + 24: 4 text rows before the image see text only, 5 behind it see all of it."""
    text, before, image = 9, 4, 24
    found = td.flops(config(), td.HiMix(), text=text, image=image, before=before)
    attention, linears = found.per_part["attention"], found.dense - found.per_part["attention"].dense
    assert attention.dense == 4 * 4 * D * (text + image) ** 2
    assert attention.computed_dense == 4 * 4 * D * triangle(text + image)
    assert attention.dropped == 4 * 4 * D * (before**2 + 5 * (text + image))
    assert attention.computed_dropped == 4 * 4 * D * (triangle(text) + 5 * image)
    assert found.computed_dense == linears + attention.computed_dense
    assert found.computed_ratio == found.computed_dropped / found.computed_dense
    assert found.computed_dropped == found.dropped - attention.dropped + attention.computed_dropped
    assert {one.computed_dense for one in found.per_layer} == {
        found.per_layer[0].dense - 4 * D * (33**2 - triangle(33))
    }
    assert all(c.computed_dense == c.dense for name, c in found.per_part.items() if name != "attention")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_himix_backward_by_hand(attn):
    """The same for every backend; what it counts for a hidden pair is its own."""
    found = td.flops(config(attn), td.HiMix("1:"), text=9, image=24, before=4, backward=True)
    each = (4 + (10 if attn == "sdpa" else 8)) * D
    seen = triangle(33) + 3 * (triangle(9) + 5 * 24)
    assert found.per_part["attention"].computed_dropped == each * seen
    assert found.per_part["attention"].computed_dense == each * 4 * triangle(33)


def test_rows_that_stay_are_causal_among_themselves():
    found = td.flops(config(), td.FastV(1, 0.5), text=6, image=10, multiple=4)
    assert found.per_part["attention"].computed_dropped == 4 * D * (triangle(16) + 3 * triangle(11))
    assert found.per_part["scoring"].computed_dropped == found.per_part["scoring"].dropped
    found = td.flops(config(), td.HMGen("1:3"), text=30, image=34, multiple=4)  # filled up to 32 rows
    assert found.per_part["attention"].computed_dropped == 4 * D * (2 * triangle(64) + 2 * triangle(32))


def test_kept_ones_lie_evenly_among_those_that_stay_as_context():
    """4 of 8 image tokens compute: the 2nd, 4th, 6th and 8th; 3 text rows behind them see everything."""
    found = td.flops(config(), td.Drop(":", 4, "similarity", "context"), text=3, image=8)
    kept = 2 + 4 + 6 + 8
    assert found.per_part["attention"].computed_dropped == 4 * 4 * D * (kept + 9 + 10 + 11)


@pytest.mark.parametrize("window", [1, 5, 33, 100])
def test_a_window_by_hand(window):
    sizes = hf.MistralConfig(sliding_window=window, attn_implementation="sdpa", **WINDOWED)
    found = td.flops(sizes, td.HMGen("1:3"), text=9, image=24, before=4)
    text = [*range(4), *range(28, 33)]
    dense = sum(min(t + 1, window) for t in range(33))
    own = sum(1 for t in text for s in text if t - window < s <= t)
    attention = found.per_part["attention"]
    assert (attention.computed_dense, attention.computed_dropped) == (16 * D * dense, 8 * D * (dense + own))
    assert attention.dense == 16 * D * 33**2


def test_layers_have_windows_of_their_own():
    sizes = hf.Gemma2Config(sliding_window=5, head_dim=8, **WINDOWED)
    with torch.device("meta"):
        layers = hf.Gemma2ForCausalLM(sizes).model.layers
    assert [window_of(layer.self_attn) for layer in layers] == [5, None, 5, None]
    assert [window_of(layer.self_attn) for layer in llama().model.layers] == [None] * 4
    assert window_of(None) is None


class Seen:
    """What the masks of a run let through, counted at its calls of attention, all samples and layers together."""

    def __init__(self, monkeypatch):
        self.pairs, self.attend = 0, F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", self)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", self)

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
        rows, keys = query.shape[2], key.shape[2]
        if attn_mask is None:
            seen = torch.ones(rows, keys, dtype=torch.bool)
            seen = (seen.tril() if is_causal else seen).expand(len(query), 1, -1, -1)
        else:
            seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
        self.pairs += int(seen.expand(len(query), -1, -1, -1)[:, 0].sum())
        return self.attend(query, key, value, attn_mask, dropout_p, is_causal, **rest)


def seen_in_a_run(monkeypatch, model, drop, made, layout, **inputs):
    """Pairs by the masks of a run, and by formula; the query and key of a filling row are not compared."""
    monkeypatch.setattr(
        split_attention._SplitAttention, "__torch_function__", lambda self, f, t, a=(), k=None: f(*a, **k or {})
    )
    seen = Seen(monkeypatch)
    with drop.layout(layout) as plan:
        model(input_ids=made.ids, use_cache=False, **inputs)
        pairs, total = Pairs(plan), 0
        for index, span in enumerate(plan.span_of):
            cost = LayerCost.of(drop.decoder_layers[index], drop.specs[index])
            total += sum(sum(pairs.of(group, cost.window)) for group in span.groups)
    return seen.pairs, total


RUN = {"u": td.HiMix("1:"), "g": td.HMGen("1:3"), "d": None}


@pytest.mark.parametrize("tasks", ["uu", "gg", "dd"])
@pytest.mark.parametrize("kind", ["plain", "window", "packs"])
def test_masks_of_a_run_let_the_same_pairs_through(monkeypatch, kind, tasks):
    made, window = batch(["ttiiiiiittt", "tiiiitttiit"], tasks), {"sliding_window": 4, "use_sliding_window": True}
    base = (
        llama() if kind != "window" else hf.Qwen2ForCausalLM(hf.Qwen2Config(**WINDOWED, **window, max_window_layers=1))
    )
    model, drop = dropped(base.eval(), RUN, multiple=1)
    layout, inputs = made.layout(), {}
    if kind == "packs":
        layout = made.layout(packs=torch.tensor([[0] * 5 + [1] * 6, [0] * 8 + [1] * 3]))
        inputs["position_ids"] = torch.tensor([[*range(5), *range(6)], [*range(8), *range(3)]])
    if tasks != "dd" and kind != "plain":  # as many rows in both samples, so that none fills
        layout = td.TokenLayout(made.image[:1].expand(2, -1), made.tasks, packs=layout.packs)
    elif tasks != "dd":
        layout = td.TokenLayout(made.image[:1].expand(2, -1), made.tasks)
    by_masks, formula = seen_in_a_run(monkeypatch, model, drop, made, layout, **inputs)
    assert by_masks == formula


def test_samples_of_a_batch_by_hand():
    """Ragged samples of two tasks; then layers 0 and 1 and all before them are frozen."""
    made = batch(["ttiiiiiittt", "tiiiittiitt"], "ug")
    model, drop = dropped(llama(), RUN)
    with drop.layout(made.layout()) as plan:
        (himix, hmgen), dense = hidden_flops(drop, plan)
    whole = 121 - triangle(11)
    assert dense == [(4 * 4 * D * whole, 4 * 10 * D * whole)] * 2
    # Layer 0 dense; then 5 text rows, 3 of them behind all 6 image tokens. HMGen: 5 text rows in 2 layers.
    pairs = whole + 3 * (2**2 + 3 * 11 - triangle(5) - 3 * 6)
    assert himix == (4 * D * pairs, 10 * D * pairs)
    pairs = 2 * whole + 2 * (25 - triangle(5))
    assert hmgen == (4 * D * pairs, 10 * D * pairs)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(("model.embed", "model.layers.0", "model.layers.1")))
    with drop.layout(made.layout()) as plan:
        assert hidden_flops(drop, plan)[1][1] == (4 * 4 * D * whole, 2 * 10 * D * whole)


def made_batch(one):
    return {"input_ids": one.ids, "labels": one.labels, "use_cache": False}


@pytest.mark.parametrize("again", [False, True])
def test_a_benchmark_says_both(again):
    made = batch(["ttiiiiiittt", "ttiiiiiittt"], "uu")
    model = checkpointed(llama()) if again else llama()
    found = td.benchmark(model, [made_batch(made)], lambda _: made.layout(), td.HiMix(), rounds=1, multiple=1)
    dense, own = 4 * 2 * D * (121 - triangle(11)), 4 * 2 * D * (2**2 + 3 * 11 - triangle(5) - 3 * 6)
    times = {"forward": 4, "backward": 14 if again else 10, "step": 18 if again else 14}
    for row in found.rows:
        assert row["dense_flops"] - row["dense_computed_flops"] == times[row["part"]] * dense
        assert row["flops"] - row["computed_flops"] == times[row["part"]] * own
        assert row["computed_flops_ratio"] == row["computed_flops"] / row["dense_computed_flops"]
        ratio = row["computed_flops_ratio"] / row["time_ratio"]["median"]
        assert row["computed_capture"]["median"] == pytest.approx(ratio)
    assert f"{found.rows[2]['computed_flops_ratio']:.2f}" == found.table().rows[2][5]
    assert "no query sees" in found.notes()[1]
    assert not any(one._forward_pre_hooks for one in model.modules())


def test_attention_that_nobody_knows_has_no_computed_flops(monkeypatch):
    from tokendrop.engine.model.decoder import LayerSpec

    made = batch(["ttiiiiiittt"], "g")
    monkeypatch.setattr(LayerSpec, "separate_refusal", lambda self: "nobody knows")
    rows = td.benchmark(llama(), [made_batch(made)], lambda _: made.layout(), td.HMGen("1:3"), rounds=1).rows
    assert {row["computed_flops"] for row in rows} == {row["computed_flops_ratio"] for row in rows} == {None}
    assert {row["computed_capture"] for row in rows} == {None}
    assert rows[0]["flops"] < rows[0]["dense_flops"]


def test_the_command_prints_both(tmp_path):
    config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    args = ["flops", str(tmp_path), "--method", "HiMix", "--text", "9", "--image", "24"]
    report = td.flops(config(), td.HiMix(), 9, 24)
    found = CliRunner().invoke(app, [*args, "--json"])
    assert json.loads(found.stdout) == json.loads(json.dumps(asdict(report)))
    assert json.loads(found.stdout)["computed_ratio"] == report.computed_ratio
    printed = " ".join(CliRunner().invoke(app, args).stdout.split())
    computed = f"{report.computed_dense / 1e9:,.2f} dense, {report.computed_dropped / 1e9:,.2f} dropped"
    assert f"causal attention by half: {computed}, ratio {report.computed_ratio:.3f}." in printed
