"""The maths of task gradients, by hand, by simulation and by what may not change it.

Shape letters: C coordinates, N tasks, S = 2 N samples, G groups, E events.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.synergy import Estimate, Synergy, TaskProducts, alignment, compress, conflict, jackknife, magnitude
from tokendrop.synergy import products as multiplied
from tokendrop.synergy.estimates import RANGES, UNKNOWN, affinity, between, conflicting_groups, over_events
from tokendrop.synergy.groups import group_of, groups_of


def gram_of(*samples):
    stacked = torch.stack([torch.as_tensor(one, dtype=torch.float64) for one in samples])
    return stacked @ stacked.T


def test_products_by_hand():
    a, b = (
        [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([[3.0]])],
        [torch.tensor([2.0, 1.0, 5.0]), torch.tensor([[-1.0]])],
    )
    gram, opposed = multiplied([[compress(x) for x in a], [compress(x) for x in b]])
    assert gram.tolist() == [[[5, 0], [0, 30]], [[9, -3], [-3, 1]]]
    # Of three coordinates one is opposed; zeros are opposed to nothing.
    assert opposed[0].tolist() == [[0, pytest.approx(1 / 3)], [pytest.approx(1 / 3), 0]]
    assert opposed[1].tolist() == [[0, 1], [1, 0]]


def test_alignment_by_hand():
    # a = (3, 4) and b = (4, 3): 24 / 25.
    gram = gram_of([3, 4], [3, 4], [4, 3], [4, 3])
    assert alignment(gram)[0, 1].item() == pytest.approx(0.96)
    assert magnitude(gram)[0, 1].item() == pytest.approx(1)
    gram = gram_of([3, 4], [3, 4], [0, 10], [0, 10])
    assert magnitude(gram)[0, 1].item() == pytest.approx(2 * 5 * 10 / 125)
    assert between(gram).tolist() == [[25, 40], [40, 100]]


def test_a_norm_lost_in_noise_gives_no_cosine():
    assert alignment(gram_of([1, 0], [-1, 0], [1, 1], [1, 1]))[0, 1].isnan()


VECTORS = st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-2), min_size=4, max_size=4)


@given(VECTORS, VECTORS, VECTORS, st.floats(0.1, 10))
def test_what_may_not_change_it(a, b, c, factor):
    plain = gram_of(a, a, b, b, c, c)
    scaled = gram_of(*(torch.tensor([a, a]) * factor), b, b, c, c)
    torch.testing.assert_close(alignment(scaled), alignment(plain), rtol=1e-5, atol=1e-6)
    permuted = gram_of(c, c, a, a, b, b)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(alignment(permuted), alignment(plain)[order][:, order])
    torch.testing.assert_close(magnitude(permuted), magnitude(plain)[order][:, order])
    torch.testing.assert_close(alignment(plain).diagonal(), torch.ones(3, dtype=torch.float64))


def test_the_estimate_has_no_bias_where_the_plain_cosine_has():
    """Noise three times the signal: the plain cosine shrinks tenfold, ours does not."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    b = 0.5 * a + math.sqrt(0.75) * b
    true = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
    noise = 3 * torch.randn(300, 4, 400, generator=generator, dtype=torch.float64)
    samples = torch.stack([a, a, b, b]) + noise
    grams = samples @ samples.transpose(1, 2)
    value, low, high = jackknife(alignment, grams)
    plain = torch.nn.functional.cosine_similarity(samples[:, 0], samples[:, 2], dim=1).mean().item()
    assert abs(value[0, 1].item() - true) < 0.03
    assert low[0, 1] < true < high[0, 1]
    assert plain < true / 5


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.eye(50, dtype=torch.float64)[:2] * 2
    b = (a + b) / math.sqrt(2)
    held = 0
    for _ in range(200):
        samples = torch.stack([a, a, b, b]) + 0.3 * torch.randn(12, 4, 50, generator=generator, dtype=torch.float64)
        _, low, high = jackknife(alignment, samples @ samples.transpose(1, 2))
        held += bool(low[0, 1] < math.sqrt(0.5) < high[0, 1])
    assert 180 <= held <= 199


def test_few_events_have_no_interval():
    value, low, high = jackknife(lambda x: x, torch.tensor([1.0, 3.0]))
    assert value == 2
    assert low.isnan()
    assert high.isnan()
    assert not Estimate(2.0, math.nan, math.nan).resolved
    assert not Estimate(0.1, -0.1, 0.3).resolved
    assert "not resolved" in str(Estimate(0.1, -0.1, 0.3))
    assert Estimate(-0.2, -0.3, -0.1).resolved


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("alignment", (1.41, -1.7, 4.5), None),
        ("alignment", (-1.41, -1.6, -1.2), None),  # far from zero, and no cosine
        ("alignment", (0.5, -1.7, 4.5), (0.5, -1, 1)),
        ("alignment", (-0.9, -1.1, -0.7), (-0.9, -1, -0.7)),
        ("alignment", (1.0004, 0.99, 1.01), (1, 0.99, 1)),  # rounding
        ("alignment", (0.3, math.nan, math.nan), (0.3, math.nan, math.nan)),
        ("alignment", (math.nan, 0.1, 0.2), None),
        ("alignment", (math.inf, 0.1, 0.2), None),
        ("fidelity", (1.1, 0.9, 1.3), None),
        ("conflict", (0.02, -0.03, 0.07), (0.02, 0, 0.07)),
        ("conflict", (-0.2, -0.3, -0.1), None),
        ("conflicting_groups", (1.2, 1.1, 1.3), None),
        ("magnitude", (0.99, 0.9, 1.08), (0.99, 0.9, 1)),
        ("affinity", (-7.0, -9.0, -5.0), (-7, -9, -5)),
        ("affinity", (1.5, 1.4, 1.6), None),
    ],
)
def test_an_estimate_outside_its_range_says_nothing(kind, given, said):
    found = Estimate(*given).within(*RANGES[kind])
    assert found == pytest.approx(said or UNKNOWN, nan_ok=True)
    if said is None:
        assert not found.resolved


def test_events_without_a_number_do_not_count():
    assert over_events([1.0, math.nan, 2.0, math.inf, 3.0, 4.0]) == pytest.approx(over_events([1.0, 2.0, 3.0, 4.0]))
    assert over_events([math.nan]) == pytest.approx(UNKNOWN, nan_ok=True)


def test_affinity_is_a_share_of_a_loss():
    assert affinity(1.5, 2.0) == 0.25
    # Better than a loss below zero is further below it; a share of it would say worse.
    for loss in (0.0, -1.0, math.nan):
        assert math.isnan(affinity(-2.0, loss))


def test_a_sketch_estimates_products_as_well_as_it_says():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 3000, generator=generator)
    b = 0.6 * a + 0.8 * b
    size, true = 200, (a @ b).item()
    found = [(compress(a, size, seed).values @ compress(b, size, seed).values).item() for seed in range(300)]
    bound = math.sqrt(((a @ a) * (b @ b) + (a @ b) ** 2).item() / size)
    errors = torch.tensor(found) - true
    assert abs(errors.mean()) < 4 * bound / math.sqrt(300)
    assert 0.5 * bound < errors.std() < 1.2 * bound
    # Its coordinates are the gradient's own, and one seed gives one choice.
    assert torch.isin(compress(a, size, 1).coordinates, a).all()
    share = (compress(a, size, 1).coordinates * compress(b, size, 1).coordinates < 0).double().mean()
    assert abs(share - (a * b < 0).double().mean()) < 0.15


def test_two_quadratics_of_known_alignment():
    """L_a = |x - p|^2 / 2 and L_b = |x - q|^2 / 2 pull towards p and q."""
    x = torch.zeros(3, requires_grad=True)
    p, q = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, -2.0, 1.0])
    samples = []
    for target in (p, p, q, q):
        (gradient,) = torch.autograd.grad(0.5 * (x - target).square().sum(), x)
        samples.append([compress(gradient)])
    gram, opposed = multiplied(samples)
    held = TaskProducts(("a", "b"))
    held.update(gram, opposed)
    found = held.compute()
    assert found["alignment"]["a/b"].value == pytest.approx(0.0)
    assert found["conflict"]["a/b"].value == pytest.approx(1 / 3)
    assert held.floor() == {"a": 0.0, "b": 0.0}
    assert conflict(opposed[0])[0, 1].item() == pytest.approx(1 / 3)


def test_groups_that_conflict():
    gram = torch.stack(
        [gram_of([1, 0], [1, 0], [1, 1], [1, 1]), gram_of([1.0], [1], [-2], [-2]), gram_of([0.0], [0], [1], [1])]
    )
    assert conflicting_groups(gram)[0, 1].item() == 0.5  # of the two whose alignment is known
    outside = gram_of([1.0, 0.0], [0.1, 1.0], [-1.0, 0.0], [-0.1, -1.0])[None]
    assert alignment(outside[0])[0, 1] < -5
    assert conflicting_groups(torch.cat([gram, outside]))[0, 1].item() == 0.5


def test_a_window_forgets():
    held = TaskProducts(("a", "b"), window=2)
    for sign in (-1.0, 1.0, 1.0):
        held.update(gram_of([1], [1], [sign], [sign])[None], torch.zeros(1, 4, 4))
    assert held.compute()["alignment"]["a/b"].value == 1
    assert held.by_group() == {"a/b": [1.0]}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.self_attn.q_norm.weight", "model.layers.3/norm"),
        ("model.layers.3.post_attention_layernorm.weight", "model.layers.3/norm"),
        ("model.layers.12.mlp.gate_proj.weight", "model.layers.12/mlp"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0/attention"),
        ("transformer.h.0.ln_1.weight", "transformer.h.0/norm"),
        ("gpt_neox.layers.1.attention.query_key_value.weight", "gpt_neox.layers.1/attention"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.norm.weight", "norm"),
        ("tokendrop.layers.2.image.k.weight", "tokendrop.layers.2/other"),
    ],
)
def test_groups_by_name(name, group):
    assert group_of(name) == group


def test_groups_keep_order():
    names = ["a.0.mlp.x", "a.0.attn.x", "a.0.mlp.y", "head"]
    assert groups_of(names) == {"a.0/mlp": [0, 2], "a.0/attention": [1], "other": [3]}


def test_synergy_is_quality_beyond_the_baseline():
    synergy = Synergy({"u": 0.5, "g": 0.8})
    synergy.update("u", torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert {task: value.item() for task, value in synergy.compute().items()} == {"u": 0.25}
    synergy.update("g", torch.tensor(0.4))
    assert synergy.compute()["g"].item() == pytest.approx(-0.4)
    with pytest.raises(td.LayoutError, match=r"task 'x' has no baseline; those given are 'u', 'g'"):
        synergy.update("x", torch.tensor(1.0))
