"""What one group needs in one layer: its arguments made compact, once per forward.

Shape letters: B batch, T tokens, K computed rows, M context rows, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.arguments import Form, compact, select
from tokendrop.engine.forward.groups import Call
from tokendrop.engine.model.cache import growing_layer, holed_layer
from tokendrop.engine.model.decoder import LayerSpec, sees_both_sides
from tokendrop.engine.plan.plan import Group, Span
from tokendrop.engine.plan.rows import Rows
from tokendrop.errors import UnsupportedError
from tokendrop.roles import Role

Made = dict[tuple[int, str, str], list[tuple[Any, Rows | None, Any]]]
_MISSING = object()


def group_calls(
    layer: nn.Module,
    spec: LayerSpec,
    index: int,
    span: Span,
    tokens_shape: tuple[int, int],
    contexts: tuple[Tensor | None, ...],
    cache: Any,
    made: Made,
    named: dict[str, Any],
    hidden: Tensor,
) -> tuple[Call, ...]:
    """What each group of a layer needs.

    Args:
        layer: the decoder layer.
        spec: how it is called.
        index: which it is.
        span: it belongs to.
        tokens_shape: (B, T).
        contexts: for each group, (B, M, D) states of its context rows.
        cache: what this forward fills, if anything.
        made: compact arguments made so far in this forward, with what they were made of.
        named: the layer's arguments by name, for all (B, T) tokens.
        hidden: the layer's hidden states.

    Raises:
        UnsupportedError: a cache to fill, and groups with different roles, or a state carried from row to row; CONTEXT
            under an attention that has been changed since to one that cannot have it.
    """
    if spec.cache in named:
        named[spec.cache] = cache
    if spec.mask is not None and any(group.context is not None for group in span.groups):
        if refusal := spec.context_refusal(layer):
            raise UnsupportedError(f"image tokens are CONTEXT in layer {index}, but {refusal}; or use HMGen")
        named.setdefault(spec.mask, None)
        named.setdefault(spec.cache or "", cache)
    if spec.mask is not None and named.get(spec.mask) is None and sees_both_sides(layer):
        named[spec.mask] = _everyone(made, tokens_shape[1], hidden, spec.backend(layer) == "eager")
    if cache is not None:
        _fill(spec, span, index, cache, tokens_shape[1])
    float_mask = hidden.dtype if spec.backend(layer) == "eager" else None
    calls = []
    for group, context in zip(span.groups, contexts or (None,) * len(span.groups), strict=True):
        merged = cache is not None and group.context is not None
        late = group.late if named.get(spec.mask or "") is None and float_mask is None and not merged else None

        def active(one: dict[str, Any], group: Group = group, merged: bool = merged) -> dict[str, Any]:
            return compact(one, group, Form(tokens_shape, spec.mask, float_mask, merged))

        arguments = _once(made, group, "active", named, active)
        shape = (len(group.samples), group.size)
        if context is None:
            calls.append(Call(shape, arguments, group.split, None, {}, None, None, ffn=group.ffn))
            continue

        def chosen(one: dict[str, Any], group: Group = group) -> dict[str, Any]:
            return {name: select(value, group, group.context, tokens_shape, name) for name, value in one.items()}

        # No mask: nothing behind the keys and values of these rows runs.
        maskless = {name: None if name == spec.mask else value for name, value in named.items()}
        context_arguments = _once(made, group, "context", maskless, chosen)
        order = _order(group.active, group.context, tokens_shape[1]) if merged else None
        calls.append(Call(shape, arguments, group.split, context, context_arguments, group.context_split, order, late))
    return tuple(calls)


def _once(
    made: Made, group: Group, kind: str, named: dict[str, Any], make: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    out = {}
    for name, value in named.items():
        same = made.setdefault((group.number, kind, name), [])
        found = next((result for given, rows, result in same if _same(given, value) and rows is group.active), _MISSING)
        if found is _MISSING:
            found = make({name: value})[name]
            same.append((value, group.active, found))
        out[name] = found
    return out


def _everyone(made: Made, tokens: int, hidden: Tensor, additive: bool) -> Tensor:
    # The mask that says what None means where attention sees both sides, once per forward.
    same = made.setdefault((-1, "both sides", ""), [])
    if not same:
        seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=hidden.device)
        same.append((None, None, hidden.new_zeros(seen.shape) if additive else seen))
    return same[0][2]


def _same(one: Any, other: Any) -> bool:
    # Dynamo cannot ask whether two tuples are one.
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return one is other


def _fill(spec: LayerSpec, span: Span, index: int, cache: Any, tokens: int) -> None:
    if len(span.groups) > 1:
        names = " and ".join(sorted(group.role.name for group in span.groups))
        raise UnsupportedError(
            f"image tokens are {names} in layer {index} of one batch; with a cache, generate the tasks in batches of "
            "their own, or pass use_cache=False"
        )
    (group,) = span.groups
    if group.context is not None:
        growing_layer(cache, index)
    if group.role in (Role.BYPASS, Role.GONE) and group.active is not None:
        if spec.recurrent:
            raise UnsupportedError(
                f"{spec.recurrent} of layer {index} carries a state from row to row, into which rows that only fill up "
                "would enter; generate with use_cache=False"
            )
        rows = group.active
        holed_layer(cache, index, len(rows.index), rows.index.device).expect(rows.index, rows.valid, tokens)


def _order(active: Rows | None, context: Rows | None, tokens: int) -> Tensor | None:
    if active is None or context is None:
        return None
    positions = torch.cat([rows.index.where(rows.valid, tokens) for rows in (active, context)], 1)
    return positions.argsort(dim=1, stable=True)[:, :tokens]
