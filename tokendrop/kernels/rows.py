"""Gather and scatter of token rows, in torch.

Shape letters: B batch, T tokens, K kept, D hidden.
"""

import torch
from torch import Tensor

from tokendrop.errors import LayoutError, LayoutTypeError


def gather_tokens(x: Tensor, idx: Tensor) -> Tensor:
    """Rows `idx` of each sample.

    y[b, k] = x[b, idx[b, k]]

    Args:
        x: (B, T, D), any dtype.
        idx: (B, K) int64, in [0, T), unique in each sample.

    Returns:
        (B, K, D); the gradient of a row that is not kept is zero.

    Raises:
        LayoutTypeError: `idx` is not int64.
        LayoutError: shapes that do not fit, or an index outside [0, T), looked at on the CPU only.

    Example:
        >>> gather_tokens(torch.arange(6.0).view(1, 3, 2), torch.tensor([[0, 2]])).tolist()
        [[[0.0, 1.0], [4.0, 5.0]]]

    Source: ours.
    """
    _check(x, idx)
    return x.reshape(-1, x.shape[-1]).index_select(0, _flat(idx, x.shape[1])).view(*idx.shape, x.shape[-1])


def scatter_tokens(full: Tensor, kept: Tensor, idx: Tensor) -> Tensor:
    """`full` with rows `idx` of each sample replaced by `kept`.

    y[b, idx[b, k]] = kept[b, k], and y = full elsewhere

    Args:
        full: (B, T, D).
        kept: (B, K, D), the dtype of `full`.
        idx: (B, K) int64, in [0, T), unique in each sample.

    Returns:
        (B, T, D); the gradient for the replaced rows of `full` is zero.

    Raises:
        LayoutTypeError: `idx` is not int64, or `kept` has another dtype than `full`.
        LayoutError: shapes that do not fit, or an index outside [0, T), looked at on the CPU only.

    Example:
        >>> scatter_tokens(torch.zeros(1, 3, 1), torch.ones(1, 1, 1), torch.tensor([[1]])).flatten().tolist()
        [0.0, 1.0, 0.0]

    Source: ours.
    """
    _check(full, idx)
    if kept.dtype != full.dtype:
        raise LayoutTypeError(f"kept: expected {full.dtype} as full; found {kept.dtype}")
    if kept.shape != (*idx.shape, full.shape[-1]):
        raise LayoutError(f"kept: expected {(*idx.shape, full.shape[-1])} from idx and full; found {tuple(kept.shape)}")
    rows = full.reshape(-1, full.shape[-1])
    return rows.index_copy(0, _flat(idx, full.shape[1]), kept.reshape(-1, full.shape[-1])).view(full.shape)


def _check(x: Tensor, idx: Tensor) -> None:
    if not isinstance(idx, Tensor) or idx.dtype != torch.int64:
        raise LayoutTypeError(f"idx: expected int64; found {getattr(idx, 'dtype', type(idx).__name__)}")
    if x.dim() != 3 or idx.dim() != 2 or len(x) != len(idx) or idx.shape[1] > x.shape[1]:
        raise LayoutError(
            f"expected rows (B, T, D) and indices (B, K) with K <= T; found {tuple(x.shape)} and {tuple(idx.shape)}"
        )
    # Elsewhere the values cost a synchronisation to look at.
    if idx.device.type == "cpu" and idx.numel() and not torch.compiler.is_compiling():
        low, high = idx.aminmax()
        if low < 0 or high >= x.shape[1]:
            raise LayoutError(f"idx: expected indices from 0 to {x.shape[1] - 1}; found {int(low)} to {int(high)}")


def _flat(idx: Tensor, tokens: int) -> Tensor:
    offset = torch.arange(len(idx), device=idx.device)[:, None] * tokens
    return (idx + offset).reshape(-1)
