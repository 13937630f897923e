"""What the scoring rows of a layer look at, by the layer's own code up to its attention.

Shape letters: B batch, T tokens, R scoring rows, H heads, G heads of keys and values, D hidden.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokendrop.engine.forward.arguments import Form, compact, select
from tokendrop.engine.model.context import keys_values
from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.logits import SOFTMAX, products
from tokendrop.engine.plan.plan import Group
from tokendrop.engine.plan.rows import Rows
from tokendrop.errors import UnsupportedError
from tokendrop.roles import Attention


class _CaughtError(Exception):
    """Raised where a layer has made its attention logits, to end it there."""


class _Logits(TorchFunctionMode):
    """Ends a layer where its attention begins, and keeps the logits (B, H, R, T)."""

    logits: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.logits = products(*args, **(kwargs or {}))
            raise _CaughtError
        if func in SOFTMAX:  # of eager attention
            self.logits = args[0]
            raise _CaughtError
        return func(*args, **(kwargs or {}))


class _AllKeys:
    """Stands where a layer expects its cache, and answers with the keys and values of all tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


@torch.no_grad()
def attention_rows(
    layer: nn.Module,
    spec: LayerSpec,
    named: dict[str, Any],
    states_of: Callable[[], Tensor],
    group: Group,
    rows: Rows,
    live: Tensor,
) -> Attention:
    """Attention probabilities of some rows, without the T x T matrix.

    p[b, h, r] = softmax(q[b, h, rows[b, r]] k[b, h]^T scale + mask), over live tokens

    Args:
        layer: the decoder layer, about to be called.
        spec: how it is called.
        named: its arguments by name, for all (B, T) tokens.
        states_of: gives the (B, T, D) hidden states at its input.
        group: the samples to look at; with `active`, samples packed into rows, which are those tokens.
        rows: (B, R) of these samples.
        live: (B, T) bool, of these samples, the tokens that may be seen.

    Raises:
        UnsupportedError: the layer's attention is of a kind that cannot be caught, or a cache of a fixed length.

    Source: ours.
    """
    unshard: Any = getattr(layer, "unshard", None)
    if unshard is not None:
        # FSDP2 gathers parameters in a hook of the layer's call, which these runs go without. They stay gathered for
        # the call that follows, so that ranks that score and ranks that do not communicate alike.
        unshard()
    states, forward, cache = states_of(), spec.layer_class.forward, spec.cache or ""
    shape = (states.shape[0], states.shape[1])
    named = {spec.mask or "": None} | named
    _check_mask(named[spec.mask or ""], shape[1])
    float_mask = states.dtype if spec.backend(layer) == "eager" else None
    if group.active is not None:  # packed samples, each as a row of its own
        named = compact(named, group, Form(shape, spec.mask, float_mask, False))
        states = states[group.samples[:, None], group.active.index]
        shape = (states.shape[0], states.shape[1])
        group = replace(group, samples=torch.arange(shape[0], device=states.device), whole=True, active=None)
    maskless = {name: value for name, value in named.items() if name != spec.mask}
    if not group.whole:
        states = states[group.samples]
        maskless = {name: select(value, group, None, shape, name) for name, value in maskless.items()}
    # With a context, and merged, the mask is made for these rows against all T tokens.
    arguments = compact(named, replace(group, active=rows, context=rows), Form(shape, spec.mask, float_mask, True))
    chosen = states[torch.arange(len(states), device=states.device)[:, None], rows.index]
    kind = states.device.type
    # Older torch would remember the weights that autocast casts here, and leave them without gradients in the step.
    with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        keys, values = keys_values(layer, forward, states, maskless, cache)
        everyone = {cache: _AllKeys(keys, values)}
        logits = caught_logits(lambda: forward(layer, chosen, **(arguments | everyone)))
    # A single row of grouped queries comes as (B, G, H / G, T), where transformers packs it for decoding.
    logits = logits.reshape(len(states), -1, rows.index.shape[1], shape[1])
    return Attention(probabilities(logits, live), rows.valid, values)


def _check_mask(mask: Any, tokens: int) -> None:
    if isinstance(mask, Tensor) and mask.shape[-1] != tokens:
        raise UnsupportedError(
            f"the attention mask has {mask.shape[-1]} columns for {tokens} tokens, as with a cache of a fixed length; "
            "methods that score by attention generate with the default DynamicCache"
        )


def caught_logits(run: Callable[[], Any]) -> Tensor:
    """The attention logits (B, H, R, T) that a layer makes when it is run; nothing behind them runs.

    Raises:
        UnsupportedError: it makes none that can be caught.
    """
    catch = _Logits()
    with suppress(_CaughtError), catch:
        run()
    if catch.logits is None:
        raise UnsupportedError(
            "the layer ran without a call of scaled_dot_product_attention or softmax, so the attention that scores "
            "image tokens was not found; use a score that needs none, such as 'norm'"
        )
    return catch.logits


def probabilities(logits: Tensor, live: Tensor) -> Tensor:
    """Softmax in float32 over the live ones (B, T) of the T columns of logits (B, H, R, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.masked_fill(~live[:, None, None], -torch.inf).softmax(-1)
