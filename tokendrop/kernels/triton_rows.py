"""The row operations in Triton, one pass over memory each, with their launchers.

A program copies a tile of ROWS rows of one sample by COLS of their D columns. Offsets are int64: B * T * D may exceed
2^31. Arithmetic is in fp32. Rows may have any batch and token stride; columns are made contiguous first.
Shape letters: B batch, T tokens, K kept, D hidden.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Any = triton.jit  # as it is typed, a kernel could not call another
TILE = 2048  # elements; 4 warps then move 16 bytes a thread, twice for 16-bit and four times for 32-bit types


@jit
def _tile(count, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sample, rows and columns of this program, and which of them there are."""
    blocks = tl.cdiv(count, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    return b, r, d[None, :], (r < count)[:, None] & (d < width)[None, :]


@jit
def gather_kernel(
    x, idx, valid, y, count, width, x_batch, x_token, MASKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """y[b, k] = x[b, idx[b, k]], and 0 where not valid[b, k]."""
    b, k, d, inside = _tile(count, width, ROWS, COLS)
    token = tl.load(idx + b * count + k, mask=k < count, other=0)[:, None]
    wanted = inside
    if MASKED:
        wanted = inside & (tl.load(valid + b * count + k, mask=k < count, other=0) != 0)[:, None]
    rows = tl.load(x + b * x_batch + token * x_token + d, mask=wanted, other=0.0)
    tl.store(y + (b * count + k)[:, None] * width + d, rows, mask=inside)


@jit
def gather_rotary_kernel(
    cos, sin, idx, y_cos, y_sin, count, width,
    cos_batch, cos_token, sin_batch, sin_token, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y_cos[b, k] = cos[b, idx[b, k]], and the same for sin."""
    b, k, d, inside = _tile(count, width, ROWS, COLS)
    token = tl.load(idx + b * count + k, mask=k < count, other=0)[:, None]
    out = (b * count + k)[:, None] * width + d
    tl.store(y_cos + out, tl.load(cos + b * cos_batch + token * cos_token + d, mask=inside, other=0.0), mask=inside)
    tl.store(y_sin + out, tl.load(sin + b * sin_batch + token * sin_token + d, mask=inside, other=0.0), mask=inside)


@jit
def select_kernel(
    full, kept, source, y, tokens, width, full_batch, full_token, kept_batch, kept_token,
    FULL: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y[b, t] = kept[b, source[b, t]] where source >= 0, and full[b, t] elsewhere; 0 for what is not there."""
    b, t, d, inside = _tile(tokens, width, ROWS, COLS)
    k = tl.load(source + b * tokens + t, mask=t < tokens, other=-1).to(tl.int64)[:, None]
    rows = tl.full((ROWS, COLS), 0, y.dtype.element_ty)
    if FULL:
        at = b * full_batch + t.to(tl.int64)[:, None] * full_token
        rows = tl.load(full + at + d, mask=inside & (k < 0), other=0.0)
    if KEPT:
        new = tl.load(kept + b * kept_batch + k * kept_token + d, mask=inside & (k >= 0), other=0.0)
        rows = tl.where(k >= 0, new, rows)
    tl.store(y + (b * tokens + t)[:, None] * width + d, rows, mask=inside)


def gather(x: Tensor, idx: Tensor, valid: Tensor | None) -> Tensor:
    x, y = columns(x), x.new_empty(*idx.shape, x.shape[-1])
    mask = idx if valid is None else valid.contiguous()
    sizes = (idx.shape[1], x.shape[2], *x.stride()[:2])
    _over_rows(gather_kernel, y, x, idx.contiguous(), mask, y, *sizes, MASKED=valid is not None)
    return y


def gather_rotary(cos: Tensor, sin: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (columns(x).expand(len(idx), -1, -1) for x in (cos, sin))  # a batch of one has stride 0 then
    y_cos, y_sin = (x.new_empty(*idx.shape, x.shape[-1]) for x in (cos, sin))
    sizes = (idx.shape[1], cos.shape[2], *cos.stride()[:2], *sin.stride()[:2])
    _over_rows(gather_rotary_kernel, y_cos, cos, sin, idx.contiguous(), y_cos, y_sin, *sizes)
    return y_cos, y_sin


def select(full: Tensor | None, kept: Tensor | None, idx: Tensor, valid: Tensor | None, tokens: int) -> Tensor:
    some = full if full is not None else kept
    if some is None:
        raise ValueError("select: expected full or kept; found None for both")
    old, new = (columns(some if x is None else x) for x in (full, kept))  # a pointer that is not read may be any
    y = some.new_empty(len(idx), tokens, some.shape[-1])
    sizes = (tokens, y.shape[2], *old.stride()[:2], *new.stride()[:2])
    has = {"FULL": full is not None, "KEPT": kept is not None}
    _over_rows(select_kernel, y, old, new, _source(idx, valid, tokens), y, *sizes, **has)
    return y


def columns(x: Tensor) -> Tensor:
    """`x` with its columns next to each other, copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def power_of_2(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _source(idx: Tensor, valid: Tensor | None, tokens: int) -> Tensor:
    """(B, T) int32: which kept row a token takes, -1 for none. It makes one pass over the rows enough."""
    kept = torch.arange(idx.shape[1], dtype=torch.int32, device=idx.device).expand_as(idx)
    kept = kept if valid is None else kept.masked_fill(~valid, -1)
    return torch.full((len(idx), tokens), -1, dtype=torch.int32, device=idx.device).scatter_(1, idx, kept)


def _over_rows(kernel: Any, y: Tensor, *arguments: Any, **options: Any) -> None:
    cols = min(power_of_2(y.shape[2]), TILE)
    rows = TILE // cols
    grid = (len(y) * -(-y.shape[1] // rows), -(-y.shape[2] // cols))
    launch(kernel, grid, y, *arguments, ROWS=rows, COLS=cols, **options)


def launch(kernel: Any, grid: tuple[int, ...], y: Tensor, *arguments: Any, **options: Any) -> None:
    """Run `kernel` on the device of its output `y`, unless there is nothing to compute."""
    if y.numel():
        with torch.cuda.device_of(y):
            # Said, because Triton 3.10 changes its default and 3.9 warns of that.
            kernel[grid](*arguments, enable_fp_fusion=True, **options)
