"""The forward of a routed layer: its groups one after another, inside the layer's own hooks.

Shape letters: B batch, T tokens, K computed rows, M context rows, N rows of all groups, D hidden.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.split_attention import split_attention
from tokendrop.engine.model.attention import choosing
from tokendrop.engine.model.attention import settle as settle_attention
from tokendrop.engine.model.context import ContextKeys, keys_values
from tokendrop.engine.model.decoder import LayerSpec, attention_of
from tokendrop.engine.model.ffn import gated, some_rows
from tokendrop.engine.model.own import settle
from tokendrop.engine.model.projections import touch
from tokendrop.engine.model.sight import Sight
from tokendrop.engine.model.using import using
from tokendrop.engine.plan.rows import Rows, Split


class Call(NamedTuple):
    """What one group needs in one layer. A tuple, so that FSDP2 finds the tensors that need gradients.

    Args:
        shape: (B, K) of the group's computing rows.
        arguments: the layer's arguments for them.
        split: which projections they use.
        context: (B, M, D) states of the context rows, or None.
        context_arguments: the layer's arguments for the context rows.
        context_split: which projections these use.
        order: (B, T), puts the keys of context rows and of computing rows into token order for a cache; or None.
        late: what the rows behind the image see, where attention is split there; or None.
        ffn: of the computing rows, those whose FFN runs; None for all.
        gate: (B, K), what scales the FFN's output; or None.
    """

    shape: tuple[int, int]
    arguments: dict[str, Any]
    split: Split | None
    context: Tensor | None
    context_arguments: dict[str, Any]
    context_split: Split | None
    order: Tensor | None
    late: Tensor | None = None
    ffn: Rows | None = None
    gate: Tensor | None = None


class Work(NamedTuple):
    """All that a layer's forward needs beside its hidden states; travels as one argument, also into a recompute.

    Args:
        spec: how the layer is called.
        calls: one for each group; none for a layer that runs as it is called, with its added parameters touched.
        sets: the layer's image-only projections.
    """

    spec: LayerSpec
    calls: tuple[Call, ...]
    sets: nn.ModuleDict


def run(
    layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], work: Work
) -> Any:
    """The layer's own `forward` on each group of compact rows.

    Args:
        layer: the decoder layer.
        forward: its own forward, unbound.
        args: hidden states (B, K, D), or (1, N, D) where several groups travel together; and what follows them.
        kwargs: other arguments, where `work` has no calls.
        work: what the groups need.

    Returns:
        What the layer returns, with hidden states shaped like the ones given.
    """
    if not work.calls:
        out, rest = split_output(forward(layer, *args, **kwargs))
        return joined_output(touch(work.sets, out), rest)
    hidden: Tensor = args[0]
    outs: list[Tensor] = []
    rest: tuple[Any, ...] | None = None
    at = 0
    for call in work.calls:
        x = hidden
        if len(work.calls) > 1:
            rows = call.shape[0] * call.shape[1]
            x, at = hidden[0, at : at + rows].view(*call.shape, -1), at + rows
        if (call.split is not None or call.context is not None) and not torch.compiler.is_compiling():
            settle(layer, work.spec, work.sets)  # an adapter may have come or gone inside the layout
        arguments = _arguments(layer, forward, call, work)
        ours = choosing(_chosen(layer, work, arguments))
        ffn = some_rows(call.ffn, call.shape[1]), gated(call.gate)
        with using(call.split, work.sets, call.shape), split_attention(call.late), ffn[0], ffn[1], ours:
            out, rest = split_output(forward(layer, x, **arguments))
        outs.append(out)
    out = outs[0] if len(outs) == 1 else torch.cat([out.reshape(1, -1, out.shape[-1]) for out in outs], 1)
    return joined_output(touch(work.sets, out) if torch.is_grad_enabled() else out, rest)


def _chosen(layer: nn.Module, work: Work, arguments: dict[str, Any]) -> bool:
    # Whether the layer's attention is given a sight, which is ours to follow.
    if not isinstance(arguments.get(work.spec.mask or ""), Sight):
        return False
    if not torch.compiler.is_compiling():  # the attention may have been exchanged since the layout was entered
        settle_attention(attention_of(layer))
    return True


def _arguments(layer: nn.Module, forward: Callable[..., Any], call: Call, work: Work) -> dict[str, Any]:
    cache = work.spec.cache
    if call.context is None or cache is None:
        return call.arguments
    shape = (call.context.shape[0], call.context.shape[1])
    with using(call.context_split, work.sets, shape, queries=False):
        keys, values = keys_values(layer, forward, call.context, call.context_arguments, cache)
    return call.arguments | {cache: ContextKeys(keys, values, call.order, call.arguments[cache])}


def split_output(out: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """A layer's hidden states, and the rest of the tuple it returns, if it does."""
    return (out[0], tuple(out[1:])) if isinstance(out, tuple) else (out, None)


def joined_output(states: Tensor, rest: tuple[Any, ...] | None) -> Any:
    """The inverse of `split_output`."""
    return states if rest is None else (states, *rest)
