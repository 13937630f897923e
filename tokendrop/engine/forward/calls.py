"""What one group needs in one layer: its arguments made compact, once per forward.

Shape letters: B batch, T tokens, K computed rows, M context rows, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.arguments import Form, both_sides, compact, select
from tokendrop.engine.forward.groups import Call
from tokendrop.engine.forward.packing import form_of
from tokendrop.engine.model.block_masks import first_columns, has_columns
from tokendrop.engine.model.cache import growing_layer, grows, holed_layer
from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.plan.plan import Group, Span
from tokendrop.engine.plan.rows import Rows
from tokendrop.errors import UnsupportedError
from tokendrop.roles import Role

# What was made, by group, kind and name, with what it was made of; and the packed samples.
Made = dict[Any, Any]
_MISSING = object()


@dataclass(frozen=True, eq=False)
class Site:
    """A layer of one forward.

    Args:
        layer: the decoder layer.
        spec: how it is called.
        index: which it is.
        shape: (B, T).
        cache: what this forward fills, if anything.
        made: compact arguments made so far in this forward, with what they were made of.
    """

    layer: nn.Module
    spec: LayerSpec
    index: int
    shape: tuple[int, int]
    cache: Any
    made: Made


def group_calls(
    site: Site, span: Span, contexts: tuple[Tensor | None, ...], named: dict[str, Any], hidden: Tensor
) -> tuple[Call, ...]:
    """What each group of a layer needs.

    Args:
        site: the layer.
        span: it belongs to.
        contexts: for each group, (B, M, D) states of its context rows.
        named: the layer's arguments by name, for all (B, T) tokens.
        hidden: the layer's hidden states.

    Raises:
        UnsupportedError: a cache to fill, and groups with different roles, or a state carried from row to row; CONTEXT
            under an attention that has been changed since to one that cannot have it.
    """
    spec, cache = site.spec, site.cache
    if spec.cache in named:
        named[spec.cache] = cache
    if spec.mask is not None and any(group.context is not None for group in span.groups):
        if refusal := spec.context_refusal(site.layer):
            raise UnsupportedError(f"image tokens are CONTEXT in layer {site.index}, but {refusal}; or use HMGen")
        named.setdefault(spec.cache or "", cache)
        named.setdefault(spec.mask, None)
    form = form_of(site.layer, spec, site.shape, named, hidden, site.made)
    if spec.mask is not None and form.sight:
        named.setdefault(spec.mask, None)
    elif spec.mask is not None and named.get(spec.mask) is None and form.both:
        named[spec.mask] = _everyone(form, site.made, hidden)
    if cache is not None:
        _fill(site, span)
    contexts = contexts or (None,) * len(span.groups)
    return tuple(_call(site, form, *each, named) for each in zip(span.groups, contexts, strict=True))


def _call(site: Site, form: Form, group: Group, context: Tensor | None, named: dict[str, Any]) -> Call:
    mask, tokens = form.mask or "", form.shape[1]
    form = replace(form, merged=site.cache is not None and group.context is not None)
    kind = "active, sequences" if form.sight else "active"
    arguments = _once(site.made, group, kind, named, lambda one: compact(one, group, form))
    shape = (len(group.samples), group.size)
    if context is None:
        return Call(shape, arguments, group.split, None, {}, None, None, ffn=group.ffn, gate=group.gate)

    def chosen(one: dict[str, Any]) -> dict[str, Any]:
        return {name: select(value, group, group.context, form.shape, name) for name, value in one.items()}

    # No mask: nothing behind the keys and values of these rows runs.
    maskless = {name: None if name == mask else value for name, value in named.items()}
    context_arguments = _once(site.made, group, "context", maskless, chosen)
    order = _order(group.active, group.context, tokens) if form.merged else None
    late = group.late if named.get(mask) is None and form.kind == "sdpa" and not form.merged else None
    return Call(shape, arguments, group.split, context, context_arguments, group.context_split, order, late)


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


def _everyone(form: Form, made: Made, hidden: Tensor) -> Tensor:
    # Made once per forward.
    same = made.setdefault((-1, "both sides", ""), [])
    if not same:
        same.append((None, None, both_sides(form.shape[1], hidden, form.float_mask)))
    return same[0][2]


def _same(one: Any, other: Any) -> bool:
    # Dynamo cannot ask whether two tuples are one.
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return one is other


def _fill(site: Site, span: Span) -> None:
    spec, index, cache = site.spec, site.index, site.cache
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
        _expect(site, group, group.active)


def _expect(site: Site, group: Group, rows: Rows) -> None:
    # Rows that fill up in every sample are not stored. Layers of the same rows share what says which they are.
    most = max(group.counts)
    same = site.made.setdefault((group.number, "stored", ""), [])
    found = next((stored for given, stored in same if given is rows), None)
    if found is None:
        found = rows if most == group.size else Rows(rows.index[:, :most], rows.valid[:, :most])
        same.append((rows, found))
    store = holed_layer(site.cache, site.index, len(rows.index), rows.index.device)
    store.expect(found.index, found.valid, site.shape[1], group.size - most, min(group.counts) == most)


def _order(active: Rows | None, context: Rows | None, tokens: int) -> Tensor | None:
    if active is None or context is None:
        return None
    positions = torch.cat([rows.index.where(rows.valid, tokens) for rows in (context, active)], 1)
    return positions.argsort(dim=1, stable=True)[:, :tokens]


def grown_masks(site: Site, named: dict[str, Any], cut: list[tuple[Any, Any]]) -> dict[str, Any]:
    """The arguments with a mask without its columns behind T: the model made it before a cache of a fixed length grew.

    Args:
        site: the layer.
        named: its arguments for all (B, T) tokens.
        cut: masks that were cut, and what is left of them; added to.
    """
    name, tokens = site.spec.mask or "", site.shape[1]
    mask: Any = named.get(name)
    if not has_columns(mask) or mask.shape[-1] <= tokens or not grows(site.cache, site.index):
        return named
    if not any(given is mask for given, _ in cut):
        cut.append((mask, first_columns(mask, tokens)))
    return named | {name: next(left for given, left in cut if given is mask)}
