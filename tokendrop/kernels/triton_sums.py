"""The row operations that sum over a row, in Triton: a program holds the row in registers and computes in fp32.

Shape letters: B batch, T tokens, K kept, D hidden.
"""

import torch
import triton.language as tl
from torch import Tensor

from tokendrop.kernels.triton_rows import columns, jit, launch, power_of_2

WARPS = 4096  # of the backward, whose programs each sum the weight's gradient over some rows: two waves on 132 units


@jit
def scatter_add_backward_kernel(
    grad, update, idx, scale, grad_update, grad_scale, count, width, grad_batch, grad_token, COLS: tl.constexpr
):
    """grad_update = scale * grad[b, idx[b, k]], and grad_scale = sum of grad[b, idx[b, k]] * update."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLS)
    inside = d < width
    row = grad + (i // count) * grad_batch + tl.load(idx + i) * grad_token
    wide = tl.load(row + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_update + i * width + d, wide * tl.load(scale + i).to(tl.float32), mask=inside)
    new = tl.load(update + i * width + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_scale + i, tl.sum(wide * new, 0))


@jit
def gather_rms_norm_kernel(x, idx, weight, rows, y, rstd, count, width, x_batch, x_token, eps, COLS: tl.constexpr):
    """rows = x[b, idx[b, k]], rstd = 1 / sqrt(mean(rows^2) + eps), y = rows * rstd * weight."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLS)
    inside = d < width
    row = tl.load(x + (i // count) * x_batch + tl.load(idx + i) * x_token + d, mask=inside, other=0.0)
    tl.store(rows + i * width + d, row, mask=inside)
    wide = row.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(rstd + i, factor)
    scaled = wide * factor * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i * width + d, scaled, mask=inside)


@jit
def gather_rms_norm_backward_kernel(
    grad_rows, grad_y, rows, idx, weight, rstd, grad_x, partial, total, count, tokens, width, COLS: tl.constexpr
):
    """Rows i, i + programs, ...: their gradients at grad_x[b, idx[b, k]], their sum for the weight in `partial`."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLS)
    inside = d < width
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    sums = tl.full((COLS,), 0.0, tl.float32)
    while i < total:
        factor = tl.load(rstd + i)
        normed = tl.load(rows + i * width + d, mask=inside, other=0.0).to(tl.float32) * factor
        grad = tl.load(grad_y + i * width + d, mask=inside, other=0.0).to(tl.float32)
        sums += grad * normed
        grad *= w
        out = (grad - normed * (tl.sum(grad * normed, 0) / width)) * factor
        out += tl.load(grad_rows + i * width + d, mask=inside, other=0.0).to(tl.float32)
        token = (i // count) * tokens + tl.load(idx + i)
        tl.store(grad_x + token * width + d, out, mask=inside)
        i += tl.num_programs(0)
    tl.store(partial + tl.program_id(0) * width + d, sums, mask=inside)


def scatter_add_backward(grad: Tensor, update: Tensor, idx: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    grad, update, scale = columns(grad), update.contiguous(), scale.contiguous()
    grad_update, grad_scale = update.new_empty(update.shape), scale.new_empty(scale.shape)
    pointers = (grad, update, idx.contiguous(), scale, grad_update, grad_scale)
    sizes = (idx.shape[1], grad.shape[2], *grad.stride()[:2])
    launch(scatter_add_backward_kernel, (idx.numel(),), grad_update, *pointers, *sizes, **_whole_row(grad.shape[2]))
    return grad_update, grad_scale


def gather_rms_norm(x: Tensor, idx: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = columns(x)
    rows, y = (x.new_empty(*idx.shape, x.shape[2]) for _ in range(2))
    rstd = torch.empty(idx.shape, dtype=torch.float32, device=x.device)
    pointers = (x, idx.contiguous(), weight.contiguous(), rows, y, rstd)
    sizes = (idx.shape[1], x.shape[2], *x.stride()[:2])
    launch(gather_rms_norm_kernel, (idx.numel(),), y, *pointers, *sizes, eps, **_whole_row(x.shape[2]))
    return rows, y, rstd


def gather_rms_norm_backward(
    grad_rows: Tensor, grad_y: Tensor, rows: Tensor, idx: Tensor, weight: Tensor, rstd: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    width, options = rows.shape[2], _whole_row(rows.shape[2])
    programs = min(idx.numel(), WARPS // options["num_warps"])
    grad_x = rows.new_zeros(len(idx), tokens, width)
    partial = torch.empty(programs, width, dtype=torch.float32, device=rows.device)
    inputs = [x.contiguous() for x in (grad_rows, grad_y, rows, idx, weight, rstd)]
    sizes = (idx.numel(), idx.shape[1], tokens, width)
    kernel = gather_rms_norm_backward_kernel
    launch(kernel, (programs,), partial, *inputs, grad_x, partial, *sizes, **options)
    return grad_x, partial.sum(0).to(weight.dtype)


def _whole_row(width: int) -> dict[str, int]:
    cols = power_of_2(width)
    return {"COLS": cols, "num_warps": min(max(cols // 512, 1), 16)}
