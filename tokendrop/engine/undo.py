"""Taking back what `apply` did to a model, or began to do."""

from torch import nn

from tokendrop.engine.forward import deepstack, head, routers
from tokendrop.engine.model.swap import Swapped, restore
from tokendrop.engine.model.vision import Encoder
from tokendrop.errors import AppliedError


def check_swapped(model: nn.Module, layers: nn.ModuleList, encoder: Encoder | None) -> None:
    """Refuse to take back what somebody else has wrapped since.

    Raises:
        AppliedError: a class that is not ours any more.
    """
    if any("_tokendrop_base" not in vars(type(module)) for module in _swapped(model, layers, encoder)):
        raise AppliedError(
            f"{type(layers[0]).__name__} was wrapped after apply (fully_shard does that); remove before sharding"
        )


def undo(model: nn.Module, layers: nn.ModuleList, encoder: Encoder | None) -> None:
    """Give every module of a model that was swapped its own class back."""
    for module in [*_swapped(model, layers, encoder), *layers.modules()]:
        while "_tokendrop_base" in vars(type(module)):  # one may be swapped for several reasons
            restore(module)
    head.restore(model)


def _swapped(model: nn.Module, layers: nn.ModuleList, encoder: Encoder | None) -> list[nn.Module]:
    watched = encoder.watched if encoder is not None else ()
    owner = [model] if isinstance(model, Swapped) else []
    return [*layers, *watched, *routers.injected(model), *deepstack.injected(model), *owner]
