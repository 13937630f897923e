"""Arguments for every row op, and what comes out of it and of its gradient."""

import torch

from tokendrop.kernels import ops, reference

OPS = ("gather", "gather valid", "select", "select valid", "place", "clear", "rotary", "rotary shared")


def build(name, shape, dtype=torch.float64, seed=0, device="cpu", grad=True):
    """The op's name and its arguments for a (batch, tokens, width, count) problem."""
    batch, tokens, width, count = shape
    generator = torch.Generator().manual_seed(seed)

    def rows(*sizes):
        return torch.randn(*sizes, generator=generator).to(device, dtype).requires_grad_(grad)

    order = torch.rand(batch, tokens, generator=generator).argsort(1)
    idx = order[:, :count].contiguous().to(device)
    valid = (torch.rand(batch, count, generator=generator) < 0.6).to(device)
    full, kept = rows(batch, tokens, width), rows(batch, count, width)
    cos, sin, shared_cos, shared_sin = (rows(size, tokens, width) for size in (batch, batch, 1, 1))
    return {
        "gather": ("gather", (full, idx, None)),
        "gather valid": ("gather", (full, idx, valid)),
        "select": ("select", (full, kept, idx, None, tokens)),
        "select valid": ("select", (full, kept, idx, valid, tokens)),
        "place": ("select", (None, kept, idx, valid, tokens)),
        "clear": ("select", (full, None, idx, valid, tokens)),
        "rotary": ("gather_rotary", (cos, sin, idx)),
        "rotary shared": ("gather_rotary", (shared_cos, shared_sin, idx)),
    }[name]


def results(where, op, args, seed=0):
    """Outputs of `op` in module `where`, and the gradients of its differentiable arguments."""
    generator = torch.Generator().manual_seed(seed)
    out = getattr(where, op)(*args)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    outs = [y for y in out if y.requires_grad]
    inputs = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    if not outs or not inputs:
        return out
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outs]
    return [*out, *torch.autograd.grad(outs, inputs, upstream)]


def assert_same(op, args, rtol, seed=0):
    """The op against the reference: the same bits where rows are only copied, else to `rtol`."""
    found, expected = results(ops, op, args, seed), results(reference, op, args, seed)
    assert len(found) == len(expected)
    for y, wanted in zip(found, expected, strict=True):
        assert (y.shape, y.dtype, y.device) == (wanted.shape, wanted.dtype, wanted.device)
        if op in ("gather", "select") or (op == "gather_rotary" and len(args[0]) == len(args[2])):
            assert torch.equal(y, wanted)
        else:
            # Sums cancel, so that errors are judged by the size of what was summed.
            atol = rtol * float(wanted.detach().abs().max()) if wanted.numel() else 0.0
            torch.testing.assert_close(y, wanted, rtol=rtol, atol=atol)
