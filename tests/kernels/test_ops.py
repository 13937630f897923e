"""The row ops as torch ops: gradients of each alone, fakes, compile, FLOPs, what they keep, and which code they run."""

import pytest
import torch
from kernel_cases import OPS, assert_same, build, results
from torch.utils.flop_counter import FlopCounterMode

from tokendrop import UnsupportedError, gather_tokens
from tokendrop.kernels import ops, reference

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 2), (2, 4, 3, 4), (2, 3, 2, 0)]
HALF = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("where", [reference, ops], ids=["reference", "op"])
def test_gradcheck(where, name, shape):
    op, args = build(name, shape)
    run = getattr(where, op)
    if shape[3] or op == "select":
        assert torch.autograd.gradcheck(run, args)
    if op in ("gather", "select") and shape[3]:
        assert torch.autograd.gradgradcheck(run, args)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_gradient_formulas_against_autograd(name, dtype):
    assert_same(*build(name, (2, 7, 5, 4), dtype), HALF[dtype])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck(name, shape):
    op, args = build(name, shape, torch.float32)
    torch.library.opcheck(getattr(ops, op), args)


@pytest.mark.parametrize("name", OPS)
def test_compiles_in_one_graph(name):
    op, args = build(name, (2, 6, 4, 3), torch.float32)
    torch._dynamo.reset()  # all ops are called through one line of torch, which may compile eight times

    class Compiled:
        pass

    setattr(Compiled, op, staticmethod(torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")))
    for found, expected in zip(results(Compiled, op, args), results(ops, op, args), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", OPS)
def test_no_flops(name):
    op, args = build(name, (2, 6, 4, 3))
    with FlopCounterMode(display=False) as counter:
        results(ops, op, args)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("name", OPS)
def test_what_is_kept_for_the_backward(name):
    op, args = build(name, (2, 6, 4, 3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        getattr(ops, op)(*args)
    # Of what a copy keeps, only indices.
    assert all(x.shape == (2, 3) and not x.is_floating_point() for x in kept)


def test_neither_full_nor_kept():
    with pytest.raises(ValueError, match="found None for both"):
        reference.select(None, None, torch.tensor([[0]]), None, 1)


def test_the_cpu_runs_torch(monkeypatch):
    monkeypatch.delenv("TOKENDROP_KERNELS", raising=False)
    x, idx = torch.zeros(1, 2, 3, device="cpu"), torch.tensor([[1]], device="cpu")
    assert not ops.uses_triton(x)
    assert "IndexSelect" in str(gather_tokens(x.requires_grad_(), idx).grad_fn.next_functions)


@pytest.mark.parametrize("choice", ["cuda", "Triton", "1"])
def test_no_such_kernels(monkeypatch, choice):
    monkeypatch.setenv("TOKENDROP_KERNELS", choice)
    with pytest.raises(UnsupportedError, match=f"TOKENDROP_KERNELS: expected torch or triton; found '{choice}'"):
        gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[1]]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_triton_where_there_is_none(monkeypatch, device):
    monkeypatch.setenv("TOKENDROP_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, idx = torch.zeros(1, 2, 3, device=device), torch.zeros(1, 1, dtype=torch.long, device=device)
    with pytest.raises(UnsupportedError, match=f"tensor on '{device}'.*TRITON_INTERPRET=1"):
        gather_tokens(x, idx)


@pytest.mark.parametrize("choice", ["torch", ""])
def test_torch_by_choice(monkeypatch, choice):
    monkeypatch.setenv("TOKENDROP_KERNELS", choice)
    assert not ops.uses_triton(torch.zeros(1, device="cpu"))
