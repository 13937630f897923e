"""CONTEXT keys and values: taken where the layer updates its cache, from frozen states.

Shape letters: B batch, M context rows, K computed rows, D hidden, H heads.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.errors import UnsupportedError


class _CapturedError(Exception):
    """Raised where a layer has made its keys and values, to end it there."""


class _Capture:
    """Stands where a layer expects its cache, and keeps the keys and values it is given."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        raise _CapturedError


def keys_values(
    layer: nn.Module, forward: Callable[..., Any], states: Tensor, arguments: dict[str, Any], cache: str
) -> tuple[Tensor, Tensor]:
    """The keys and values (B, H, M, D / H) that a layer makes of rows, by its own code; nothing behind them runs.

    Args:
        layer: the decoder layer.
        forward: its own forward, unbound.
        states: (B, M, D) hidden states at its input.
        arguments: its arguments for these rows.
        cache: name of the argument that takes the cache.

    Raises:
        UnsupportedError: under `torch.export` without strict=True.

    Source: ours.
    """
    check_export()
    capture = _Capture()
    with suppress(_CapturedError):
        forward(layer, states, **(arguments | {cache: capture}))
    return capture.keys, capture.values


def check_export() -> None:
    """Refuse to end a layer early where module calls are traced: they would not be seen to end.

    Raises:
        UnsupportedError: under `torch.export` without strict=True.
    """
    exporting = getattr(torch.compiler, "is_exporting", bool)  # newer than torch 2.6
    if exporting() and not torch.compiler.is_dynamo_compiling():
        raise UnsupportedError(
            "torch.export without strict=True cannot trace layers that are run up to their keys and values only, as "
            "those of CONTEXT tokens and of attention that scores them are; export with strict=True"
        )


class ContextKeys:
    """Stands where a layer expects its cache, and appends the keys and values of context rows.

    Args:
        keys: (B, H, M, D / H).
        values: (B, H, M, D / H).
        order: (B, T), puts computing rows and then context rows into token order; None leaves them.
        cache: the cache behind, which takes them in token order; or None.
    """

    def __init__(self, keys: Tensor, values: Tensor, order: Tensor | None, cache: Any) -> None:
        self.keys, self.values, self.order, self.cache = keys, values, order, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, K + M, D / H) of all rows, or (B, H, T, D / H) in token order."""
        keys, values = torch.cat([keys, self.keys], 2), torch.cat([values, self.values], 2)
        if self.order is None:
            return keys, values
        index = self.order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return self.cache.update(keys.gather(2, index), values.gather(2, index), *args, **kwargs)
