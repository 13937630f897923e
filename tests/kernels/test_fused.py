"""The fused row operations and the masked scatter as they are public: what they compute and what they refuse."""

import pytest
import torch
from torch.nn import functional as F

from tokendrop import LayoutError, LayoutTypeError, gather_tokens, scatter_tokens
from tokendrop.kernels import gather_rms_norm, gather_rotary, scatter_add_tokens

IDX = torch.tensor([[3, 0], [1, 4]])
AT = torch.tensor([[0], [1]])


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gather_rms_norm(dtype):
    x, weight = rows(2, 5, 6, dtype=dtype), rows(6)
    kept, y = gather_rms_norm(x, IDX, weight, 1e-5)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(kept, x[AT, IDX])
    torch.testing.assert_close(y, F.rms_norm(x[AT, IDX].to(wide), (6,), weight.to(wide), 1e-5).to(dtype))


@pytest.mark.parametrize("scaled", [False, True])
def test_scatter_add_tokens(scaled):
    full, update, scale = rows(2, 5, 6), rows(2, 2, 6), rows(2, 2)
    expected = full.clone()
    expected[AT, IDX] += update * scale[:, :, None] if scaled else update
    torch.testing.assert_close(scatter_add_tokens(full, update, IDX, scale if scaled else None), expected)


def test_scatter_add_rounds_once():
    full, update = rows(2, 5, 6, dtype=torch.bfloat16), rows(2, 2, 6, dtype=torch.bfloat16)
    scale = rows(2, 2)
    expected = (full[AT, IDX].double() + update.double() * scale.double()[:, :, None]).float().bfloat16()
    assert torch.equal(scatter_add_tokens(full, update, IDX, scale)[AT, IDX], expected)


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


X, KEPT, INT = torch.zeros(2, 5, 6), torch.zeros(2, 2, 6), torch.zeros(2, 5, 6).long()
REFUSED = {
    "valid shape": (scatter_tokens, (X, KEPT, IDX, torch.ones(2, 3).bool()), LayoutError, r"valid: .*\(2, 3\)"),
    "valid dtype": (scatter_tokens, (X, KEPT, IDX, torch.ones(2, 2)), LayoutTypeError, "valid: .*float32"),
    "update shape": (scatter_add_tokens, (X, KEPT[:, :1], IDX), LayoutError, r"update: expected \(2, 2, 6\)"),
    "update dtype": (scatter_add_tokens, (X, KEPT.double(), IDX), LayoutTypeError, "update: .*float64"),
    "full dtype": (scatter_add_tokens, (INT, KEPT.long(), IDX), LayoutTypeError, "full: .*int64"),
    "scale shape": (scatter_add_tokens, (X, KEPT, IDX, torch.ones(2)), LayoutError, r"scale: .*found \(2,\)"),
    "scale dtype": (scatter_add_tokens, (X, KEPT, IDX, IDX), LayoutTypeError, "scale: .*int64"),
    "x dtype": (gather_rms_norm, (INT, IDX, torch.ones(6)), LayoutTypeError, "x: .*int64"),
    "weight shape": (gather_rms_norm, (X, IDX, torch.ones(5)), LayoutError, r"weight: expected \(6,\); found \(5,\)"),
    "weight dtype": (gather_rms_norm, (X, IDX, torch.ones(6).long()), LayoutTypeError, "weight: .*int64"),
    "sin shape": (gather_rotary, (X, X[:1], IDX), LayoutError, r"sin: expected \(2, 5, 6\); found \(1, 5, 6\)"),
    "sin dtype": (gather_rotary, (X, X.double(), IDX), LayoutTypeError, "sin: .*float32 as cos; found .*float64"),
    "batch": (gather_rotary, (X[:1].expand(3, -1, -1), X, IDX), LayoutError, r"found \(3, 5, 6\) and \(2, 2\)"),
    "a gather's batch": (gather_rms_norm, (X[:1], IDX, torch.ones(6)), LayoutError, r"found \(1, 5, 6\)"),
    "idx dtype": (gather_rotary, (X, X, IDX.int()), LayoutTypeError, "idx: expected int64"),
    "idx values": (scatter_add_tokens, (X, KEPT, IDX + 1), LayoutError, "from 0 to 4; found 1 to 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    run, args, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        run(*args)


@pytest.mark.parametrize("run", [gather_tokens, lambda x, idx: scatter_add_tokens(x, KEPT, idx)])
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
    x, kept, weight = rows(2, 5, 6).requires_grad_(), rows(2, 2, 6), rows(6)

    def run(x):
        kept_rows, y = gather_rms_norm(x, IDX, weight)
        cos, sin = gather_rotary(x[:1], x[1:], IDX)
        out = scatter_add_tokens(scatter_tokens(x, kept, IDX, IDX > 0), y * cos + sin, IDX, kept[:, :, 0])
        return (out + gather_tokens(x, IDX).sum() + kept_rows.sum()).square().sum()

    (expected,) = torch.autograd.grad(run(x), x)
    (found,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend=backend)(x), x)
    torch.testing.assert_close(found, expected)
