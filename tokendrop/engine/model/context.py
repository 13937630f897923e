"""CONTEXT keys and values: taken where the layer updates its cache, from frozen states.

Keys and values may differ in heads and in width, as what latent attention caches does.

Shape letters: B batch, T tokens, M context rows, K computed rows, D hidden, H heads, W width.
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

    def __getattr__(self, name: str) -> Any:
        if name == "to":  # accelerate's hooks ask everything whether it can be moved
            raise AttributeError(name)
        # What a layer asks of a cache beside keys and values, before it has made them.
        raise UnsupportedError(
            f"a layer asks its cache for {name!r}, as where a state is carried from row to row, which keys and values "
            "alone do not enter; use HMGen, or a score that needs no attention"
        )


def keys_values(
    layer: nn.Module, forward: Callable[..., Any], states: Tensor, arguments: dict[str, Any], cache: str
) -> tuple[Tensor, Tensor]:
    """The keys and values (B, H, M, W) that a layer makes of rows, by its own code; nothing behind them runs.

    Args:
        layer: the decoder layer.
        forward: its own forward, unbound.
        states: (B, M, D) hidden states at its input.
        arguments: its arguments for these rows.
        cache: name of the argument that takes the cache.

    Raises:
        UnsupportedError: it updates no cache with keys and values.
        UnsupportedError: under `torch.export` without strict=True.

    Source: ours.
    """
    check_export()
    capture = _Capture()
    with suppress(_CapturedError):
        forward(layer, states, **(arguments | {cache: capture}))
        raise UnsupportedError(
            f"{type(layer).__name__} ran without handing keys and values to its cache {cache!r}, where they would be "
            "taken; use HMGen, or a score that needs no attention"
        )
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
    """Stands where a layer expects its cache, and puts the keys and values of context rows first.

    Args:
        keys: (B, H, M, W).
        values: (B, H, M, W).
        order: (B, T), puts context rows and then computing rows into token order; None leaves them.
        cache: the cache behind, which takes them in token order; or None.
    """

    def __init__(self, keys: Tensor, values: Tensor, order: Tensor | None, cache: Any) -> None:
        self.keys, self.values, self.order, self.cache = keys, values, order, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M + K, W) of all rows, or (B, H, T, W) in token order."""
        keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        if self.order is None:
            return keys, values
        keys, values = (_gathered(x, self.order) for x in (keys, values))
        return self.cache.update(keys, values, *args, **kwargs)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, T) of keys or values (B, H, K, W)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
