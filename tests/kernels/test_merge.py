"""merge_tokens against a loop, and its gradients.

Shape letters: B batch, T tokens, D hidden.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.kernels import merge_tokens


def case(batch, tokens, seed, dtype=torch.float64):
    """States, and for each token the one it goes to: some stay, the others go to one of these."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 3, generator=generator, dtype=dtype)
    stays = torch.rand(batch, tokens, generator=generator) < 0.5
    stays[:, 0] = True
    into = torch.arange(tokens).repeat(batch, 1)
    for b in range(batch):
        targets = stays[b].nonzero().flatten()
        chosen = targets[torch.randint(len(targets), (tokens,), generator=generator)]
        into[b] = into[b].where(stays[b], chosen)
    return x, into, torch.rand(batch, tokens, generator=generator, dtype=dtype)


@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
def test_equals_a_loop(batch, tokens, seed):
    x, into, weight = case(batch, tokens, seed)
    expected = x.clone()
    for b in range(batch):
        for t in range(tokens):
            if into[b, t] == t:
                expected[b, t] = sum(weight[b, u] * x[b, u] for u in range(tokens) if into[b, u] == t)
    torch.testing.assert_close(merge_tokens(x, into, weight), expected)


def test_gradients():
    x, into, weight = case(2, 6, 1)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, into, weight), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_where_all_stay_nothing_changes(dtype):
    x = torch.randn(2, 7, 3, dtype=dtype).requires_grad_()
    merged = merge_tokens(x, torch.arange(7).expand(2, -1), torch.ones(2, 7))
    grad = torch.randn(2, 7, 3, dtype=dtype)
    merged.backward(grad)
    assert merged.dtype == dtype
    assert torch.equal(merged, x)
    assert torch.equal(x.grad, grad)


def test_sums_of_half_precision_are_rounded_once():
    x, into, weight = torch.full((1, 257, 1), 1.0, dtype=torch.bfloat16), torch.zeros(1, 257).long(), torch.ones(1, 257)
    x[0, 0] = 256
    assert merge_tokens(x, into, weight)[0, 0].item() == 512


@pytest.mark.usefixtures("values_are_looked_at")
def test_refused():
    x, into, weight = case(2, 5, 0)
    with pytest.raises(td.LayoutTypeError, match="int64"):
        merge_tokens(x, into.int(), weight)
    with pytest.raises(td.LayoutError, match="weight"):
        merge_tokens(x, into, weight[:, :-1])
    with pytest.raises(td.LayoutError, match="5"):
        merge_tokens(x, into + 5, weight)
