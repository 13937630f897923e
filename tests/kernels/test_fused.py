"""The rotary gather and the masked scatter as they are public: what they compute and what they refuse."""

import pytest
import torch

from tokendrop import LayoutError, LayoutTypeError, gather_tokens, scatter_tokens
from tokendrop.kernels import gather_rotary

IDX = torch.tensor([[3, 0], [1, 4]])
AT = torch.tensor([[0], [1]])


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("batch", [1, 2])
def test_gather_rotary(batch):
    cos, sin = rows(batch, 5, 4), rows(batch, 5, 4)
    for found, table in zip(gather_rotary(cos, sin, IDX), (cos, sin), strict=True):
        assert torch.equal(found, table.expand(2, -1, -1)[AT, IDX])


def test_rows_that_are_not_valid_keep_full():
    full, kept = rows(2, 5, 6).requires_grad_(), rows(2, 2, 6).requires_grad_()
    valid = torch.tensor([[True, False], [False, True]])
    y = scatter_tokens(full, kept, IDX, valid)
    assert torch.equal(y, scatter_tokens(full, torch.where(valid[:, :, None], kept, gather_tokens(full, IDX)), IDX))
    y.sum().backward()
    assert torch.equal(kept.grad, valid[:, :, None].float().expand(-1, -1, 6))
    replaced = torch.zeros(2, 5).scatter(1, IDX, valid.float())
    assert torch.equal(full.grad, (1 - replaced)[:, :, None].expand(-1, -1, 6))


X, KEPT = torch.zeros(2, 5, 6), torch.zeros(2, 2, 6)
REFUSED = {
    "valid shape": (scatter_tokens, (X, KEPT, IDX, torch.ones(2, 3).bool()), LayoutError, r"valid: .*\(2, 3\)"),
    "valid dtype": (scatter_tokens, (X, KEPT, IDX, torch.ones(2, 2)), LayoutTypeError, "valid: .*float32"),
    "sin shape": (gather_rotary, (X, X[:1], IDX), LayoutError, r"sin: expected \(2, 5, 6\); found \(1, 5, 6\)"),
    "sin dtype": (gather_rotary, (X, X.double(), IDX), LayoutTypeError, "sin: .*float32 as cos; found .*float64"),
    "batch": (gather_rotary, (X[:1].expand(3, -1, -1), X, IDX), LayoutError, r"found \(3, 5, 6\) and \(2, 2\)"),
    "idx dtype": (gather_rotary, (X, X, IDX.int()), LayoutTypeError, "idx: expected int64"),
    "idx values": (scatter_tokens, (X, KEPT, IDX + 1), LayoutError, "from 0 to 4; found 1 to 5"),
}


@pytest.mark.usefixtures("values_are_looked_at")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    run, args, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run(*args)


@pytest.mark.parametrize("run", [gather_tokens, lambda x, idx: scatter_tokens(x, KEPT, idx)])
def test_rows_that_come_twice(monkeypatch, run):
    twice = torch.tensor([[0, 1], [4, 4]])
    run(X, twice)
    monkeypatch.setenv("TOKENDROP_DEBUG", "1")
    run(X, IDX)
    with pytest.raises(LayoutError, match="found row 4 twice in sample 1"):
        run(X, twice)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_public_functions_compile_in_one_graph(backend):
    x, kept = rows(2, 5, 6).requires_grad_(), rows(2, 2, 6)

    def run(x):
        cos, sin = gather_rotary(x[:1], x[1:], IDX)
        out = scatter_tokens(x, kept * cos + sin, IDX, IDX > 0)
        return (out + gather_tokens(x, IDX).sum()).square().sum()

    (expected,) = torch.autograd.grad(run(x), x)
    (found,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend=backend)(x), x)
    torch.testing.assert_close(found, expected)
