"""Class swaps: a module becomes a subclass of its own class, under the same name, and survives pickle and deepcopy."""

from functools import lru_cache
from typing import Any, ClassVar, SupportsIndex

from torch import nn


class Swapped(nn.Module):
    """Base of the mixins that a swapped class puts in front of the module's own."""

    _tokendrop_mixin: ClassVar[type[nn.Module]]
    _tokendrop_base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> tuple[Any, ...]:
        return _rebuild, (self._tokendrop_mixin, self._tokendrop_base), self.__dict__


@lru_cache
def swapped_class(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` with `mixin` in front, under the name of `base`."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), names | {"_tokendrop_mixin": mixin, "_tokendrop_base": base})


def restore(module: nn.Module) -> None:
    """Give a module its own class back, and take what we hung on it."""
    module.__dict__.pop("_tokendrop", None)
    module.__class__ = vars(type(module))["_tokendrop_base"]


def _rebuild(mixin: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    swapped = swapped_class(mixin, base)
    return swapped.__new__(swapped)
