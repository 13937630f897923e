"""What the scoring rows of a layer look at, by the layer's own code up to its attention.

Shape letters: B batch, T tokens, R scoring rows, H heads, G heads of keys and values, W width, S sinks.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokendrop.engine.forward.arguments import Form, both_sides, compact, select
from tokendrop.engine.forward.packing import form_of
from tokendrop.engine.model.attention import choosing, settle
from tokendrop.engine.model.block_masks import is_block_mask, rows_of_block
from tokendrop.engine.model.context import keys_values
from tokendrop.engine.model.decoder import LayerSpec, attention_of
from tokendrop.engine.model.logits import SOFTMAX, products
from tokendrop.engine.model.sight import Sight
from tokendrop.engine.plan.plan import Group
from tokendrop.engine.plan.rows import Rows
from tokendrop.errors import UnsupportedError
from tokendrop.roles import Attention

_PRODUCTS: tuple[Any, ...] = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


class _CaughtError(Exception):
    """Raised where a layer has made its attention, to end it there."""


class Caught(NamedTuple):
    """What a layer's attention is made of.

    Args:
        logits: (B, H, R, T + S); sinks are columns at the end.
        values: (B, H or G, T, W); None where nothing is multiplied with them in a way that is known.
    """

    logits: Tensor
    values: Tensor | None


class _Catch(TorchFunctionMode):
    """Ends a layer where its attention ends, and keeps what it is made of."""

    logits: Tensor | None = None
    values: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.logits, self.values = products(*args, **(kwargs or {})), args[2]
            raise _CaughtError
        if self.logits is not None and func in _PRODUCTS:
            self.values = args[1]
            raise _CaughtError
        if self.logits is None and func in SOFTMAX:  # of eager attention
            self.logits = args[0]
        return func(*args, **(kwargs or {}))


class _AllKeys:
    """Stands where a layer expects its cache, and answers with the keys and values of all tokens."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class _Looking(NamedTuple):
    """The layer of which rows look, with its arguments.

    Args:
        layer: the decoder layer.
        spec: how it is called.
        named: its arguments by name, for all (B, T) tokens.
        group: the samples.
        states: (B, T, D) at its input, of all samples.
        form: what the arguments look like.
    """

    layer: nn.Module
    spec: LayerSpec
    named: dict[str, Any]
    group: Group
    states: Tensor
    form: Form


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
    if refusal := spec.context_refusal(layer, looks=True):
        raise UnsupportedError(f"image tokens are scored by the attention of {type(layer).__name__}, but {refusal}")
    unshard: Any = getattr(layer, "unshard", None)
    if unshard is not None:
        # FSDP2 gathers parameters in a hook of the layer's call, which these runs go without. They stay gathered for
        # the call that follows, so that ranks that score and ranks that do not communicate alike.
        unshard()
    look = _alone(_looking(layer, spec, {spec.mask or "": None} | named, group, states_of()))
    logits, values, keys = _run(look, rows)
    return Attention(probabilities(logits, live), rows.valid, values, keys)


def _run(look: _Looking, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    # The logits (B, H, R, T + S) of the rows, and values and keys (B, G, T, W).
    layer, group, forward, cache = look.layer, look.group, look.spec.layer_class.forward, look.spec.cache or ""
    states = look.states if group.whole else look.states[group.samples]
    arguments = _of_rows(look, rows)
    ours = look.form.kind not in ("sdpa", "eager")  # whose attention cannot be looked into
    if ours and not torch.compiler.is_compiling():
        settle(attention_of(layer))
    chosen = states[torch.arange(len(states), device=states.device)[:, None], rows.index]
    kind = states.device.type
    # Older torch would remember the weights that autocast casts here, and leave them without gradients in the step.
    with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False), choosing(ours):
        keys, values = keys_values(layer, forward, states, _of_keys(look), cache)
        everyone = {cache: _AllKeys(keys, values)}
        logits, attended = caught_attention(lambda: forward(layer, chosen, **(arguments | everyone)))
    # A single row of grouped queries comes as (B, G, H / G, T), where transformers packs it for decoding.
    logits = logits.reshape(len(states), -1, rows.index.shape[1], logits.shape[-1])
    # What a cache is given for values may be something they are made of, as in latent attention.
    return logits, values if attended is None else _each_once(attended, layer, keys), keys


def _each_once(attended: Tensor, layer: nn.Module, keys: Tensor) -> Tensor:
    # Values (B, G, T, W) of which there may be a copy for each query head of a group.
    attended = attended.reshape(len(keys), -1, *attended.shape[-2:])
    copies = getattr(attention_of(layer), "num_key_value_groups", 1)
    return attended[:, ::copies] if attended.shape[1] == copies * keys.shape[1] else attended


def _looking(layer: nn.Module, spec: LayerSpec, named: dict[str, Any], group: Group, states: Tensor) -> _Looking:
    mask, (batch, tokens) = spec.mask or "", states.shape[:2]
    form = form_of(layer, spec, (batch, tokens), named, states)
    _check_mask(named[mask], tokens)
    if named[mask] is None and form.both and not form.sight:
        named[mask] = both_sides(tokens, states, form.float_mask)
    return _Looking(layer, spec, named, group, states, form)


def _alone(look: _Looking) -> _Looking:
    # Packed samples, each as a row of its own.
    group, states, form = look.group, look.states, look.form
    if group.active is None:
        return look
    form = replace(form, sight=False, packs=None)
    named = compact(look.named, group, form)
    states = states[group.samples[:, None], group.active.index]
    group = replace(group, samples=torch.arange(len(states), device=states.device), whole=True, active=None)
    form = replace(form, shape=(states.shape[0], states.shape[1]), sight=look.form.sight)
    return look._replace(named=named, group=group, states=states, form=form)


def _of_keys(look: _Looking) -> dict[str, Any]:
    maskless = {name: None if name == look.spec.mask else value for name, value in look.named.items()}
    if look.group.whole:
        return maskless
    return {name: select(value, look.group, None, look.form.shape, name) for name, value in maskless.items()}


def _of_rows(look: _Looking, rows: Rows) -> dict[str, Any]:
    # With a context, and merged, the mask is made for these rows against all T tokens.
    group, form = replace(look.group, active=rows, context=rows), replace(look.form, merged=True)
    mask = look.named[name := look.spec.mask or ""]
    if not is_block_mask(mask):
        arguments = compact(look.named, group, form)
        if isinstance(sight := arguments[name], Sight):
            arguments[name] = replace(sight, own=None)
        return arguments
    seen = rows_of_block(mask, group.samples, rows.index)
    return compact(look.named | {name: None}, group, form) | {name: seen}


def _check_mask(mask: Any, tokens: int) -> None:
    if isinstance(mask, Tensor) and mask.shape[-1] != tokens:
        raise UnsupportedError(
            f"the attention mask has {mask.shape[-1]} columns for {tokens} tokens, as with a cache of a fixed length; "
            "methods that score by attention generate with the default DynamicCache"
        )


def caught_attention(run: Callable[[], Any]) -> Caught:
    """What the attention of a layer is made of when it is run; nothing behind it runs.

    Raises:
        UnsupportedError: it makes none that can be caught.
    """
    catch = _Catch()
    with suppress(_CaughtError), catch:
        run()
    if catch.logits is None:
        raise UnsupportedError(
            "the layer ran without a call of scaled_dot_product_attention or softmax, so the attention that scores "
            "image tokens was not found; use a score that needs none, such as 'norm'"
        )
    return Caught(catch.logits, catch.values)


def probabilities(logits: Tensor, live: Tensor) -> Tensor:
    """Softmax in float32 over the live ones (B, T) of the T columns of logits (B, H, R, T + S), and over S sinks.

    What the sinks take is left out of the result (B, H, R, T).
    """
    tokens, logits = live.shape[1], logits.to(torch.promote_types(logits.dtype, torch.float32))
    seen = F.pad(live, (0, logits.shape[-1] - tokens), value=True)
    return logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)[..., :tokens]
