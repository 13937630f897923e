"""What the attention of decoder layers looks at, seen while a dense model runs, a chunk of rows at a time.

Shape letters: B batch, T tokens, C rows of a chunk, H heads, G heads of keys and values, D hidden, L layers.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokendrop.engine.model.attention import seen_kernels
from tokendrop.engine.model.logits import SOFTMAX, products
from tokendrop.errors import LayoutError, UnsupportedError

# From a layer, its first row, and the probabilities (B, H, C, T) of C rows from there on.
Sink = Callable[[int, int, Tensor], None]
CHUNK = 256


class _Seen(TorchFunctionMode):
    """Hands on the probabilities of the one attention that runs inside, in chunks of rows."""

    def __init__(self, sink: Callable[[int, Tensor], None], tokens: int) -> None:
        super().__init__()
        self.sink, self.tokens, self.found = sink, tokens, False
        self.rows = 0  # of an attention that is not over the layout's tokens

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._chunks(args[0].shape[2], lambda start, stop: _logits(start, stop, *args, **kwargs))
        elif func in SOFTMAX and args[0].dim() == 4:
            self._chunks(args[0].shape[2], lambda start, stop: args[0][:, :, start:stop])
        return func(*args, **kwargs)

    @torch.no_grad()
    def _chunks(self, rows: int, logits: Callable[[int, int], Tensor]) -> None:
        if rows != self.tokens or self.found:
            self.rows = rows
            return
        self.found = True
        for start in range(0, rows, CHUNK):
            # What attention sinks take, columns behind those of the tokens, is of no segment.
            self.sink(start, logits(start, min(start + CHUNK, rows)).float().softmax(-1)[..., : self.tokens])


def _logits(
    start: int,
    stop: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    mask = (
        None if attn_mask is None else attn_mask.expand(*attn_mask.shape[:-2], query.shape[2], -1)[..., start:stop, :]
    )
    if is_causal:
        mask = torch.ones(stop - start, key.shape[2], dtype=torch.bool, device=query.device).tril(start)
    return products(query[:, :, start:stop], key, value, mask, scale=more.get("scale"))


class _Run:
    """The attention of L layers in one run of a model over T `tokens`."""

    def __init__(self, sink: Sink, tokens: int) -> None:
        self.sink, self.tokens = sink, tokens
        self.running: dict[int, _Seen] = {}
        self.done: set[int] = set()

    def before(self, index: int) -> None:
        """A layer begins."""
        if index in self.done:
            raise UnsupportedError(f"layer {index} ran twice on one batch; give loss=fn(batch) that runs it once")
        self.running[index] = _Seen(lambda start, seen: self.sink(index, start, seen), self.tokens)
        self.running[index].__enter__()

    def after(self, index: int) -> None:
        """A layer has run."""
        seen = self.running.pop(index, None)
        if seen is None:
            return
        seen.__exit__(None, None, None)
        self.done.add(index)
        if not seen.found and seen.rows:
            raise LayoutError(
                f"layer {index}'s attention has {seen.rows} rows, and the layout {self.tokens} tokens; give the layout "
                "of the very tokens that the model runs on"
            )
        if not seen.found:
            raise UnsupportedError(
                f"layer {index} ran without a scaled_dot_product_attention or softmax over its {self.tokens} rows, so "
                "its attention was not seen; load the model with attn_implementation='sdpa'"
            )

    def finish(self, depth: int) -> None:
        """The model has run."""
        if missing := sorted(set(range(depth)) - self.done):
            raise UnsupportedError(f"the layers {missing} did not run; give loss=fn(batch) that runs the model")

    def close(self) -> None:
        """Let go of layers that an exception ended."""
        for seen in self.running.values():
            seen.__exit__(None, None, None)
        self.running.clear()


@contextmanager
def attention_seen(layers: nn.ModuleList, tokens: int, sink: Sink) -> Generator[None]:
    """Hand the attention of every decoder layer that runs inside to `sink`, whatever the backend.

    Layers whose attention is a kernel that cannot be seen run with sdpa instead, which computes the same.

    Args:
        layers: L, of an untouched or a disabled model.
        tokens: T.
        sink: called with the layer, the first row and their probabilities (B, H, C, T) in float32.

    Raises:
        LayoutError: another number of tokens than the layers run on.
        UnsupportedError: a layer that ran without any attention that can be seen, twice, or not at all.

    Source: ours.
    """
    run = _Run(sink, tokens)
    with ExitStack() as stack:
        stack.callback(run.close)
        stack.enter_context(seen_kernels(layers))
        for index, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(lambda *_, at=index: run.before(at))
            stack.callback(hook.remove)
            # Also after an exception, and outside checkpointing, which would not call it in a recompute.
            stack.callback(layer.register_forward_hook(lambda *_, at=index: run.after(at), always_call=True).remove)
        yield
        run.finish(len(layers))
