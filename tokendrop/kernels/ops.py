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
    if x is None or not uses_triton(x):
        return getattr(reference, name)
    # Not at the top: it may not be installed, and reads TRITON_INTERPRET when it defines a kernel.
    from tokendrop.kernels import triton_rows

    return getattr(triton_rows, name)


@torch.library.custom_op("tokendrop::gather", mutates_args=())
def gather(x: Tensor, idx: Tensor, valid: Tensor | None) -> Tensor:
    return _implementation(x, "gather")(x, idx, valid)


@torch.library.custom_op("tokendrop::select", mutates_args=())
def select(full: Tensor | None, kept: Tensor | None, idx: Tensor, valid: Tensor | None, tokens: int) -> Tensor:
    return _implementation(kept if full is None else full, "select")(full, kept, idx, valid, tokens)


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
gather_rotary.register_autograd(_gather_rotary_gradient, setup_context=_save_gather_rotary)

NAMES = ("gather", "select", "gather_rotary")


@register_flop_formula([getattr(torch.ops.tokendrop, name) for name in NAMES])
def _no_flops(*args, **kwargs) -> int:
    # torch's formulas count the products of matrices only; these ops move rows and hold none.
    return 0
