"""Arguments for every row op, and what comes out of it and of its gradient."""

import torch

from tokendrop.kernels import ops, reference

DIFFERENTIABLE = ("gather", "gather valid", "select", "select valid", "place", "clear",
                  "add", "add scaled", "norm", "rotary", "rotary shared")  # fmt: skip
BACKWARD = ("add backward", "norm backward")
OPS = (*DIFFERENTIABLE, *BACKWARD)


def build(name, shape, dtype=torch.float64, seed=0, device="cpu", grad=True):
    """The op's name and its arguments for a (batch, tokens, width, count) problem."""
    batch, tokens, width, count = shape
    generator = torch.Generator().manual_seed(seed)

    def rows(*sizes, dtype=dtype):
        return torch.randn(*sizes, generator=generator).to(device, dtype).requires_grad_(grad)

    order = torch.rand(batch, tokens, generator=generator).argsort(1)
    idx = order[:, :count].contiguous().to(device)
    valid = (torch.rand(batch, count, generator=generator) < 0.6).to(device)
    full, kept, weight = rows(batch, tokens, width), rows(batch, count, width), rows(width)
    cos, sin, shared_cos, shared_sin = (rows(size, tokens, width) for size in (batch, batch, 1, 1))
    wide = torch.promote_types(dtype, torch.float32)
    scale, factor = rows(batch, count), rows(batch, count, dtype=wide).detach().abs()
    return {
        "gather": ("gather", (full, idx, None)),
        "gather valid": ("gather", (full, idx, valid)),
        "select": ("select", (full, kept, idx, None, tokens)),
        "select valid": ("select", (full, kept, idx, valid, tokens)),
        "place": ("select", (None, kept, idx, valid, tokens)),
        "clear": ("select", (full, None, idx, valid, tokens)),
        "add": ("scatter_add", (full, kept, idx, None)),
        "add scaled": ("scatter_add", (full, kept, idx, scale)),
        "add backward": ("scatter_add_backward", (full, kept, idx, scale)),
        "norm": ("gather_rms_norm", (full, idx, weight, 1e-5)),
        "norm backward": ("gather_rms_norm_backward", (kept, kept * 2, kept + 1, idx, weight, factor, tokens)),
        "rotary": ("gather_rotary", (cos, sin, idx)),
        "rotary shared": ("gather_rotary", (shared_cos, shared_sin, idx)),
    }[name]


def results(where, op, args, seed=0):
    """Outputs of `op` in module `where`, and the gradients of its differentiable arguments."""
    generator = torch.Generator().manual_seed(seed)
    out = getattr(where, op)(*args)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    outs = [y for y in out if y.requires_grad and op != "gather_rms_norm"] or [y for y in out[:2] if y.requires_grad]
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
