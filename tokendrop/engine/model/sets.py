"""The parameters added to each layer: image-only parts as copies of the text's, routers and fusions.

Shape letters: N samples, T tokens, D hidden, L layers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.linears import is_linear, linear_shape
from tokendrop.engine.model.own import copies, source, taken
from tokendrop.engine.model.weights import home
from tokendrop.errors import UnsupportedError
from tokendrop.roles import Method, selections
from tokendrop.routes import route_of

ROUTER, FUSION = "router", "fusion"


def set_names(methods: Mapping[str | None, Method | None]) -> dict[str | None, str]:
    """The projection set that each task uses: one for all where "shared", its own where "per-task"."""
    kinds = {"shared": lambda task: "image", "per-task": lambda task: f"image-{task}"}
    return {task: kinds[m.separate](task) for task, m in methods.items() if m and m.separate != "none"}


def make_sets(
    layers: nn.ModuleList,
    specs: Sequence[LayerSpec],
    methods: Mapping[str | None, Method],
    names: Mapping[str | None, str],
) -> nn.ModuleList:
    """The image-only parts of each layer, by set and part, as copies of the text's, its router and its fusion.

    Args:
        layers: the decoder's L layers.
        specs: how they are made.
        methods: by task.
        names: the set of each task, from `set_names`.
    """
    sets = nn.ModuleList()
    routes = {task: route_of(method, len(layers)) for task, method in methods.items()}
    for index, (layer, spec) in enumerate(zip(layers, specs, strict=True)):
        wanted: dict[str, set[str]] = {}
        for task, name in names.items():
            wanted.setdefault(name, set()).update(routes[task][index].separate)
        made = {name: nn.ModuleDict(copies(layer, spec, parts)) for name, parts in sorted(wanted.items()) if parts}
        selects = selections((route[index],) for route in routes.values())
        beside: dict[str, nn.Module] = {}
        if learned := [select for select in selects if select.learned]:
            beside[ROUTER] = Router.of(layer, any(select.gate for select in learned))
        if any(select.fuse and select.layer == index for select in selects):
            beside[FUSION] = Fusion(*_beside(layer, "fusion"))
        sets.append(nn.ModuleDict({**made, **beside}))
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
        width, device, dtype = _beside(layer, "router")
        made = cls(width, 1, bias=gated, device=device, dtype=dtype)
        if gated:
            nn.init.zeros_(made.weight)
            nn.init.zeros_(made.bias)
        return made

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias).squeeze(-1)


class Fusion(nn.Module):
    """What image tokens are given where they rejoin: a projection of deep and shallow states, beside what they are.

    out = r + W [y; x] + b with r = y for a token that was kept, else r = x and y the mask token; W, b are 0 at first

    Args:
        width: D.
        device: of the parameters.
        dtype: likewise.

    Source: arXiv 2510.21986, whose out is W [y; x] + b, with weights at random; from 0, beside r, a pretrained model
    begins as it is.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.mask = nn.Parameter(nn.init.normal_(torch.empty(width, device=device, dtype=dtype), std=0.02))
        self.linear = nn.Linear(2 * width, width, device=device, dtype=dtype)
        for p in self.linear.parameters():
            nn.init.zeros_(p)

    def forward(self, shallow: Tensor, states: Tensor, image: Tensor, kept: Tensor) -> Tensor:
        """`states` (N, T, D) behind the range, the image tokens fused with what they were at its entry.

        Args:
            shallow: (N, T, D), at its entry.
            states: of all tokens behind it.
            image: (N, T) bool, the image tokens.
            kept: (N, T) bool, those that computed in it.
        """
        deep = states.where(kept[:, :, None], self.mask.to(states.dtype))
        both = torch.cat([deep, shallow], -1).to(self.linear.weight.dtype)
        fused = self.linear(both).to(states.dtype)
        return states + fused.masked_fill(~image[:, :, None], 0)


def _beside(layer: nn.Module, what: str) -> tuple[int, torch.device, torch.dtype]:
    # How wide the input of a layer is, and where a parameter beside it belongs.
    first = next((module for module in layer.modules() if is_linear(module)), None)
    if first is None:
        raise UnsupportedError(
            f"no linear in {type(layer).__name__} says its in_features and out_features, so nothing says how wide "
            f"a {what} is; use a method without {what}s, or linears that say both"
        )
    return linear_shape(first)[1], *home(first, layer)


def fill_missing(
    sets: nn.ModuleList,
    prefix: str,
    path: str,
    layers: nn.ModuleList,
    specs: Sequence[LayerSpec],
    state: dict[str, Tensor],
) -> None:
    """Give a dense checkpoint what it lacks: image-only weights as copies of its text weights, and the rest as it is.

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
        if key.split(".")[1] in (ROUTER, FUSION):
            state[prefix + key] = present
            continue
        index, _, part = key.split(".", 2)
        layer, spec = layers[int(index)], specs[int(index)]
        given = state.get(f"{path}.{index}.{source(layer, spec, part)[0]}")
        if given is not None and given.is_floating_point():  # not packed
            value = taken(layer, spec, part, given)
            state[prefix + key] = value.detach().clone(memory_format=torch.contiguous_format)
