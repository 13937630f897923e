"""Overflow, NaN, masked rows and sizes at the edge: a finite right answer, and exactly K tokens whatever the scores.

Shape letters: B batch, T tokens, K kept, D hidden.
"""

import pytest
import torch
from helpers import batch, close, config, dropped, engine_step, llama, reference_step, without_labels
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import tokendrop as td
from tokendrop.engine.plan import selection
from tokendrop.engine.plan.selection import highest
from tokendrop.methods.drop import SCORES
from tokendrop.roles import Attention, Scoring

BAD = [float("nan"), float("inf"), -float("inf"), 65504.0, 1e38, 0.0, 1.0, -1.0]
METHODS = {
    "himix": td.HiMix("1:"),
    "hmgen": td.HMGen("1:3"),
    "separate": td.HMGen("1:3", separate="shared"),
    "ltd": td.RandomLTD("1:3", keep=0.5),
    "fastv": td.FastV(2, 0.5),
    "pyramid": td.PyramidDrop((1, 3), (0.6, 0.3)),
    "hidrop": td.HiDrop(entry=1, layers=(2,), keep=(0.5,), exit=3),
    "duet": td.DuetVLM(text_layers=(1, 3), text_keep=(0.5, 0)),
    "none kept": td.Drop("1:3", keep=0),
    "context": td.Drop("1:", keep=2, score="norm", then="context"),
    **{name: td.Drop("1:3", keep=2, score=name) for name in SCORES},
    **{f"{name} gone": td.Drop("1:", keep=0.5, score=name, then="gone") for name in SCORES},
}
THIRD = {name: method for name, method in METHODS.items() if name not in ("ltd", "random", "random gone")}


@given(st.lists(st.sampled_from(BAD), min_size=1, max_size=12), st.data())
def test_exactly_k_are_chosen_whatever_the_scores(values, data):
    tokens = len(values)
    candidates = torch.tensor([data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))])
    count = data.draw(st.integers(0, int(candidates.sum())))
    scores = torch.tensor([values], dtype=data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))
    kept = highest(scores, candidates, torch.tensor([count]))
    assert kept.sum() == count
    assert not (kept & ~candidates).any()
    assert torch.equal(kept, highest(scores, candidates, torch.tensor([count])))
    # By hand: NaN and minus infinity last, ties to the earlier token.
    rank = [-torch.inf if value != value else value for value in scores[0].tolist()]
    order = sorted((t for t in range(tokens) if candidates[0, t]), key=lambda t: -rank[t])
    assert kept[0].nonzero().flatten().tolist() == sorted(order[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCORES)
def test_states_that_overflow_still_give_exactly_k_of_each_sample(name, dtype):
    states = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = states.clone()
    states[0, 2], states[0, 3], states[1] = torch.nan, torch.inf, 6e4
    image = torch.ones(3, 8, dtype=torch.bool)

    def kept(states):
        seen = Attention(
            states[:, :2].float().softmax(-1)[:, None, :, :1].expand(-1, 1, -1, 8), image[:, :2], states[:, None]
        )
        step = torch.zeros(2, dtype=torch.int64)
        scoring = Scoring(states, image, torch.arange(3), 1, 0, step, torch.full((3,), 2), seen)
        scoring = scoring._replace(images=image.long() - 1, frames=image.cumsum(1) // 3)
        return highest(SCORES[name](scoring), image, torch.full((3,), 3))

    found = kept(states)
    assert found.sum(1).tolist() == [3, 3, 3]
    assert torch.equal(found, kept(states))
    assert torch.equal(found[2], kept(clean)[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", METHODS)
def test_a_sample_that_is_not_finite_does_not_touch_the_others(case, bad):
    made = batch(["tiiitt", "tiiiit", "tttttt"], "uuu")
    model, drop = dropped(llama(), {"u": METHODS[case]}, multiple=2)
    expected, _ = engine_step(model, drop, made, made.layout())
    drop.entered = 0
    table = model.model.embed_tokens.weight.data
    ids = made.ids.clone()
    ids[0, 2] = 49
    made.ids[made.ids == 49] = 48
    ids[1:] = made.ids[1:]
    with drop.layout(made.layout(), step=(0, 0)), torch.no_grad():
        expected = model(ids, use_cache=False).logits
    table[49] = bad
    with drop.layout(made.layout(), step=(0, 0)), torch.no_grad():
        found = model(ids, use_cache=False).logits
    assert not found[0].isfinite().all()
    assert torch.equal(found[1:], expected[1:])


EDGES = {
    "all image": ["iiiiii", "iiii"],
    "one of each": ["iiiiii", "tttttt", "tiiiit"],
    "one image token": ["ti", "it"],
    "T = 1, text": ["t", "t"],
    "T = 1, image": ["i"],
    "T = 1, both": ["i", "t"],
    "a sample of padding": ["tiiitt", ""],
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("case", THIRD)
def test_edges_equal_the_reference(case, edge):
    made = without_labels(batch(EDGES[edge], "u" * len(EDGES[edge])))
    base, methods = llama(dtype=torch.float64), {"u": THIRD[case]}
    model, drop = dropped(base, methods, multiple=2)
    made.labels[:] = torch.where(made.real & ~made.image, made.ids, -100)
    made.labels[:, 0] = -100
    # The row before a label must not be an image's, which may be frozen.
    made.labels[:, 1:][made.image[:, :-1]] = -100
    found = engine_step(model, drop, made)
    assert found[0][made.real].isfinite().all()
    assert all(grad is None or grad.isfinite().all() for grad in found[1].values())
    assert close(found, reference_step(base, methods, drop, made), made.real, 1e-9)


def test_selections_do_not_depend_on_threads_or_on_how_a_batch_is_cut(monkeypatch):
    made = batch(["tiiiiiitt", "tiiiiitt", "ttiiiiiit", "tiiit"], "uuuu")
    chosen = []
    monkeypatch.setattr(selection, "highest", lambda *args: chosen.append(highest(*args)) or chosen[-1])

    def run(rows, first, step, threads=1):
        chosen.clear()
        layout = td.TokenLayout(made.image[rows], "u")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with drop.layout(layout, step=step, first=first), torch.no_grad():
            model(made.ids[rows], use_cache=False)
        torch.set_num_threads(before)
        return torch.stack(chosen, 1)

    model, drop = dropped(llama().train(), td.RandomLTD(":", keep=0.5, seed=7), multiple=2)
    whole = run(slice(0, 4), 0, (3, 1))
    assert torch.equal(whole, run(slice(0, 4), 0, (3, 1), threads=3))
    parts = [run(slice(at, at + size), at, (3, 1)) for at, size in ((0, 1), (1, 1), (2, 2))]
    assert torch.equal(whole, torch.cat(parts))
    for other in (run(slice(0, 4), 0, (4, 1)), run(slice(0, 4), 0, (3, 2)), run(slice(0, 4), 4, (3, 1))):
        assert not torch.equal(whole, other)
    assert any(not torch.equal(whole[:, 0], whole[:, layer]) for layer in range(1, 4))


LONG = 32768


@pytest.mark.parametrize(
    "method", [td.Drop(":", 16, then="gone"), td.Drop(":", 16, "attention", "gone"), td.HMGen(":")]
)
def test_32768_tokens_equal_the_kept_ones_alone(method, monkeypatch):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "max_position_embeddings": LONG}
    base = LlamaForCausalLM(config(layers=2, **sizes)).eval()
    ids = torch.randint(1, 50, (1, LONG), generator=torch.Generator().manual_seed(0))
    image = torch.ones(1, LONG, dtype=torch.bool)
    image[0, :5] = image[0, -40:] = False
    chosen = [torch.zeros_like(image)]
    monkeypatch.setattr(selection, "highest", lambda *args: chosen.append(highest(*args)) or chosen[-1])
    model, drop = dropped(base, method)
    with drop.layout(td.TokenLayout(image)), torch.no_grad():
        found = model(ids, use_cache=False, logits_to_keep=40).logits
    kept = (~image | chosen[-1])[0].nonzero().flatten()
    assert len(kept) == 45 + (0 if isinstance(method, td.HMGen) else 16)
    with torch.no_grad():
        mask = torch.zeros(1, 1, len(kept), len(kept)).masked_fill(
            ~torch.ones(len(kept), len(kept)).tril().bool(), -1e9
        )
        expected = base(ids[:, kept], position_ids=kept[None], attention_mask=mask, use_cache=False).logits[:, -40:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_32768_tokens_of_context():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "max_position_embeddings": LONG}
    model = LlamaForCausalLM(config(layers=2, **sizes))
    drop = td.apply(model, td.HiMix())
    image = torch.ones(1, LONG, dtype=torch.bool)
    image[0, :5] = image[0, -40:] = False
    ids = torch.ones(1, LONG, dtype=torch.int64)
    labels = torch.where(torch.arange(LONG) >= LONG - 39, ids, -100)
    with drop.layout(td.TokenLayout(image, labels=labels)):
        logits = model(ids, use_cache=False, logits_to_keep=40).logits
        logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
