"""Gradients of a task's loss, taken without a trace in the model that is trained.

Shape letters: P parameters.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tokendrop.errors import TaskLossError


@contextmanager
def preserved(module: nn.Module) -> Generator[None]:
    """Give back random state and buffers as they were, also after an exception; gradients are never touched."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    random = isolate_rng()
    random.__enter__()
    try:
        yield
    finally:
        random.__exit__(None, None, None)  # after an exception of its own it would leave the random state
        reshard(module)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def reshard(module: nn.Module) -> None:
    """Let FSDP2 gather its parameters anew in the next forward: its root keeps them until a backward."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()


def shared_parameters(module: nn.Module, prefixes: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The trained parameters whose dotted names begin with one of `prefixes`, or all.

    Raises:
        TaskLossError: none.
    """
    chosen = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (prefixes is None or name.startswith(tuple(prefixes)))
    }
    if not chosen:
        names = [name for name, _ in module.named_parameters()]
        raise TaskLossError(
            f"params={prefixes!r}: no trained parameter of {type(module).__name__} has such a name; names begin like "
            f"{names[:3]}"
        )
    return chosen


def gradients(
    loss: Tensor, parameters: Mapping[str, nn.Parameter], task: str, others: Sequence[nn.Parameter] = ()
) -> list[Tensor]:
    """The P gradients of a loss; zeros where it does not depend on a parameter. `.grad` stays as it is, of all.

    With FSDP2 each rank gets its shards, averaged over ranks.

    Args:
        loss: () float.
        parameters: P, by name.
        task: whose loss it is.
        others: that the loss depends on, too, as its module had them before the forward: FSDP2's root shows others.

    Raises:
        TaskLossError: a loss that is no finite scalar, or whose gradient there is none, or none outside a backward.
    """
    if loss.numel() != 1 or not bool(loss.detach().isfinite().all()):
        raise TaskLossError(
            f"the loss of task {task!r} is {loss.detach().flatten()[:3].tolist()}; expected a finite number"
        )
    if not loss.requires_grad:
        raise TaskLossError(f"the loss of task {task!r} has no gradient; expected one that depends on the parameters")
    tensors = list(parameters.values())
    if any(isinstance(one, DTensor) for one in tensors):
        found = _by_backward(loss, tensors, others)
    else:
        found = _by_grad(loss, tensors, task)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, found, strict=True)]


def local(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def summed(products: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Products (P, ...) of local parts, summed over ranks where the parameters are sharded.

    Shares of coordinates are such products, too, once they are multiplied with the local sizes.
    """
    sharded = torch.tensor([isinstance(one, DTensor) for one in gradients])
    if not sharded.any():
        return products
    # Whole parameters are the same on every rank.
    weight = torch.where(sharded, 1.0, 1 / torch.distributed.get_world_size()).to(products)
    device = local(gradients[0]).device
    total = (products * weight.view(-1, *[1] * (products.dim() - 1))).to(device)
    torch.distributed.all_reduce(total)
    return total.cpu()


@contextmanager
def moved(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], gradient: Sequence[Tensor], rate: float
) -> Generator[None]:
    """A step of gradient descent of size `rate` inside, taken back to the bit."""
    tensors = list(parameters.values())
    with torch.no_grad():
        before = [one.detach().clone() for one in tensors]
        try:
            for one, step in zip(tensors, gradient, strict=True):
                one.sub_(step, alpha=rate)
            yield
        finally:
            for one, old in zip(tensors, before, strict=True):
                one.copy_(old)
            reshard(module)


def _by_grad(loss: Tensor, parameters: Sequence[nn.Parameter], task: str) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        # "incompatible" or "not compatible with .grad()": torch's words, and those of what was made after it.
        if "compatible with .grad()" not in str(error):
            raise
        raise TaskLossError(
            f"the gradient of task {task!r} cannot be taken: re-entrant activation checkpointing gives gradients in a "
            "training step's backward only; use non-re-entrant checkpointing (use_reentrant=False)"
        ) from error


def _by_backward(
    loss: Tensor, parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    # FSDP2 hands gradients to its sharded parameters in a backward only, which gives them to all.
    every = list(dict.fromkeys([*parameters, *others]))
    before = [one.grad for one in every]
    for one in every:
        one.grad = None
    try:
        loss.backward()
        return [one.grad for one in parameters]
    finally:
        for one, old in zip(every, before, strict=True):
            one.grad = old
