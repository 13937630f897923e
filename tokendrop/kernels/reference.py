"""The row operations in plain torch: what the Triton kernels must equal, and what runs on the CPU.

Nothing is checked here; `rows.py` does. Sums are in fp32, or fp64 for fp64, and rounded once.
Shape letters: B batch, T tokens, K kept, D hidden.
"""

import torch
from torch import Tensor


def gather(x: Tensor, idx: Tensor, valid: Tensor | None = None) -> Tensor:
    """y[b, k] = x[b, idx[b, k]], and 0 where not valid[b, k]."""
    y = x.reshape(-1, x.shape[-1]).index_select(0, _flat(idx, x.shape[1])).view(*idx.shape, x.shape[-1])
    return y if valid is None else y.masked_fill(~valid[:, :, None], 0)


def select(full: Tensor | None, kept: Tensor | None, idx: Tensor, valid: Tensor | None, tokens: int) -> Tensor:
    """y[b, idx[b, k]] = kept[b, k] where valid[b, k], and y = full elsewhere; None stands for zeros."""
    some = full if full is not None else kept
    if some is None:
        raise ValueError("select: expected full or kept; found None for both")
    full = some.new_zeros(len(idx), tokens, some.shape[-1]) if full is None else full
    kept = some.new_zeros(*idx.shape, some.shape[-1]) if kept is None else kept
    if valid is not None:
        kept = torch.where(valid[:, :, None], kept, gather(full, idx))
    rows = full.reshape(-1, full.shape[-1])
    # index_copy would keep its source for the backward.
    return rows.index_put((_flat(idx, tokens),), kept.reshape(-1, full.shape[-1])).view(full.shape)


def scatter_add(full: Tensor, update: Tensor, idx: Tensor, scale: Tensor | None) -> Tensor:
    """y = full, then y[b, idx[b, k]] += scale[b, k] * update[b, k]."""
    update = _wide(update) if scale is None else _wide(update) * _wide(scale)[:, :, None]
    return select(full, (_wide(gather(full, idx)) + update).to(full.dtype), idx, None, full.shape[1])


def scatter_add_backward(grad: Tensor, update: Tensor, idx: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `update` (B, K, D) and `scale` (B, K)."""
    rows = _wide(gather(grad, idx))
    return (rows * _wide(scale)[:, :, None]).to(update.dtype), (rows * _wide(update)).sum(-1).to(scale.dtype)


def gather_rms_norm(x: Tensor, idx: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """rows = x[b, idx[b, k]], rows / sqrt(mean(rows^2) + eps) * weight, and the (B, K) factor 1 / sqrt(...)."""
    rows = gather(x, idx)
    wide = _wide(rows)
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    return rows, (wide * rstd[:, :, None] * _wide(weight)).to(x.dtype), rstd


def gather_rms_norm_backward(
    grad_rows: Tensor, grad_y: Tensor, rows: Tensor, idx: Tensor, weight: Tensor, rstd: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` (B, T, D) and `weight` (D,)."""
    normed = _wide(rows) * rstd[:, :, None]
    scaled = _wide(grad_y) * _wide(weight)
    grad = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd[:, :, None] + _wide(grad_rows)
    return select(None, grad.to(rows.dtype), idx, None, tokens), (_wide(grad_y) * normed).sum((0, 1)).to(weight.dtype)


def gather_rotary(cos: Tensor, sin: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin at b, idx[b, k]; a batch of one serves every sample."""
    shape = (*idx.shape, cos.shape[-1])
    idx = idx.reshape(len(cos), -1)
    return gather(cos, idx).view(shape), gather(sin, idx).view(shape)


def _flat(idx: Tensor, tokens: int) -> Tensor:
    offset = torch.arange(len(idx), device=idx.device)[:, None] * tokens
    return (idx + offset).reshape(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
