"""The parameters added to each layer: image-only parts as copies of the text's, and routers.

Shape letters: T tokens, D hidden, L layers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.linears import is_linear, linear_shape
from tokendrop.engine.model.own import copies, source, taken
from tokendrop.engine.model.weights import home
from tokendrop.errors import UnsupportedError
from tokendrop.roles import Method

ROUTER = "router"


def set_names(methods: Mapping[str | None, Method]) -> dict[str | None, str]:
    """The projection set that each task uses: one for all where "shared", its own where "per-task"."""
    kinds = {"shared": lambda task: "image", "per-task": lambda task: f"image-{task}"}
    return {task: kinds[m.separate](task) for task, m in methods.items() if m.separate != "none"}


def make_sets(
    layers: nn.ModuleList,
    specs: Sequence[LayerSpec],
    methods: Mapping[str | None, Method],
    names: Mapping[str | None, str],
) -> nn.ModuleList:
    """The image-only parts of each layer, by set and part, as copies of the text's, and its router.

    Args:
        layers: the decoder's L layers.
        specs: how they are made.
        methods: by task.
        names: the set of each task, from `set_names`.
    """
    sets = nn.ModuleList()
    for index, (layer, spec) in enumerate(zip(layers, specs, strict=True)):
        wanted: dict[str, set[str]] = {}
        for task, name in names.items():
            wanted.setdefault(name, set()).update(methods[task].route(len(layers))[index].separate)
        made = {name: nn.ModuleDict(copies(layer, spec, parts)) for name, parts in sorted(wanted.items()) if parts}
        selects = [method.route(len(layers))[index].select for method in methods.values()]
        learned = [select for select in selects if select is not None and select.learned]
        gated = any(select.gate for select in learned)
        sets.append(nn.ModuleDict({**made, ROUTER: Router.of(layer, gated)} if learned else made))
    sets.__dict__["_made"] = frozenset(name for name, _ in sets.named_parameters())
    return sets


class Router(nn.Linear):
    """One number for each token, in float32 at least, whatever the precision around it."""

    @classmethod
    def of(cls, layer: nn.Module, gated: bool = False) -> "Router":
        """A router of a decoder layer's input, at random; `gated`, with a bias, all 0.

        Raises:
            UnsupportedError: no linear says how wide that is.
        """
        first = next((module for module in layer.modules() if is_linear(module)), None)
        if first is None:
            raise UnsupportedError(
                f"no linear in {type(layer).__name__} says its in_features and out_features, so nothing says how wide "
                "a router is; use a method without routers, or linears that say both"
            )
        device, dtype = home(first, layer)
        made = cls(linear_shape(first)[1], 1, bias=gated, device=device, dtype=dtype)
        if gated:
            nn.init.zeros_(made.weight)
            nn.init.zeros_(made.bias)
        return made

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias).squeeze(-1)


def fill_missing(
    sets: nn.ModuleList,
    prefix: str,
    path: str,
    layers: nn.ModuleList,
    specs: Sequence[LayerSpec],
    state: dict[str, Tensor],
) -> None:
    """Give a dense checkpoint what it lacks: image-only weights as copies of its text weights, and present routers.

    Args:
        sets: the image-only projections of each layer.
        prefix: key prefix of `sets` in `state`.
        path: key prefix of the decoder's layer list.
        layers: that list.
        specs: how the layers are made.
        state: the checkpoint; changed only if it holds no key under `prefix`.
    """
    if any(key.startswith(prefix) for key in state):
        return
    for key, present in sets.state_dict().items():
        if f".{ROUTER}." in key:
            state[prefix + key] = present
            continue
        index, _, part = key.split(".", 2)
        layer, spec = layers[int(index)], specs[int(index)]
        given = state.get(f"{path}.{index}.{source(layer, spec, part)[0]}")
        if given is not None and given.is_floating_point():  # not packed
            value = taken(layer, spec, part, given)
            state[prefix + key] = value.detach().clone(memory_format=torch.contiguous_format)
