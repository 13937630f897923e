"""Linears of somebody else's model: plain, transposed, beneath adapters, or with packed weights."""

from typing import Any, cast

from torch import Tensor, nn


def base_linear(linear: nn.Module) -> nn.Module:
    """The linear beneath its adapters, such as PEFT's."""
    while isinstance(beneath := getattr(linear, "base_layer", None), nn.Module):
        linear = beneath
    return linear


def unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper of classic FSDP or of checkpointing passes attributes on to, whose children are the module's."""
    for name in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        while isinstance(inner := module._modules.get(name), nn.Module):
            module = inner
    return module


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear stores its weight as (in, out), such as GPT-2's Conv1D."""
    return any(base.__name__ == "Conv1D" for base in type(linear).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear, with an adapter or without, also of a library that packs its weight."""
    module = base_linear(module)
    leaf = next(module.children(), None) is None and None not in _features(module)
    return isinstance(module, nn.Linear) or is_transposed(module) or leaf


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Output and input features of a linear, also beneath an adapter."""
    linear = base_linear(linear)
    # A packed weight has another shape, so only a linear that does not say its features is asked for its weight.
    if None not in (features := _features(linear)):
        return features
    rows, columns = cast(Tensor, linear.weight).shape
    return (columns, rows) if is_transposed(linear) else (rows, columns)


def linears(module: nn.Module) -> list[nn.Module]:
    """Each linear in a module, those of adapters among them."""
    return [one for one in module.modules() if base_linear(one) is one and is_linear(one)]


def _features(linear: nn.Module) -> tuple[Any, Any]:
    found = (getattr(linear, name, None) for name in ("out_features", "in_features"))
    rows, columns = (one if isinstance(one, int) else None for one in found)
    return rows, columns
