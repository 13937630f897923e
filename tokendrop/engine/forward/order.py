"""Gradients that arrive in one order, whatever a batch makes of a layer.

ZeRO stage 2 sums buckets of gradients over ranks in the order in which they arrive, and with CONTEXT rows, weights of
their own or routers that is another one where a rank's batch has images.

Shape letters: B batch, T tokens, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.binding import Binding


def listened(model: nn.Module) -> bool:
    """Whether somebody is told of gradients as they arrive, by hooks such as those of ZeRO."""
    trained: Any = next((p for p in model.parameters() if p.requires_grad), None)
    return trained is not None and bool(trained._post_accumulate_grad_hooks)


def ordered(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a layer's call; with them, where it is listened to, its gradients arrive last and in one order.

    Args:
        layer: a routed decoder layer.
        args: what the decoder calls it with.
        kwargs: likewise.

    Source: ours.
    """
    binding: Binding = layer.__dict__["_tokendrop"]
    if not binding.handle.listened or not torch.is_grad_enabled():
        return args, kwargs
    name = binding.spec.parameters[0]
    hidden = _last(args[0] if args else kwargs[name], layer, binding.handle.sets(binding.index))
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {name: hidden})


class _Behind(torch.autograd.Function):
    """Gives its first input; the gradient of the second one, to which it adds nothing, waits for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, behind: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


@torch.compiler.disable  # a compiled backward has an order of its own
def _last(hidden: Tensor, *modules: nn.Module) -> Tensor:
    # A gradient arrives when all that adds to it has run, and autograd runs what was made last first: so each parameter
    # gets a user that is made before the layer runs, each in a step of its own.
    step: Any = hidden.new_zeros(())
    for parameter in dict.fromkeys(p for module in modules for p in module.parameters()):
        if parameter.requires_grad:
            step = _Behind.apply(step, parameter)
    made: Tensor = _Behind.apply(hidden, step)
    return made
