"""The definition of routing: the same roles executed densely with masks. Slow, and short enough to read.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.model.decoder import LayerSpec, find_layers, layer_specs, sees_both_sides
from tokendrop.engine.model.ffn import ffn_of
from tokendrop.engine.model.sets import make_sets
from tokendrop.engine.model.swap import restore
from tokendrop.engine.model.vision import Encoder
from tokendrop.engine.reference_parts import own_hooks
from tokendrop.engine.reference_roles import Roles, masked
from tokendrop.layout import TokenLayout
from tokendrop.roles import (
    LayerRoute,
    Method,
    Role,
    selections,
)


@contextmanager
def reference(
    model: nn.Module,
    methods: Mapping[str | None, Method],
    layout: TokenLayout,
    sets: Sequence[Any] = (),
    names: Mapping[str | None, str] | None = None,
    layers: str | None = None,
    step: tuple[int, int] = (0, 0),
) -> Generator[None]:
    """Run the forwards of an untouched model inside under the roles of `methods`, densely.

    In each layer every row computes; BYPASS and GONE columns are masked; then rows that are not ACTIVE get their
    input back, which is also the frozen state that CONTEXT keys and values come from in the next layer. ATTEND rows
    compute, and what the FFN gives is zero for them.

    Args:
        model: an untouched model.
        methods: task -> method.
        layout: of the (B, T) tokens that run inside.
        sets: image-only projections and router of each layer, as `handle.layers`; by default the text's, and the
            routers that `apply` would make.
        names: task -> projection set, as `handle.names`.
        layers: dotted path of the decoder's layer list.
        step: the optimiser step and the micro-batch.

    Source: ours.
    """
    found = find_layers(model, layers)[1]
    specs = layer_specs(found)
    names = names or {}
    dense = (LayerRoute(),) * len(found)
    by_task = {task: method.route(len(found)) for task, method in methods.items()}
    routes = [by_task.get(task, dense) for task in layout.tasks]
    sets = sets or list(make_sets(found, specs, methods, {}))
    roles = Roles(routes, layout, step, sets)
    with ExitStack() as stack:
        if looked := {index for select in selections(routes) for index in select.encoder}:
            roles.encoder = Encoder(model, looked)
            roles.encoder.watch(lambda: roles.seen)
            stack.callback(lambda watched: [restore(one) for one in watched], roles.encoder.watched)
        for index, (layer, spec) in enumerate(zip(found, specs, strict=True)):
            # Before those of the roles: what a role leaves out has no parts of its own.
            own = [
                (i, {part: sets[index][names[task]][part] for part in routes[i][index].separate})
                for i, task in enumerate(layout.tasks)
                if routes[i][index].separate and task in names
            ]
            for hook in own_hooks(layer, spec, layout.image, own) if own else ():
                stack.callback(hook.remove)
            for hook in _hooks(layer, spec, partial(roles.of, index, layer, spec), roles):
                stack.callback(hook.remove)
        yield


def _hooks(layer: nn.Module, spec: LayerSpec, roles_of: Callable[..., Any], state: Roles) -> Iterator[Any]:
    entered: list[Tensor] = []
    ffn = ffn_of(layer)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states, named = spec.bind(args, kwargs)
        roles, states = roles_of(states, named)
        attend, hidden = roles == Role.ATTEND, (roles == Role.BYPASS) | (roles == Role.GONE)
        active = attend | (roles == Role.ACTIVE)
        entered[:] = [states, active, attend]
        named = state.turned(named)
        mask, causal = named.get("attention_mask"), not sees_both_sides(module)
        named["attention_mask"] = masked(mask, active, hidden, states, spec.backend(module), causal)
        return (states,), named

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        before, active, _ = entered
        states = torch.where(active[:, :, None], out[0] if isinstance(out, tuple) else out, before)
        if bool((state.scale != 1).any()):
            states = before + state.scale[:, :, None].to(states.dtype) * (states - before)
        states = torch.where(active[:, :, None], states, state.weight[:, :, None].to(states.dtype) * states)
        states = state.restored(len(state.inputs) - 1, states)
        return (states, *out[1:]) if isinstance(out, tuple) else states

    def skip(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        made = out[0] if isinstance(out, tuple) else out
        made = made.masked_fill(entered[2].view(*made.shape[:-1], 1), 0)
        made = made * state.weight.view(*made.shape[:-1], 1).to(made.dtype)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    if ffn is not None:
        yield ffn.register_forward_hook(skip)
    yield layer.register_forward_pre_hook(before, with_kwargs=True)
    yield layer.register_forward_hook(after)
