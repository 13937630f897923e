"""The compiled Triton kernels against the torch reference on the same device."""

import pytest
import torch
from kernel_cases import OPS, assert_same, build

from tokendrop import LayoutError, gather_tokens, scatter_tokens
from tokendrop.kernels import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(2, 5, 33, 0), (2, 5, 33, 1), (2, 5, 33, 5), (3, 1000, 512, 250), (1, 70, 4096, 64), (2, 9, 2050, 4)]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_reference(name, shape, dtype):
    op, args = build(name, shape, dtype, device="cuda")
    rows = next(x for x in args if x is not None)
    assert ops.uses_triton(rows)
    assert_same(op, args, TOLERANCE[dtype])


@pytest.mark.parametrize("name", OPS)
def test_not_contiguous(name):
    op, args = build(name, (3, 6, 16, 3), torch.float32, device="cuda", grad=False)
    args = [x.transpose(0, 1).contiguous().transpose(0, 1) if getattr(x, "ndim", 0) > 1 else x for x in args]
    assert_same(op, args, 1e-5)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op, args = build(name, (2, 5, 6, 3), torch.float32, device="cuda")
    torch.library.opcheck(getattr(ops, op), args)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("name", OPS)
def test_inductor(name):
    op, args = build(name, (2, 6, 8, 3), torch.float32, device="cuda")
    torch._dynamo.reset()  # all ops are called through one line of torch, which may compile eight times
    run = torch.compile(getattr(ops, op), fullgraph=True)
    torch.testing.assert_close(run(*args), getattr(ops, op)(*args))


def test_more_than_2_to_the_31_elements():
    tokens, width = 2**19 + 8, 4096
    if torch.cuda.mem_get_info()[0] < 4 * tokens * width * 2:
        pytest.skip("needs 18 GB of device memory")
    full = torch.zeros(1, tokens, width, dtype=torch.bfloat16, device="cuda")
    idx = torch.tensor([[tokens - 1, 3]], device="cuda")
    kept = torch.randn(1, 2, width, device="cuda").bfloat16()
    y = scatter_tokens(full, kept, idx)
    assert torch.equal(gather_tokens(y, idx), kept)
    assert torch.equal(y[0, idx[0]], kept[0])
    assert not y[0, 4 : tokens - 1].any()


def test_indices_are_looked_at_on_request(monkeypatch):
    x = torch.zeros(1, 3, 2, device="cuda")
    monkeypatch.setenv("TOKENDROP_DEBUG", "1")
    for idx, message in (([[3]], "found 3 to 3"), ([[1, 1]], "row 1 twice")):
        with pytest.raises(LayoutError, match=message):
            gather_tokens(x, torch.tensor(idx, device="cuda"))


def test_torch_by_choice(monkeypatch):
    monkeypatch.setenv("TOKENDROP_KERNELS", "torch")
    op, args = build("gather", (2, 5, 6, 3), torch.float32, device="cuda")
    assert ops._implementation(args[0], op) is reference.gather
    assert_same(op, args, 0.0)
