"""Class swaps: a module becomes a subclass of its own class, under the same name, and survives pickle and deepcopy."""

import threading
from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any, ClassVar, SupportsIndex

from torch import nn

from tokendrop.errors import TokenDropError, UnsupportedError

# What other libraries hang on a module to take its calls elsewhere.
HUNG = ("forward", "_hf_hook", "_old_forward", "_compiled_call_impl")


class Swapped(nn.Module):
    """Base of the mixins that a swapped class puts in front of the module's own."""

    _tokendrop_mixin: ClassVar[type[nn.Module]]
    _tokendrop_base: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> tuple[Any, ...]:
        mixins, base = [self._tokendrop_mixin], self._tokendrop_base
        while "_tokendrop_base" in vars(base):  # swapped for several reasons
            mixins, base = [vars(base)["_tokendrop_mixin"], *mixins], vars(base)["_tokendrop_base"]
        return _rebuild, (base, *mixins), self.__getstate__()


@lru_cache
def swapped_class(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `base` with `mixin` in front, under the name of `base`."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), names | {"_tokendrop_mixin": mixin, "_tokendrop_base": base})


def swap(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Put `mixin` in front of a module's class, also behind a hook that stands in the instance as its `forward`."""
    base = type(module)
    module.__class__ = swapped_class(mixin, base)
    _rebind(module, base, module.__class__)


def restore(module: nn.Module) -> None:
    """Give a module its own class back, and take what we hung on it."""
    swapped = type(module)
    for name in [name for name in vars(module) if name.startswith("_tokendrop")]:
        del module.__dict__[name]
    module.__class__ = vars(swapped)["_tokendrop_base"]
    _rebind(module, swapped, module.__class__)


def _rebind(module: nn.Module, before: type[nn.Module], after: type[nn.Module]) -> None:
    # accelerate's hooks put a `forward` into the instance and go on to the bound method that they found there.
    for name, value in vars(module).items():
        if _is_forward(value, module, before):
            module.__dict__[name] = MethodType(after.forward, module)


def _is_forward(value: Any, module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is kind.forward


def check_forward(module: nn.Module, name: str) -> None:
    """Refuse a `forward` in an instance that would go past a swapped class; accelerate's hooks go on to it.

    Raises:
        UnsupportedError: with the module's `name`.
    """
    if "forward" in vars(module) and not any(
        _is_forward(value, module, type(module)) for value in vars(module).values()
    ):
        raise UnsupportedError(_past(module, name))


def reach(module: nn.Module, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module through the `forward` that was hung on its instance since; it must go on to the swapped class.

    Raises:
        UnsupportedError: it did not.
    """
    before, _reached.module = _reached.module, module
    failure: Exception | None = None
    try:
        out = proceed(*args, **kwargs)
    except Exception as error:
        out, failure = None, error
    finally:
        past, _reached.module = _reached.module is module, before
    if past and not isinstance(failure, TokenDropError):
        raise UnsupportedError(_past(module, type(module).__name__)) from failure
    if failure is not None:
        raise failure
    return out


def reached(module: nn.Module) -> None:
    """Say that the forward of a swapped class runs."""
    if _reached.module is module:
        _reached.module = None


class _Reached(threading.local):
    """The module whose swapped forward this thread waits for."""

    module: nn.Module | None = None


_reached = _Reached()


def _past(module: nn.Module, name: str) -> str:
    found = vars(module)["forward"]
    return (
        f"{name} has a `forward` of its own in the instance ({getattr(found, '__qualname__', type(found).__name__)}), "
        "which goes past what apply puts into its class; take that away, or let it call the forward that it found"
    )


def _rebuild(swapped: type[nn.Module], *mixins: type[nn.Module]) -> nn.Module:
    for mixin in mixins:
        swapped = swapped_class(mixin, swapped)
    return swapped.__new__(swapped)
