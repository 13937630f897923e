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


def gather_rotary(cos: Tensor, sin: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin at b, idx[b, k]; a batch of one serves every sample."""
    shape = (*idx.shape, cos.shape[-1])
    idx = idx.reshape(len(cos), -1)
    return gather(cos, idx).view(shape), gather(sin, idx).view(shape)


def _flat(idx: Tensor, tokens: int) -> Tensor:
    offset = torch.arange(len(idx), device=idx.device)[:, None] * tokens
    return (idx + offset).reshape(-1)
