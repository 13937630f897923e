"""The row operations as torch ops: `torch.ops.tokendrop.*`, each with a fake, a gradient and a FLOP formula.

An op runs its Triton kernel or the torch reference, where its formula is (`uses_triton` decides). Copies keep only
indices for their backward.
Shape letters: B batch, T tokens, K kept, D hidden.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokendrop.errors import UnsupportedError
from tokendrop.kernels import reference

HAS_TRITON = importlib.util.find_spec("triton") is not None
LONGEST_ROW = 8192  # elements that a kernel which sums over a row can hold in registers; longer ones would spill
SUMS = ("scatter_add_backward", "gather_rms_norm", "gather_rms_norm_backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def uses_triton(x: Tensor) -> bool:
    """Whether the rows of `x` go through the Triton kernels: on CUDA and ROCm, unless TOKENDROP_KERNELS says otherwise.

    Dtypes other than fp32, bf16 and fp16 always go through torch.

    Raises:
        UnsupportedError: TOKENDROP_KERNELS is neither torch nor triton, or asks for Triton where there is none.
    """
    choice = os.environ.get("TOKENDROP_KERNELS") or ("triton" if x.is_cuda and HAS_TRITON else "torch")
    if choice not in ("torch", "triton"):
        raise UnsupportedError(f"TOKENDROP_KERNELS: expected torch or triton; found {choice!r}; correct or unset it")
    if choice == "torch" or x.dtype not in DTYPES:
        return False
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not HAS_TRITON or not (x.is_cuda or interpreted):
        raise UnsupportedError(
            f"TOKENDROP_KERNELS=triton with a tensor on {x.device.type!r}: Triton runs on CUDA and ROCm, or on the CPU "
            "in its interpreter under TRITON_INTERPRET=1; set that, or unset TOKENDROP_KERNELS"
        )
    return True


def _implementation(x: Tensor | None, name: str) -> Callable[..., Any]:
    if x is None or not uses_triton(x) or (name in SUMS and x.shape[-1] > LONGEST_ROW):
        return getattr(reference, name)
    # Not at the top: it may not be installed, and reads TRITON_INTERPRET when it defines a kernel.
    from tokendrop.kernels import triton_rows, triton_sums

    return getattr(triton_sums if name in SUMS else triton_rows, name)


@torch.library.custom_op("tokendrop::gather", mutates_args=())
def gather(x: Tensor, idx: Tensor, valid: Tensor | None) -> Tensor:
    return _implementation(x, "gather")(x, idx, valid)


@torch.library.custom_op("tokendrop::select", mutates_args=())
def select(full: Tensor | None, kept: Tensor | None, idx: Tensor, valid: Tensor | None, tokens: int) -> Tensor:
    return _implementation(kept if full is None else full, "select")(full, kept, idx, valid, tokens)


@torch.library.custom_op("tokendrop::scatter_add", mutates_args=())
def scatter_add(full: Tensor, update: Tensor, idx: Tensor, scale: Tensor | None) -> Tensor:
    return _implementation(full, "scatter_add")(full, update, idx, scale)


@torch.library.custom_op("tokendrop::scatter_add_backward", mutates_args=())
def scatter_add_backward(grad: Tensor, update: Tensor, idx: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _implementation(grad, "scatter_add_backward")(grad, update, idx, scale)


@torch.library.custom_op("tokendrop::gather_rms_norm", mutates_args=())
def gather_rms_norm(x: Tensor, idx: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(x, "gather_rms_norm")(x, idx, weight, eps)


@torch.library.custom_op("tokendrop::gather_rms_norm_backward", mutates_args=())
def gather_rms_norm_backward(
    grad_rows: Tensor, grad_y: Tensor, rows: Tensor, idx: Tensor, weight: Tensor, rstd: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    run = _implementation(rows, "gather_rms_norm_backward")
    return run(grad_rows, grad_y, rows, idx, weight, rstd, tokens)


@torch.library.custom_op("tokendrop::gather_rotary", mutates_args=())
def gather_rotary(cos: Tensor, sin: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    return _implementation(cos, "gather_rotary")(cos, sin, idx)


@gather.register_fake
def _(x, idx, valid):
    return x.new_empty(*idx.shape, x.shape[-1])


@select.register_fake
def _(full, kept, idx, valid, tokens):
    some = kept if full is None else full
    return some.new_empty(idx.shape[0], tokens, some.shape[-1])


@scatter_add.register_fake
def _(full, update, idx, scale):
    return full.new_empty(full.shape)


@scatter_add_backward.register_fake
def _(grad, update, idx, scale):
    return update.new_empty(update.shape), scale.new_empty(scale.shape)


@gather_rms_norm.register_fake
def _(x, idx, weight, eps):
    rows, y = (x.new_empty(*idx.shape, x.shape[-1]) for _ in range(2))
    return rows, y, x.new_empty(idx.shape, dtype=torch.promote_types(x.dtype, torch.float32))


@gather_rms_norm_backward.register_fake
def _(grad_rows, grad_y, rows, idx, weight, rstd, tokens):
    return rows.new_empty(idx.shape[0], tokens, rows.shape[-1]), weight.new_empty(weight.shape)


@gather_rotary.register_fake
def _(cos, sin, idx):
    return cos.new_empty(*idx.shape, cos.shape[-1]), sin.new_empty(*idx.shape, sin.shape[-1])


def _save_gather(ctx, inputs, output):
    x, idx, valid = inputs
    ctx.save_for_backward(idx, valid)
    ctx.tokens = x.shape[1]


def _gather_gradient(ctx, grad):
    return select(None, grad, *ctx.saved_tensors, ctx.tokens), None, None


def _save_select(ctx, inputs, output):
    ctx.save_for_backward(inputs[2], inputs[3])


def _select_gradient(ctx, grad):
    idx, valid = ctx.saved_tensors
    full = select(grad, None, idx, valid, grad.shape[1]) if ctx.needs_input_grad[0] else None
    return full, gather(grad, idx, valid) if ctx.needs_input_grad[1] else None, None, None, None


def _save_scatter_add(ctx, inputs, output):
    _, update, idx, scale = inputs
    ctx.save_for_backward(idx, *(() if scale is None else (update, scale)))  # a product's gradients need its factors


def _scatter_add_gradient(ctx, grad):
    idx, *factors = ctx.saved_tensors
    if not factors:
        return grad, gather(grad, idx, None), None, None
    update, scale = scatter_add_backward(grad, factors[0], idx, factors[1])
    return grad, update, None, scale


def _save_gather_rms_norm(ctx, inputs, output):
    x, idx, weight, _ = inputs
    rows, _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(rows, idx, weight, rstd)  # the K rows that it returned, not the T of x
    ctx.tokens = x.shape[1]


def _gather_rms_norm_gradient(ctx, grad_rows, grad_y, _):
    x, weight = gather_rms_norm_backward(grad_rows, grad_y, *ctx.saved_tensors, ctx.tokens)
    return x, None, weight, None


def _save_gather_rotary(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])
    ctx.shape = inputs[0].shape


def _gather_rotary_gradient(ctx, *grads):
    (idx,), (batch, tokens, _) = ctx.saved_tensors, ctx.shape
    found = [select(None, grad, idx, None, tokens) for grad in grads]
    cos, sin = (grad.sum(0, keepdim=True) if batch == 1 else grad for grad in found)
    return cos, sin, None


gather.register_autograd(_gather_gradient, setup_context=_save_gather)
select.register_autograd(_select_gradient, setup_context=_save_select)
scatter_add.register_autograd(_scatter_add_gradient, setup_context=_save_scatter_add)
gather_rms_norm.register_autograd(_gather_rms_norm_gradient, setup_context=_save_gather_rms_norm)
gather_rotary.register_autograd(_gather_rotary_gradient, setup_context=_save_gather_rotary)

NAMES = (
    "gather", "select", "scatter_add", "scatter_add_backward",
    "gather_rms_norm", "gather_rms_norm_backward", "gather_rotary",
)  # fmt: skip


@register_flop_formula([getattr(torch.ops.tokendrop, name) for name in NAMES])
def _no_flops(*args, **kwargs) -> int:
    # torch's formulas count the products of matrices only; these ops move rows and hold none.
    return 0
