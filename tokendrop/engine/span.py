"""The call of a routed layer: spans entered and left, in the state of one forward.

Shape letters: B batch, T tokens, K computed rows, M context rows, N rows of all groups, D hidden, L layers.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokendrop.engine.arguments import compact, select
from tokendrop.engine.decoder import LayerSpec, reentrant
from tokendrop.engine.forward import Call, Work, joined_output, split_output
from tokendrop.engine.plan import Group, Plan, Rows, Span
from tokendrop.errors import LayoutError, MissingLayoutError, UnsupportedError
from tokendrop.kernels import gather_tokens, scatter_tokens

if TYPE_CHECKING:
    from tokendrop.engine.inject import Handle

WORK = "tokendrop_work"


@dataclass(eq=False)
class Binding:
    """What ties a decoder layer to its handle."""

    handle: "Handle"
    index: int
    spec: LayerSpec


@dataclass(eq=False)
class Frame:
    """An entered `drop.layout(...)`, or with no plan an entered `drop.disabled()`; holds one forward at a time.

    Args:
        plan: what each layer computes.
        next_layer: the layer that runs next.
        full: (B, T, D), the hidden states as they entered the current span.
        context: for each group, (B, M, D) states of its context rows in the current span.
        made: compact arguments made in this forward, by identity of the argument and of the group.
    """

    plan: Plan | None
    next_layer: int = 0
    full: Tensor | None = None
    context: tuple[Tensor | None, ...] = ()
    made: dict[tuple[int, int, str], tuple[Any, Any]] = field(default_factory=dict)

    def reset(self) -> None:
        """Drop all that the last forward held."""
        self.next_layer, self.full, self.context = 0, None, ()
        self.made.clear()


_local = threading.local()


def frames(key: str) -> list[Frame]:
    """This thread's entered layouts of the handle `key`, innermost last."""
    by_key: dict[str, list[Frame]] = _local.__dict__.setdefault("frames", {})
    return by_key.setdefault(key, [])


def call(layer: nn.Module, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a routed layer: enter its span where it is the first of it, run, leave where it is the last.

    Args:
        layer: the decoder layer.
        proceed: its `nn.Module.__call__`.
        args: what the decoder calls it with.
        kwargs: likewise.

    Raises:
        MissingLayoutError: no layout was entered.
        LayoutError: hidden states that are not the layout's (B, T).
        UnsupportedError: re-entrant checkpointing with CONTEXT or projections; layers called out of order.
    """
    binding: Binding = layer.__dict__["_tokendrop"]
    entered = frames(binding.handle.key)
    if not entered:
        raise MissingLayoutError(
            f"{type(layer).__name__} {binding.index} runs without knowing which tokens are images; call the model "
            "inside `with drop.layout(layout):`, or inside `with drop.disabled():` to run it dense on purpose"
        )
    frame, sets = entered[-1], binding.handle.sets(binding.index)
    plan = frame.plan
    if plan is None or plan.dense:
        if len(sets) == 0 or not torch.is_grad_enabled():
            return proceed(*args, **kwargs)
        return proceed(*args, **kwargs, **{WORK: Work(binding.spec, (), sets)})
    hidden, named = binding.spec.bind(args, kwargs)
    _begin(layer, binding, frame, plan, hidden)
    span = plan.span_of[binding.index]
    if binding.index == span.start:
        hidden = _enter(frame, span, hidden)
    _drop_cache(binding.spec, named)
    calls = tuple(_group_call(layer, binding, frame, plan, i, named, hidden) for i in range(len(span.groups)))
    out = proceed(hidden, **{WORK: Work(binding.spec, calls, sets)})
    if binding.index == span.stop - 1:
        states, rest = split_output(out)
        out = joined_output(_leave(frame, span, states), rest)
    if frame.next_layer == len(plan.span_of):
        frame.reset()
    return out


def _begin(layer: nn.Module, binding: Binding, frame: Frame, plan: Plan, hidden: Tensor) -> None:
    name = f"{type(layer).__name__} {binding.index}"
    if binding.index == 0:
        frame.reset()
        if tuple(hidden.shape[:2]) != plan.shape:
            raise LayoutError(
                f"the hidden states are {tuple(hidden.shape)}, but the layout is for (B, T) = {plan.shape}; enter the "
                "layout of this very batch"
            )
    elif binding.index != frame.next_layer:
        raise UnsupportedError(
            f"{name} was called where layer {frame.next_layer} was due; each layer runs once, in order. A recompute "
            "wrapped around whole layers does this: use the model's own gradient_checkpointing_enable()"
        )
    if reentrant(layer) and (len(binding.handle.sets(binding.index)) or plan.has_context):
        raise UnsupportedError(
            f"{name} recomputes inside a re-entrant backward, where gradients of CONTEXT states and image-only "
            "projections are lost; use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    frame.next_layer = binding.index + 1


def _enter(frame: Frame, span: Span, full: Tensor) -> Tensor:
    if span.rows is None:
        return full
    frame.full = full
    frame.context = tuple(_context(full, group) for group in span.groups)
    return gather_tokens(_folded(full, span), span.rows.index)


def _leave(frame: Frame, span: Span, states: Tensor) -> Tensor:
    if span.rows is None or frame.full is None:
        return states
    full, rows = frame.full, span.rows
    folded = _folded(full, span)
    if rows.valid is not None:
        states = torch.where(rows.valid[:, :, None], states, gather_tokens(folded, rows.index))
    frame.full, frame.context = None, ()
    return scatter_tokens(folded, states.to(folded.dtype), rows.index).view(full.shape)


def _folded(full: Tensor, span: Span) -> Tensor:
    return full.reshape(1, -1, full.shape[-1]) if span.folded else full


def _context(full: Tensor, group: Group) -> Tensor | None:
    if group.context is None:
        return None
    return gather_tokens(full if group.whole else full[group.samples], group.context.index)


def _drop_cache(spec: LayerSpec, named: dict[str, Any]) -> None:
    cache = named.get(spec.cache) if spec.cache else None
    if cache is None or spec.cache is None:
        return
    if cache.get_seq_length():
        raise UnsupportedError(
            f"a cache with {cache.get_seq_length()} tokens reached a routed layer; run the model with use_cache=False"
        )
    named[spec.cache] = None


def _group_call(
    layer: nn.Module, binding: Binding, frame: Frame, plan: Plan, which: int, named: dict[str, Any], hidden: Tensor
) -> Call:
    group, spec = plan.span_of[binding.index].groups[which], binding.spec
    float_mask = hidden.dtype if spec.backend(layer) == "eager" else None

    def once(kind: str, name: str, make: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        key = (id(named[name]), id(group), kind + name)
        if key not in frame.made:
            frame.made[key] = (named[name], make({name: named[name]})[name])
        return frame.made[key][1]

    arguments = {n: once("active ", n, lambda one: compact(one, group, plan.shape, float_mask)) for n in named}
    rows = plan.shape[1] if group.active is None else group.active.index.shape[1]
    shape = (len(group.samples), rows)
    context = frame.context[which] if group.context is not None else None
    if context is None:
        return Call(shape, arguments, group.splits, None, {}, {})

    def chosen(one: dict[str, Any], rows: Rows | None = group.context) -> dict[str, Any]:
        return {name: select(value, group, rows, plan.shape) for name, value in one.items()}

    context_arguments = {n: once("context ", n, chosen) for n in named if n == "position_embeddings"}
    return Call(shape, arguments, group.splits, context, context_arguments, group.context_splits)
