"""Drop(then="merge"): tokens merged where a range begins, restored where it ends.

Shape letters: B batch, T tokens, D hidden.
"""

import copy

import pytest
import torch
from helpers import batch, close, dropped, engine_step, llama, reference_step, same, step
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendrop as td

EXACT, BASE = llama(dtype=torch.float64), llama(spread=0.2)
SAMPLES = st.lists(st.text("ti", min_size=2, max_size=9), min_size=1, max_size=3)
METHODS = st.builds(
    td.Drop,
    st.sampled_from([":", "1:3", "2:", "0:1", (1, 3)]),
    st.sampled_from([0, 1, 3, 0.25, 0.5]),
    st.sampled_from(["norm", "uniform", "similarity", "attention"]),
    st.just("merge"),
)
OTHERS = st.sampled_from(
    [None, td.HMGen("1:3"), td.Drop("1:2", 0.5, "norm", "merge"), td.Drop("1:4", 0.5, "norm", "merge")]
)


@given(SAMPLES, METHODS, OTHERS, st.sampled_from(["left", "right"]), st.integers(0, 99))
@settings(max_examples=8)
def test_engine_equals_reference(samples, method, other, side, seed):
    """Also where another task cuts the range, or has a part of the same one."""
    methods = {"u": method, "g": other or method}
    made = batch(samples, "ugu"[: len(samples)], side, seed)
    for base, tolerance in ((BASE, 1e-5), (EXACT, 1e-9)):
        model, drop = dropped(base, methods, multiple=4)
        assert close(engine_step(model, drop, made), reference_step(base, methods, drop, made), made.real, tolerance)


def by_hand(model, ids, image, kept):
    """One sample through layers 1 and 2 merged, from the words: kept tokens become means, all get their update."""
    x, rotary = model.model.embed_tokens(ids)[0], model.model.rotary_emb
    every = torch.arange(len(x))

    def run(layer, states, at):
        out = layer(states[None], position_embeddings=rotary(states, at[None]), attention_mask=None)
        return (out[0] if isinstance(out, tuple) else out)[0]

    x = run(model.model.layers[0], x, every)
    tokens = image.nonzero().flatten().tolist()
    goes = {t: t for t in range(len(x))}
    for t in tokens:
        if t not in kept:
            goes[t] = max(kept, key=lambda one: torch.cosine_similarity(x[t], x[one], 0).item())
    members = {one: [t for t in tokens if goes[t] == one] for one in kept}
    # The weight of a mean is of float32.
    means = {one: x[own].sum(0) * (1 / torch.tensor(len(own))).double() for one, own in members.items()}
    rows = [t for t in range(len(x)) if goes[t] == t]
    merged = torch.stack([means.get(t, x[t]) for t in rows])
    out = merged
    for layer in model.model.layers[1:3]:
        out = run(layer, out, torch.tensor(rows))
    update = {t: out[at] - merged[at] for at, t in enumerate(rows)}
    x = torch.stack([x[t] + update[goes[t]] for t in range(len(x))])
    x = run(model.model.layers[3], x, every)
    return model.lm_head(model.model.norm(x))


def test_by_hand():
    made = batch(["ttiiiiiitt"], "g")
    wanted = torch.tensor([0.0] * 3 + [1.0] + [0.0] * 3 + [1.0] + [0.0] * 2)
    model, drop = dropped(EXACT, td.Drop("1:3", 2, lambda s: wanted.expand_as(s.image), "merge"), multiple=1)
    ours = engine_step(model, drop, made)
    hand = copy.deepcopy(EXACT)
    logits = by_hand(hand, made.ids, made.image[0], [3, 7])[None]
    torch.testing.assert_close(ours[0], logits.detach(), rtol=1e-9, atol=1e-9)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], made.labels[0, 1:], ignore_index=-100, reduction="sum")
    loss.backward()
    scale = max(p.grad.abs().max() for p in hand.parameters())
    for name, p in hand.named_parameters():
        assert (ours[1][name] - p.grad).abs().max() <= 1e-9 * scale, name


def test_all_kept_is_as_if_nothing_was_merged_to_the_bit():
    made = batch(["ttiiiitt", "tiitt"], "gg", "left")
    model, drop = dropped(EXACT, td.Drop("1:3", 1.0, "norm", "merge"))
    plain = engine_step(*dropped(EXACT, td.Drop("1:3", 1.0, "norm")), made)
    assert same(engine_step(model, drop, made), plain)
    assert close(plain, step(copy.deepcopy(EXACT), made), made.real, 1e-9)


def test_flops_are_those_of_the_kept_rows():
    reports = [
        td.flops(copy.deepcopy(BASE), td.Drop("1:3", 0.5, "norm", then), text=8, image=24, counted=counted)
        for then in ("merge", "rejoin")
        for counted in (False, True)
    ]
    formula, counted, plain, _ = reports
    assert formula.dropped == plain.dropped
    assert counted.dropped == formula.dropped


@pytest.mark.parametrize("score", ["similarity", "value_norm"])
@pytest.mark.parametrize("then", ["rejoin", "merge", "context"])
def test_ranges_of_two_tasks_that_begin_alike(score, then):
    """The longer one goes on with the tokens that were chosen where it began."""
    methods = {"u": td.Drop("1:2", 0.5, score, then), "g": td.Drop("1:3", 0.5, score, then)}
    for seed in range(3):
        made = batch(["ttiiiiiiittt", "tiiittiiiitt"], "ug", seed=seed)
        model, drop = dropped(EXACT, methods, multiple=1)
        assert close(engine_step(model, drop, made), reference_step(EXACT, methods, drop, made), made.real, 1e-9)
