"""The feed-forward part (FFN) of a layer: found by inspection, and run on some rows only.

Shape letters: B batch, K rows of the layer, N rows of its FFN, D hidden.
"""

import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tokendrop.engine.model import swap
from tokendrop.engine.model.linears import linears
from tokendrop.engine.model.swap import Swapped, reach, reached
from tokendrop.engine.plan.rows import Rows
from tokendrop.errors import UnsupportedError
from tokendrop.kernels import gather_tokens, scatter_tokens

_NAMES = ("mlp", "ffn", "feed_forward", "feedforward", "moe")


def holds_weights(module: nn.Module) -> bool:
    """Whether a module multiplies with weights, which norms and activations do not."""
    return bool(linears(module)) or any(p.dim() > 1 for p in module.parameters())


def ffn_names(layer: nn.Module) -> list[str]:
    """The children of a layer that are an FFN by their names and weights; one, where they are what is common."""
    named = ((name, child) for name, child in layer.named_children() if name == "ff" or any(n in name for n in _NAMES))
    return [name for name, child in named if holds_weights(child)]


def ffn_of(layer: nn.Module) -> nn.Module | None:
    """The FFN of a layer, if it has one that is a child of its own."""
    names = ffn_names(layer)
    return getattr(layer, names[0]) if len(names) == 1 else None


class _Running(threading.local):
    """The rows that the FFN of this thread's layer runs on; None for all."""

    rows: Rows | None = None
    tokens: int = 0
    ran: bool = False
    gate: Tensor | None = None


_running = _Running()


@contextmanager
def some_rows(rows: Rows | None, tokens: int) -> Generator[None]:
    """Inside, the FFN of a layer runs on `rows` (B, N) of its (B, K) rows, and gives zero for the others.

    Raises:
        UnsupportedError: the layer ran without its FFN.
    """
    if rows is None:
        yield
        return
    _running.rows, _running.tokens, _running.ran = rows, tokens, False
    try:
        yield
    finally:
        _running.rows = None
    if not _running.ran:
        raise UnsupportedError(
            "a layer ran without a call of its FFN as a module, so image tokens that are ATTEND cannot go without it; "
            "call the module, or use then='rejoin'"
        )


@contextmanager
def gated(gate: Tensor | None) -> Generator[None]:
    """Inside, what the FFN of a layer gives to its (B, K) rows is scaled by `gate` (B, K); None leaves it.

    Raises:
        UnsupportedError: the layer ran without its FFN.
    """
    if gate is None:
        yield
        return
    _running.gate, _running.ran = gate, False
    try:
        yield
    finally:
        _running.gate = None
    if not _running.ran:
        raise UnsupportedError("a layer ran without a call of its FFN as a module, which a router's weight scales")


class _RoutedFFN(Swapped):
    """Mixin of a layer's FFN: it runs on some rows, and the others get nothing added; or what it gives is scaled."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.__dict__ and (_running.rows is not None or _running.gate is not None):
            return reach(self, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reached(self)
        rows, tokens = _running.rows, _running.tokens
        if rows is None and _running.gate is not None:
            return _scaled(super().forward(*args, **kwargs), _running.gate)
        if rows is None:
            return super().forward(*args, **kwargs)
        _running.ran = True
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if len(given) != 1 or given[0].numel() != len(rows.index) * tokens * given[0].shape[-1]:
            shapes = ", ".join(str(tuple(one.shape)) for one in given)
            raise UnsupportedError(
                f"{type(self).__name__} is given tensors of {shapes}; expected the hidden states of "
                f"{(len(rows.index), tokens)} rows alone, of which tokens that are ATTEND go without it; use "
                "then='rejoin'"
            )
        x = given[0].reshape(len(rows.index), tokens, -1)
        part = _chosen(x, rows)
        args = tuple(part if one is given[0] else one for one in args)
        out = super().forward(*args, **{name: part if one is given[0] else one for name, one in kwargs.items()})
        made, rest = (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, None)
        full = made.new_zeros(*x.shape[:2], made.shape[-1])
        if rows.index.shape[1]:
            full = scatter_tokens(full, made.reshape(*rows.index.shape, -1), rows.index, rows.valid)
        full = full.view(*given[0].shape[:-1], -1)
        return full if rest is None else (full, *rest)


def _scaled(out: Any, gate: Tensor) -> Any:
    _running.ran = True
    made, rest = (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, None)
    if made.numel() != gate.numel() * made.shape[-1]:
        raise UnsupportedError(
            f"an FFN gives {tuple(made.shape)} for {tuple(gate.shape)} rows that a router weighs; expected one for each"
        )
    made = made * gate.to(made.dtype).view(*made.shape[:-1], 1)
    return made if rest is None else (made, *rest)


def _chosen(x: Tensor, rows: Rows) -> Tensor:
    # Where none is chosen one row runs all the same, of which nothing is kept.
    return gather_tokens(x, rows.index) if rows.index.shape[1] else x.new_zeros(1, 1, x.shape[-1])


def inject(layers: Iterable[nn.Module]) -> None:
    """Make the FFN of layers obey `some_rows`."""
    for layer in layers:
        if (ffn := ffn_of(layer)) is not None and not isinstance(ffn, _RoutedFFN):
            swap.swap(ffn, _RoutedFFN)


def restore(layers: nn.ModuleList) -> None:
    """Give each FFN its own class back."""
    for module in layers.modules():
        if isinstance(module, _RoutedFFN) and "_tokendrop_base" in vars(type(module)):
            swap.restore(module)
