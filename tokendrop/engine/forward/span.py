"""The call of a routed layer: spans entered and left, in the state of one forward.

Shape letters: B batch, T tokens, K computed rows, M context rows, N rows of all groups, D hidden, L layers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from tokendrop.engine.forward import generate
from tokendrop.engine.forward.attention_rows import attention_rows
from tokendrop.engine.forward.binding import Binding
from tokendrop.engine.forward.calls import Site, group_calls, grown_masks
from tokendrop.engine.forward.groups import Call, Work, joined_output, split_output
from tokendrop.engine.forward.ids import check_rows, generating
from tokendrop.engine.forward.packing import check_packing, form_of, keeps_apart, refuse_packs, told_packs, unkept
from tokendrop.engine.forward.passed import check_passed, passed_on
from tokendrop.engine.forward.state import Forward, Frame, frames, in_thread
from tokendrop.engine.forward.step import Step, decode, told
from tokendrop.engine.model.cache import HoledLayer, holed_layer, let_grow
from tokendrop.engine.model.decoder import reentrant
from tokendrop.engine.model.sets import FUSION, ROUTER
from tokendrop.engine.model.sight import Sight
from tokendrop.engine.plan.plan import Group, Plan, Span
from tokendrop.errors import LayoutWarning, MissingLayoutError, UnsupportedError
from tokendrop.kernels import gather_tokens, scatter_tokens
from tokendrop.roles import Attention, Role

WORK = "tokendrop_work"


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
            f"{in_thread()}{binding.handle.hint}"
        )
    frame = entered[-1]
    if frame is not None and frame.generates and torch.compiler.is_compiling() and _cached(binding, args, kwargs):
        return uncompiled(layer, proceed, args, kwargs)
    if frame is not None and binding.index == 0:
        hidden, named = binding.spec.bind(args, kwargs)
        frame.check(hidden, _cache(binding, named)[1])
        if frame.trained != (trained := binding.handle.trained(layer)):  # the mode changed inside the layout
            frame.plan, frame.trained = binding.handle.plan(frame.layout), trained
    if frame is None or frame.dense:
        sets = binding.handle.sets(binding.index)
        if len(sets) == 0 or not torch.is_grad_enabled():
            return proceed(*args, **kwargs)
        return proceed(*args, **kwargs, **{WORK: Work(binding.spec, (), sets)})
    hidden, named = binding.spec.bind(args, kwargs)
    forward = _forward(layer, binding, frame, hidden, named)
    if forward.step is None:
        out = _run(layer, binding, frame, forward, proceed, hidden, named)
    else:
        out = _decode(layer, binding, frame, forward, proceed, (hidden, named))
    if forward.next_layer == len(forward.plan.span_of):
        frame.losses, frame.forward = forward.selections.losses, None
    return out


def _cached(binding: Binding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = binding.spec.cache
    return name is not None and binding.spec.bind(args, kwargs)[1].get(name) is not None


@torch.compiler.disable
def uncompiled(layer: nn.Module, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same, where `generate` compiles a model whose cache has a fixed length: each token would compile anew."""
    return call(layer, proceed, args, kwargs)


def _forward(layer: nn.Module, binding: Binding, frame: Frame, hidden: Tensor, named: dict[str, Any]) -> Forward:
    name, forward = f"{type(layer).__name__} {binding.index}", frame.forward
    if binding.index == 0:
        shape = hidden.shape[0], hidden.shape[1]
        check_packing(named, form_of(layer, binding.spec, shape, named, hidden), binding.spec.backend(layer))
        forward = frame.forward = _begin(layer, binding, frame, hidden, named)
    elif forward is None or binding.index != forward.next_layer:
        due = 0 if forward is None else forward.next_layer
        raise UnsupportedError(
            f"{name} was called where layer {due} was due; each layer runs once, in order. A recompute wrapped around "
            "whole layers does this: use the model's own activation checkpointing"
        )
    if reentrant(layer) and (len(binding.handle.sets(binding.index)) or forward.plan.has_context):
        raise UnsupportedError(
            f"{name} recomputes inside a re-entrant backward, where gradients of CONTEXT states and image-only "
            "projections are lost; recompute with {'use_reentrant': False}"
        )
    forward.next_layer = binding.index + 1
    return forward


def _begin(layer: nn.Module, binding: Binding, frame: Frame, hidden: Tensor, named: dict[str, Any]) -> Forward:
    layout, shape = frame.layout, (hidden.shape[0], hidden.shape[1])
    cache, stored = _cache(binding, named)
    ids = generate.Ids(frame.ids, frame.saw_ids)
    if frame.generates and stored:
        return _continue(binding, frame, shape, ids, cache, stored)
    plan = _packed(layer, binding, frame, hidden, named)
    if not frame.generates or (cache is None and shape == plan.shape):
        check_rows(layout, range(len(layout.image)), ids.now, shape)
        frame.reach = shape[1]
        return frame.start(plan, prompt=plan)
    return _grow(binding, frame, hidden, plan, ids, cache)


def _grow(binding: Binding, frame: Frame, hidden: Tensor, prompt: Plan, ids: generate.Ids, cache: Any) -> Forward:
    handle, shape = binding.handle, (hidden.shape[0], hidden.shape[1])
    if shape != prompt.shape:
        refuse_packs(prompt)
    routes, _ = handle.served(prompt.layout)
    first, one_by_one = not frame.reach, frame.one_by_one(shape[1])
    generate.check_length(prompt.layout, ids, shape[1], one_by_one and not first)
    layout = generate.by_ids(prompt.layout, routes, ids, shape)
    order = generate.row_order(layout, routes, ids, hidden)
    check_rows(layout, order, ids.now, shape)
    image = generate.new_images(layout, ids, shape[0], shape[1] - layout.image.shape[1], one_by_one)
    generate.refuse_new_images(routes, image)
    plan = handle.plan(generate.grown(layout, routes, order, image), cache is not None)
    if not plan.dense:
        generate.refuse_routers(routes)
    if cache is not None:
        frame.caches[cache] = order
        if not plan.dense or generate.may_skip(routes):
            let_grow(cache)
    return frame.start(plan, cache, prompt=prompt)


def _continue(
    binding: Binding, frame: Frame, shape: tuple[int, int], ids: generate.Ids, cache: Any, stored: int
) -> Forward:
    refuse_packs(frame.plan)
    if cache not in frame.caches:
        raise UnsupportedError(
            f"a cache with {stored} tokens was not filled inside this layout; continue it inside the one that filled "
            "it, or generate from the prompt on inside this one"
        )
    routes, names = binding.handle.served(frame.layout)
    given = frame.layout, ids, *shape, frame.one_by_one(stored + shape[1])
    step = Step.of(generate.new_images(*given), generate.same_kind(*given), frame.caches[cache], routes, names)
    if step.any_image:
        generate.refuse_routers(routes)
        generate.refuse_new_images(routes, step.image)
    return frame.start(frame.plan, cache, step)


def _cache(binding: Binding, named: dict[str, Any]) -> tuple[Any, int]:
    cache = named.get(binding.spec.cache) if binding.spec.cache else None
    return cache, 0 if cache is None else int(cache.get_seq_length())


def _packed(layer: nn.Module, binding: Binding, frame: Frame, hidden: Tensor, named: dict[str, Any]) -> Plan:
    # The plan of the layout, and of the packed samples that a mask may keep apart and the layout does not know of.
    plan, layout, shape = frame.plan, frame.layout, (hidden.shape[0], hidden.shape[1])
    if shape != plan.shape or torch.compiler.is_compiling() or isinstance(hidden, FakeTensor):
        return plan
    form = form_of(layer, binding.spec, shape, named, hidden)
    apart = keeps_apart(form, named)
    if not apart and plan.packs is not None and form.kind is not None:
        message = unkept(len(plan.packs.rows), form)
        binding.handle.say_once("packs", message, LayoutWarning, 1)
    selects = any(span.selects for span in plan.spans)
    # Under `generate` positions begin again behind padding, and nowhere else.
    if not apart or layout.packs is not None or not selects or (frame.generates and generating()):
        return plan
    packs = told_packs(form, named, layout.padding)
    return plan if packs is None else binding.handle.plan(replace(layout, packs=packs))


def _run(
    layer: nn.Module,
    binding: Binding,
    frame: Frame,
    forward: Forward,
    proceed: Callable[..., Any],
    hidden: Tensor,
    named: dict[str, Any],
) -> Any:
    spec, index, cache = binding.spec, binding.index, forward.cache
    site = Site(layer, spec, index, forward.plan.shape, cache, forward.made)
    named = named if cache is None else grown_masks(site, named, forward.cut)
    span, positions = forward.span, forward.positions

    def look(*asked: Any) -> Attention:
        return attention_rows(layer, spec, positions.of(named), lambda: _full(forward, hidden), *asked)

    if span is None or index == span.stop:
        beside = map(dict(binding.handle.sets(index).items()).get, (ROUTER, FUSION))
        span, hidden = forward.selections.enter(forward.plan.span_of[index], hidden, look, *beside)
        forward.span = span
        hidden = _enter(forward, span, hidden)
        positions.enter(span)
    if index + 1 == span.stop < len(forward.plan.span_of):
        forward.selections.before(forward.plan.span_of[span.stop], look)
    frame.ran.append(span)
    check_passed(site, named, forward.passed, span)
    calls = group_calls(site, span, forward.context, positions.of(named), hidden)
    if cache is not None:
        positions.fill(cache, index, named)
    out = proceed(hidden, **{WORK: Work(spec, calls, binding.handle.sets(index))})
    states, rest = split_output(out)
    forward.passed += passed_on(site, named, span, rest)
    frame.returns_tuple = rest is not None
    if index < span.stop - 1:
        return out
    states = forward.selections.scaled(span, forward.full, _full(forward, states))
    states = forward.selections.leave(span.stop, states)
    forward.full, forward.context = None, ()
    return joined_output(states, rest)


def _decode(
    layer: nn.Module,
    binding: Binding,
    frame: Frame,
    forward: Forward,
    proceed: Callable[..., Any],
    given: tuple[Tensor, dict[str, Any]],
) -> Any:
    hidden, named = given
    index, step = binding.index, cast(Step, forward.step)
    cache, role = forward.cache, step.role(index)
    skips = role is Role.BYPASS
    if skips:
        holed_layer(cache, index, len(hidden), hidden.device)
    store = cache.layers[index] if index < len(cache.layers) else None  # a layer may keep its state elsewhere
    arguments: dict[str, Any] | None = forward.positions.step(store, named, *hidden.shape[:2])
    if isinstance(store, HoledLayer):
        sight, masks = told(layer, binding.spec, index), forward.made.setdefault("masks", [])
        arguments = decode(store, step, skips, arguments or {}, binding.spec.mask or "", sight, masks)
    if arguments is None:
        return (hidden,) if frame.returns_tuple else hidden
    split, ffn = step.split(index), step.text_rows() if role is Role.ATTEND else None
    if role is Role.ACTIVE and split is None and not isinstance(arguments.get(binding.spec.mask or ""), Sight):
        return proceed(hidden, **arguments)  # as a dense model would
    work = Call((len(hidden), hidden.shape[1]), arguments, split, None, {}, None, None, ffn=ffn)
    states, rest = split_output(proceed(hidden, **{WORK: Work(binding.spec, (work,), binding.handle.sets(index))}))
    if role in (Role.CONTEXT, Role.BYPASS, Role.GONE):
        states = torch.where(step.image[:, :, None], hidden, states)
    return joined_output(states, rest)


def _enter(forward: Forward, span: Span, full: Tensor) -> Tensor:
    forward.full = None if span.rows is None and forward.selections.scale is None else full
    if span.rows is None:
        return full
    forward.context = tuple(_context(full, group) for group in span.groups)
    return gather_tokens(_folded(full, span), span.rows.index)


def _full(forward: Forward, states: Tensor) -> Tensor:
    span = forward.span
    if span is None or span.rows is None or forward.full is None:
        return states
    rows, folded = span.rows, _folded(forward.full, span)
    return scatter_tokens(folded, states.to(folded.dtype), rows.index, rows.valid).view(forward.full.shape)


def _folded(full: Tensor, span: Span) -> Tensor:
    return full.reshape(1, -1, full.shape[-1]) if span.folded else full


def _context(full: Tensor, group: Group) -> Tensor | None:
    if group.context is None:
        return None
    return gather_tokens(full if group.whole else full[group.samples], group.context.index)
