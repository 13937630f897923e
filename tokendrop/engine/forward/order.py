"""Gradients that arrive in one order, whatever a batch makes of a layer.

ZeRO stage 2 sums buckets of gradients over ranks in the order in which they arrive, and with CONTEXT rows, weights of
their own or routers that is another one where a rank's batch has images.

Shape letters: B batch, T tokens, D hidden.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.binding import Binding
from tokendrop.engine.model.decoder import reentrant


def listened(model: nn.Module) -> bool:
    """Whether ZeRO stage 1 or 2 is told of a model's gradients as they arrive."""
    return "deepspeed" in sys.modules and any(map(_told, model.parameters()))


def _told(parameter: Any) -> bool:
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    whole = not hasattr(parameter, "ds_id")  # stage 3 has its weights in pieces, and an order of its own
    return whole and any(hook.__module__.startswith("deepspeed.") for hook in hooks)


def ordered(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a layer's call; with them, under ZeRO, its gradients arrive behind all else of it, in one order.

    Each parameter has a gradient then, of zeros where nothing uses it, which is what ZeRO makes of none.

    Args:
        layer: a routed decoder layer.
        args: what the decoder calls it with.
        kwargs: likewise.

    Source: ours.
    """
    binding: Binding = layer.__dict__["_tokendrop"]
    # In a re-entrant backward gradients have arrived before this one's are due.
    if not binding.handle.listened or not torch.is_grad_enabled() or reentrant(layer):
        return args, kwargs
    name = binding.spec.parameters[0]
    hidden = _last(args[0] if args else kwargs[name], layer, binding.handle.sets(binding.index))
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {name: hidden})


class _Behind(torch.autograd.Function):
    """Gives its first input; the gradient of the second one, to which it adds zeros, waits for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, behind: Tensor) -> Tensor:
        ctx.zero, ctx.shape = behind.new_zeros(()), behind.shape
        return x.clone()  # a layer may write into its input

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        return grad_outputs[0], ctx.zero.expand(ctx.shape)


@torch.compiler.disable  # a compiled backward has an order of its own
def _last(hidden: Tensor, *modules: nn.Module) -> Tensor:
    # A gradient arrives when all that adds to it has run, and autograd runs what was made last first: so each parameter
    # gets a user that is made before the layer runs, each in a step of its own.
    step: Any = hidden.new_zeros(())
    for parameter in dict.fromkeys(p for module in modules for p in module.parameters()):
        if parameter.requires_grad and _told(parameter):
            step = _Behind.apply(step, parameter)
    made: Tensor = _Behind.apply(hidden, step) if step.requires_grad else hidden
    return made
