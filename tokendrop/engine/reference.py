"""The definition of routing: the same roles executed densely with masks. Slow, and short enough to read.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.decoder import LayerSpec, find_layers, layer_spec
from tokendrop.engine.projections import own_linear
from tokendrop.layout import TokenLayout
from tokendrop.roles import LayerRoute, Method, Role


@contextmanager
def reference(
    model: nn.Module,
    methods: Mapping[str | None, Method],
    layout: TokenLayout,
    sets: Sequence[Any] = (),
    names: Mapping[str | None, str] | None = None,
    layers: str | None = None,
) -> Generator[None]:
    """Run the forwards of an untouched model inside under the roles of `methods`, densely.

    In each layer every row computes; BYPASS and GONE columns are masked; then rows that are not ACTIVE get their
    input back, which is also the frozen state that CONTEXT keys and values come from in the next layer.

    Args:
        model: an untouched model.
        methods: task -> method.
        layout: of the (B, T) tokens that run inside.
        sets: image-only projections of each layer, as `handle.layers`.
        names: task -> projection set, as `handle.names`.
        layers: dotted path of the decoder's layer list.

    Source: ours.
    """
    found = find_layers(model, layers)[1]
    spec = layer_spec(found[0], type(found[0]))
    names = names or {}
    routes = {task: method.route(len(found)) for task, method in methods.items()}
    with ExitStack() as stack:
        for index, layer in enumerate(found):
            dense = LayerRoute()
            per_sample = [routes[task][index] if task in routes else dense for task in layout.tasks]
            roles = torch.tensor([one.image for one in per_sample])[:, None].where(layout.image, int(Role.ACTIVE))
            for hook in _hooks(layer, spec, roles):
                stack.callback(hook.remove)
            for letter in "qkv" if names else "":
                rows = [
                    (sets[index][names[task]][letter], sample)
                    for sample, task in enumerate(layout.tasks)
                    if letter in per_sample[sample].separate
                ]
                hook = own_linear(layer, spec, letter).register_forward_hook(_replace(layout.image, rows))
                stack.callback(hook.remove)
        yield


def _hooks(layer: nn.Module, spec: LayerSpec, roles: Tensor) -> Iterator[Any]:
    active, hidden = roles == Role.ACTIVE, (roles == Role.BYPASS) | (roles == Role.GONE)
    entered: list[Tensor] = []

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states, named = spec.bind(args, kwargs)
        entered[:] = [states]
        named["attention_mask"] = _mask(named.get("attention_mask"), active, hidden, states, spec.backend(module))
        return (states,), named

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        states = torch.where(active[:, :, None], out[0] if isinstance(out, tuple) else out, entered.pop())
        return (states, *out[1:]) if isinstance(out, tuple) else states

    yield layer.register_forward_pre_hook(before, with_kwargs=True)
    yield layer.register_forward_hook(after)


def _mask(mask: Tensor | None, active: Tensor, hidden: Tensor, states: Tensor, backend: str) -> Tensor:
    tokens = states.shape[1]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(len(states), 1, -1, -1)
        if backend == "eager":
            mask = torch.zeros(mask.shape, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
    # A row whose output is thrown away sees itself, so that its softmax stays finite.
    unused = torch.eye(tokens, dtype=torch.bool) & ~active[:, None, :, None]
    seen = ~hidden[:, None, None, :] | unused
    return (mask & seen) | unused if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _replace(image: Tensor, rows: list[tuple[nn.Module, int]]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        (x,) = args
        for linear, sample in rows:
            own = torch.zeros(len(x), dtype=torch.bool).index_fill(0, torch.tensor(sample), True)
            out = torch.where((own[:, None] & image)[:, :, None], linear(x), out)
        return out

    return hook
