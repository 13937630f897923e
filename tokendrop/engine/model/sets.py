"""The parameters added to each layer: image-only projections as copies of the text's, and routers.

Shape letters: T tokens, D hidden, L layers.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.linears import is_linear, linear_shape
from tokendrop.engine.model.projections import parts_of
from tokendrop.engine.model.weights import home, weights_of
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
    """The image-only projections of each layer, by set and letter, as copies of the text's, and its router.

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
        made = {
            name: nn.ModuleDict(dict(sorted(_copies(layer, spec, letters).items())))
            for name, letters in sorted(wanted.items())
            if letters
        }
        selects = [method.route(len(layers))[index].select for method in methods.values()]
        learned = [select for select in selects if select is not None and select.learned]
        gated = any(select.gate for select in learned)
        sets.append(nn.ModuleDict({**made, ROUTER: Router.of(layer, gated)} if learned else made))
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


def _copies(layer: nn.Module, spec: LayerSpec, wanted: set[str]) -> dict[str, nn.Linear]:
    made = {}
    for _, letters in spec.linears:
        if wanted.isdisjoint(letters):
            continue
        parts, (weight, bias) = parts_of(layer, spec, letters), weights_of(spec.linear(layer, letters[0]), layer)
        for letter in wanted & set(letters):
            own = parts.piece(weight, letter, 0), None if bias is None else parts.piece(bias, letter)
            made[letter] = _linear(*own).train(layer.training)
    return made


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


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
        index, _, letter, kind = key.split(".")
        spec = specs[int(index)]
        name, letters = next((name, letters) for name, letters in spec.linears if letter in letters)
        source = f"{path}.{index}.{spec.attention}.{name}.{kind}"
        if source in state and state[source].is_floating_point():  # not packed
            parts = parts_of(layers[int(index)], spec, letters)
            value = state[source].T if parts.transposed and kind == "weight" else state[source]
            state[prefix + key] = parts.piece(value, letter, 0).detach().clone(memory_format=torch.contiguous_format)
