"""Gather and scatter of token rows: copies, their gradients, and what they refuse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrop import LayoutError, LayoutTypeError, gather_tokens, scatter_tokens

SHAPES = [(1, 1, 1), (2, 5, 3), (3, 4, 8)]
COUNTS = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))


def rows(batch, tokens, count, generator=None):
    return torch.stack([torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)]).view(batch, count)


def loops(full, kept, idx):
    out = full.clone()
    for b in range(len(idx)):
        for k in range(idx.shape[1]):
            out[b, idx[b, k]] = kept[b, k]
    return out


@given(COUNTS)
def test_against_loops(sizes):
    batch, tokens, width, share, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    count = round(share * tokens)
    idx = rows(batch, tokens, count, generator)
    x, kept = torch.randn(batch, tokens, width, generator=generator), torch.randn(batch, count, width)
    expected = torch.stack([x[b, idx[b]] for b in range(batch)])
    assert torch.equal(gather_tokens(x, idx), expected)
    assert torch.equal(scatter_tokens(x, kept, idx), loops(x, kept, idx))
    assert torch.equal(gather_tokens(scatter_tokens(x, kept, idx), idx), kept)
    assert torch.equal(scatter_tokens(x, gather_tokens(x, idx), idx), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, None])
def test_gradcheck(shape, count):
    batch, tokens, width = shape
    idx = rows(batch, tokens, tokens if count is None else count)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    kept = torch.randn(batch, idx.shape[1], width, dtype=torch.float64, requires_grad=True)
    if idx.shape[1]:
        assert torch.autograd.gradcheck(gather_tokens, (x, idx))
        assert torch.autograd.gradgradcheck(gather_tokens, (x, idx))
    assert torch.autograd.gradcheck(scatter_tokens, (x, kept, idx))
    assert torch.autograd.gradgradcheck(scatter_tokens, (x, kept, idx))


def test_gradients_of_rows_not_kept_and_replaced_are_zero():
    x, kept = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 2, 3, requires_grad=True)
    idx = torch.tensor([[0, 3], [4, 1]])
    gather_tokens(x, idx).sum().backward()
    chosen = torch.zeros(2, 5).scatter(1, idx, 1.0)[:, :, None].expand(-1, -1, 3)
    assert torch.equal(x.grad, chosen)
    x.grad = None
    scatter_tokens(x, kept, idx).sum().backward()
    assert torch.equal(x.grad, 1 - chosen)
    assert torch.equal(kept.grad, torch.ones_like(kept))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "inner": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": lambda x: torch.stack([x, x], 3)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("how", LAYOUTS)
def test_not_contiguous(how):
    x = LAYOUTS[how](torch.randn(3, 5, 4))
    kept = LAYOUTS[how](torch.randn(3, 2, 4))
    idx = rows(5, 3, 2).new_tensor([[0, 1, 4], [3, 2, 0]]).T
    assert not x.is_contiguous()
    assert torch.equal(gather_tokens(x, idx), gather_tokens(x.contiguous(), idx.contiguous()))
    assert torch.equal(scatter_tokens(x, kept, idx), loops(x.contiguous(), kept, idx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_any_dtype(dtype):
    x = torch.randint(0, 2, (2, 5, 3)).to(dtype)
    idx = torch.tensor([[1, 4], [0, 2]])
    assert torch.equal(
        scatter_tokens(torch.zeros_like(x), gather_tokens(x, idx), idx).sum(), x[[0, 0, 1, 1], [1, 4, 0, 2]].sum()
    )
    assert gather_tokens(x, idx).dtype == dtype


def test_inputs_are_not_written():
    x, kept, idx = torch.zeros(1, 3, 2), torch.ones(1, 1, 2), torch.tensor([[1]])
    scatter_tokens(x, kept, idx)
    assert not x.any()


@pytest.mark.parametrize("idx", [torch.tensor([[0], [0]]).int(), torch.tensor([[0.0], [0.0]]), [[0], [0]]])
def test_indices_are_int64(idx):
    with pytest.raises(LayoutTypeError, match="idx: expected int64; found"):
        gather_tokens(torch.zeros(2, 3, 4), idx)


@pytest.mark.parametrize(
    ("shape", "idx"), [((2, 3), (2, 1)), ((2, 3, 4), (2,)), ((2, 3, 4), (3, 1)), ((2, 3, 4), (2, 4))]
)
def test_shapes_fit(shape, idx):
    with pytest.raises(LayoutError, match=r"found .* and "):
        gather_tokens(torch.zeros(shape), torch.zeros(idx, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 1, 3), (1, 1, 4), (2, 4)])
def test_kept_rows_fit(shape):
    with pytest.raises(LayoutError, match=r"kept: expected \(2, 1, 4\)"):
        scatter_tokens(torch.zeros(2, 3, 4), torch.zeros(shape), torch.zeros(2, 1, dtype=torch.long))


def test_kept_rows_have_the_dtype():
    with pytest.raises(LayoutTypeError, match=r"kept: .*float64"):
        scatter_tokens(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4).double(), torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.usefixtures("values_are_looked_at")
@pytest.mark.parametrize("idx", [[[3], [0]], [[0], [-1]], [[5], [0]]])
def test_an_index_outside_its_sample_never_reads_another(idx):
    """Flat indexing would turn row T of sample 0 into row 0 of sample 1."""
    with pytest.raises((IndexError, RuntimeError, LayoutError)):
        gather_tokens(torch.arange(12.0).view(2, 3, 2), torch.tensor(idx))
