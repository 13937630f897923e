"""The feed-forward part (FFN) of a layer: found by inspection, and run on some rows only.

Shape letters: B batch, K rows of the layer, N rows of its FFN, D hidden.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tokendrop.engine.model import swap
from tokendrop.engine.model.linears import linears, unwrapped
from tokendrop.engine.model.swap import Swapped, check_forward, reach, reached
from tokendrop.engine.model.using import current, own, split_run
from tokendrop.engine.plan.rows import Own, Rows, Split
from tokendrop.errors import UnsupportedError
from tokendrop.kernels import gather_tokens, scatter_tokens

_NAMES = ("mlp", "ffn", "feed_forward", "feedforward", "moe")


def holds_weights(module: nn.Module) -> bool:
    """Whether a module multiplies with weights, which norms and activations do not."""
    return bool(linears(module)) or any(p.dim() > 1 for p in module.parameters())


def ffn_names(layer: nn.Module) -> list[str]:
    """The children of a layer that are an FFN by their names and weights; one, where they are what is common."""
    children = unwrapped(layer).named_children()
    named = ((name, child) for name, child in children if name == "ff" or any(n in name for n in _NAMES))
    # Classic FSDP takes the weights of one away that is swapped already.
    return [name for name, child in named if holds_weights(child) or isinstance(child, _RoutedFFN)]


def ffn_of(layer: nn.Module) -> nn.Module | None:
    """The FFN of a layer, if it has one that is a child of its own."""
    names = ffn_names(layer)
    return getattr(layer, names[0]) if len(names) == 1 else None


class _Running(threading.local):
    """The rows that the FFN of this thread's layer runs on; None for all."""

    def __init__(self) -> None:  # attributes are there from the start, or a compiled graph would see them come
        self.rows: Rows | None = None
        self.tokens = 0
        self.ran = False
        self.gate: Tensor | None = None


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
        busy = any(one is not None for one in (_running.rows, _running.gate, current.split))
        if busy and "forward" in self.__dict__:
            return reach(self, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reached(self)
        rows, text = _running.rows, super().forward
        if rows is not None:
            _running.ran = True
            shape = len(rows.index), _running.tokens
            return _on_rows(self, shape, args, kwargs, lambda x, call: _attended(x, rows, call), text)
        split = current.split
        if split is None or not any("ffn" in own(name) for name in split.names):
            out = text(*args, **kwargs)
            return out if _running.gate is None else _scaled(out, _running.gate)
        return _on_rows(self, current.shape, args, kwargs, lambda x, call: _split(x, split, call), text)


def _on_rows(
    ffn: nn.Module,
    shape: tuple[int, int],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[[Tensor, Callable[..., Tensor]], Tensor],
    text: Callable[..., Any],
) -> Any:
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    if len(given) != 1 or given[0].numel() != shape[0] * shape[1] * given[0].shape[-1]:
        shapes = ", ".join(str(tuple(one.shape)) for one in given)
        raise UnsupportedError(
            f"{type(ffn).__name__} is given tensors of {shapes}; expected the hidden states of {shape} rows alone, of "
            "which image rows go another way; use then='rejoin' in place of 'attend', or leave 'ffn' out of parts"
        )
    rest: list[tuple[Any, ...]] = []

    def call(part: Tensor, run: Callable[..., Any]) -> Tensor:
        x = part if part.numel() else part.new_zeros(1, 1, part.shape[-1])  # one row, of which nothing is kept
        named = {name: x if one is given[0] else one for name, one in kwargs.items()}
        out = run(*(x if one is given[0] else one for one in args), **named)
        if isinstance(out, tuple):
            rest[:] = rest or [out[1:]]  # of the rows that run first, the text's
            out = out[0]
        out = out.reshape(*x.shape[:-1], -1)
        return out if part.numel() else out[:, :0].expand(len(part), -1, -1)

    full = run(given[0].reshape(*shape, -1), lambda part, other=text: call(part, other))
    full = full.view(*given[0].shape[:-1], -1)
    return (full, *rest[0]) if rest else full


def _scaled(out: Any, gate: Tensor) -> Any:
    _running.ran = True
    made, rest = (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, None)
    if made.numel() != gate.numel() * made.shape[-1]:
        raise UnsupportedError(
            f"an FFN gives {tuple(made.shape)} for {tuple(gate.shape)} rows that a router weighs; expected one for each"
        )
    made = made * gate.to(made.dtype).view(*made.shape[:-1], 1)
    return made if rest is None else (made, *rest)


def _attended(x: Tensor, rows: Rows, call: Callable[..., Tensor]) -> Tensor:
    # The other rows get nothing.
    made = call(gather_tokens(x, rows.index) if rows.index.shape[1] else x[:, :0])
    full = made.new_zeros(*x.shape[:2], made.shape[-1])
    return scatter_tokens(full, made, rows.index, rows.valid) if rows.index.shape[1] else full


def _split(x: Tensor, split: Split, call: Callable[..., Tensor]) -> Tensor:
    def run(part: Tensor, name: Own) -> Tensor:
        image = own(name).get("ffn")
        return (call(part[None]) if image is None else call(part[None], image)).squeeze(0)

    return split_run(split, x.flatten(0, 1), run).unflatten(0, x.shape[:2])


def inject(layer: nn.Module) -> None:
    """Make the FFN of a layer obey `some_rows` and `using`."""
    if (ffn := ffn_of(layer)) is not None and not isinstance(ffn, _RoutedFFN):
        swap.swap(ffn, _RoutedFFN)


def check(layer: nn.Module, name: str) -> None:
    """Refuse an FFN that a `forward` in its instance would lead past the swapped class.

    Raises:
        UnsupportedError: with the layer's `name`.
    """
    if (ffn := ffn_of(layer)) is not None:
        check_forward(ffn, f"{ffn_names(layer)[0]} of {name}")
