"""The Triton kernels in Triton's interpreter, forward and backward: run by test_interpreted.py in its own process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import OPS, assert_same, build
from triton.runtime.interpreter import InterpretedFunction

from tokendrop import gather_tokens
from tokendrop.kernels import ops, triton_rows

# The interpreter cuts fp32 to bf16 instead of rounding: one unit in the last place.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.floats(0, 1), st.integers(0, 99))


def test_the_kernels_are_interpreted():
    kernels = [value for name, value in vars(triton_rows).items() if "kernel" in name]
    assert len(set(map(id, kernels))) == 3
    assert all(isinstance(kernel, InterpretedFunction) for kernel in kernels)
    assert ops.uses_triton(torch.zeros(1))


@pytest.mark.parametrize("name", OPS)
@given(SHAPES, st.sampled_from(list(TOLERANCE)))
def test_equals_the_reference(name, sizes, dtype):
    batch, tokens, width, share, seed = sizes
    shape = (batch, tokens, width, round(share * tokens))
    assert_same(*build(name, shape, dtype, seed), TOLERANCE[dtype], seed)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(2, 5, 33, 0), (2, 5, 33, 1), (2, 5, 33, 5), (1, 40, 65, 37), (2, 3, 2050, 2)])
def test_counts_and_several_tiles(name, shape):
    """K = 0, 1 and T, odd widths, more rows than a tile has, more columns than a tile has."""
    assert_same(*build(name, shape, torch.float32), TOLERANCE[torch.float32])


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "inner": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "offset": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_not_contiguous(name, how):
    op, args = build(name, (3, 6, 10, 3), torch.float32, grad=False)
    rows = [isinstance(x, torch.Tensor) and x.dim() == 3 for x in args]
    args = [LAYOUTS[how](x) if is_rows else x for x, is_rows in zip(args, rows, strict=True)]
    args = [x.T.contiguous().T if isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in args]
    inputs = [x.requires_grad_() if is_rows else x for x, is_rows in zip(args, rows, strict=True)]
    assert_same(op, inputs, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["gather", "select", "rotary"])
def test_offsets_beyond_32_bits(name, monkeypatch):
    """Rows 2^29 elements apart in storage that is reserved but, except for these rows, never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it would be touched
    step, idx = 2**29 + 64, torch.tensor([[5, 1]])  # so that row 4 stays, row 5 is chosen, and both lie beyond 2^31
    op, args = build(name, (1, 6, 8, 2), torch.float16, grad=False)
    args = [idx if isinstance(x, torch.Tensor) and x.dtype == torch.int64 else x for x in args]
    tokens = [isinstance(x, torch.Tensor) and x.shape == (1, 6, 8) for x in args]
    apart = [
        torch.empty(5 * step + 8, dtype=x.dtype).as_strided(x.shape, (0, step, 1)).copy_(x) if is_tokens else x
        for x, is_tokens in zip(args, tokens, strict=True)
    ]
    found, expected = getattr(ops, op)(*apart), getattr(ops, op)(*args)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_other_dtypes_go_through_torch(dtype):
    x = torch.randint(0, 2, (1, 3, 2)).to(dtype)
    assert torch.equal(gather_tokens(x, torch.tensor([[2, 0]])), x[:, [2, 0]])


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op, args = build(name, (2, 5, 6, 3), torch.float32)
    torch.library.opcheck(getattr(ops, op), args)
