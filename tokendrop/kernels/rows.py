"""Rows of tokens moved into and out of compact form: what is public, and what it refuses.

CPU tensors go through plain torch, which `torch.compile` can fuse; CUDA and ROCm tensors through the Triton ops of
`ops.py`; TOKENDROP_KERNELS=torch or triton decides otherwise. Index values are looked at where that costs no
synchronisation, so on the CPU; under TOKENDROP_DEBUG=1 on every device, and whether they are unique.
Shape letters: B batch, T tokens, K kept, D hidden, R rotary width.
"""

import os

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from tokendrop.errors import LayoutError, LayoutTypeError
from tokendrop.kernels import ops, reference


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
    return ops.gather(x, idx, None) if ops.uses_triton(x) else reference.gather(x, idx)


def scatter_tokens(full: Tensor, kept: Tensor, idx: Tensor, valid: Tensor | None = None) -> Tensor:
    """`full` with rows `idx` of each sample replaced by `kept`.

    y[b, idx[b, k]] = kept[b, k] where valid[b, k], and y = full elsewhere

    Args:
        full: (B, T, D).
        kept: (B, K, D), the dtype of `full`.
        idx: (B, K) int64, in [0, T), unique in each sample.
        valid: (B, K) bool, False for rows of `kept` that only fill up; None for none.

    Returns:
        (B, T, D); the gradient for the replaced rows of `full` is zero, and for the rows of `kept` that are not valid.

    Raises:
        LayoutTypeError: `idx` is not int64, `kept` has another dtype than `full`, or `valid` is not bool.
        LayoutError: shapes that do not fit, or an index outside [0, T), looked at on the CPU only.

    Example:
        >>> scatter_tokens(torch.zeros(1, 3, 1), torch.ones(1, 1, 1), torch.tensor([[1]])).flatten().tolist()
        [0.0, 1.0, 0.0]

    Source: ours.
    """
    _check(full, idx)
    _check_rows("kept", kept, full, idx)
    if valid is not None:
        _check_shape("valid", valid, tuple(idx.shape))
        if valid.dtype != torch.bool:
            raise LayoutTypeError(f"valid: expected bool; found {valid.dtype}")
    run = ops.select if ops.uses_triton(full) else reference.select
    return run(full, kept, idx, valid, full.shape[1])


def merge_tokens(x: Tensor, into: Tensor, weight: Tensor) -> Tensor:
    """Tokens that leave, added to those that stay.

    y[b, t] = sum over u with into[b, u] = t of weight[b, u] x[b, u] where into[b, t] = t, and y = x elsewhere

    Args:
        x: (B, T, D); sums are in fp32, or fp64 for fp64.
        into: (B, T) int64, in [0, T), the token that each is added to; itself where it stays.
        weight: (B, T) float.

    Returns:
        (B, T, D).

    Raises:
        LayoutTypeError: `into` is not int64.
        LayoutError: shapes that do not fit, or an index outside [0, T), looked at on the CPU only.

    Example:
        >>> into, weight = torch.tensor([[0, 1, 0]]), torch.tensor([[0.5, 1.0, 0.5]])
        >>> merge_tokens(torch.tensor([[[2.0], [3.0], [4.0]]]), into, weight).flatten().tolist()
        [3.0, 3.0, 4.0]

    Source: ours.
    """
    _check(x, into, several=True)
    _check_shape("weight", weight, x.shape[:2])
    parts = (x.to(torch.promote_types(x.dtype, torch.float32)) * weight[:, :, None]).flatten(0, 1)
    at = torch.arange(into.numel(), device=x.device).view(into.shape)
    target = at - at[:1] + into
    sums = torch.zeros_like(parts).index_put((target.flatten(),), parts, accumulate=True).view(x.shape)
    return sums.to(x.dtype).where((target == at)[:, :, None], x)


def gather_rotary(cos: Tensor, sin: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `idx` of the rotary tables, both at once.

    y_cos[b, k] = cos[b, idx[b, k]], and the same for sin; tables of one sample serve all

    Args:
        cos: (B, T, R) or (1, T, R).
        sin: as `cos`.
        idx: (B, K) int64, in [0, T), unique in each sample where a gradient is asked for.

    Returns:
        (B, K, R), twice.

    Raises:
        LayoutTypeError: `idx` is not int64, or `sin` has another dtype than `cos`.
        LayoutError: shapes that do not fit, or an index outside [0, T), looked at on the CPU only.

    Example:
        >>> table = torch.arange(3.0).view(1, 3, 1)
        >>> cos, sin = gather_rotary(table, -table, torch.tensor([[2], [1]]))
        >>> cos.flatten().tolist(), sin.flatten().tolist()
        ([2.0, 1.0], [-2.0, -1.0])

    Source: ours.
    """
    _check(cos, idx, shared=True, several=not any(getattr(one, "requires_grad", False) for one in (cos, sin)))
    _check_shape("sin", sin, tuple(cos.shape))
    if sin.dtype != cos.dtype:
        raise LayoutTypeError(f"sin: expected {cos.dtype} as cos; found {sin.dtype}")
    return ops.gather_rotary(cos, sin, idx) if ops.uses_triton(cos) else reference.gather_rotary(cos, sin, idx)


def _check(x: Tensor, idx: Tensor, shared: bool = False, several: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise LayoutTypeError(f"expected a (B, T, D) tensor of rows; found {x!r}")
    if not isinstance(idx, Tensor) or idx.dtype != torch.int64:
        raise LayoutTypeError(f"idx: expected int64; found {getattr(idx, 'dtype', type(idx).__name__)}")
    fits = x.dim() == 3 and idx.dim() == 2 and idx.shape[1] <= x.shape[1]
    if not fits or not (len(x) == len(idx) or (shared and len(x) == 1)):
        raise LayoutError(
            f"expected rows (B, T, D) and indices (B, K) with K <= T; found {tuple(x.shape)} and {tuple(idx.shape)}"
        )
    if idx.device != x.device:
        raise LayoutError(f"idx: expected the device of the rows, {x.device}; found {idx.device}")
    if idx.numel() and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor):
        _check_values(idx, x.shape[1], several)


def _check_values(idx: Tensor, tokens: int, several: bool) -> None:
    debug = os.environ.get("TOKENDROP_DEBUG") == "1" and idx.device.type != "meta"
    # Elsewhere the values cost a synchronisation to look at.
    if idx.device.type == "cpu" or debug:
        low, high = idx.aminmax()
        if low < 0 or high >= tokens:
            raise LayoutError(f"idx: expected indices from 0 to {tokens - 1}; found {int(low)} to {int(high)}")
    if debug and not several:
        ordered = idx.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
        if len(twice):
            sample, at = twice[0].tolist()
            row = int(ordered[sample, at])
            raise LayoutError(f"idx: expected each row of a sample once; found row {row} twice in sample {sample}")


def _check_rows(name: str, rows: Tensor, full: Tensor, idx: Tensor) -> None:
    if not isinstance(rows, Tensor):
        raise LayoutTypeError(f"{name}: expected a tensor; found {rows!r}")
    if rows.device != full.device:
        raise LayoutError(f"{name}: expected the device of full, {full.device}; found {rows.device}")
    if rows.dtype != full.dtype:
        raise LayoutTypeError(f"{name}: expected {full.dtype} as full; found {rows.dtype}")
    if rows.shape != (*idx.shape, full.shape[-1]):
        expected = (*idx.shape, full.shape[-1])
        raise LayoutError(f"{name}: expected {expected} from idx and full; found {tuple(rows.shape)}")


def _check_shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise LayoutTypeError(f"{name}: expected a tensor of shape {expected}; found {x!r}")
    if x.shape != expected:
        raise LayoutError(f"{name}: expected {expected}; found {tuple(x.shape)}")
