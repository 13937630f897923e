"""Image-only projections: a layer's own linears, each split over the rows of its input.

Shape letters: B batch, K rows, D hidden.
"""

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tokendrop.engine.model.decoder import LayerSpec, is_linear, linear_shape
from tokendrop.engine.model.swap import Swapped, swapped_class
from tokendrop.engine.plan.rows import Split
from tokendrop.roles import Method

ROUTER = "router"


class _Using(threading.local):
    """What the linears of this thread do at the moment."""

    def __init__(self) -> None:
        self.split: Split | None = None
        self.sets: nn.ModuleDict | None = None
        self.queries = True


_using = _Using()


@contextmanager
def using(split: Split | None, sets: nn.ModuleDict, queries: bool = True) -> Generator[None]:
    """Split the rows of this thread's linears over the projection `sets` of one layer; without `queries`, make none."""
    before = _using.split, _using.sets, _using.queries
    _using.split, _using.sets, _using.queries = split, sets, queries
    try:
        yield
    finally:
        _using.split, _using.sets, _using.queries = before


@dataclass(frozen=True)
class Parts:
    """How a linear's output features divide.

    Args:
        letters: what it makes, of "qkv".
        widths: output features of each letter.
        groups: number of groups the letters alternate in, 1 where they follow one another.
        transposed: whether the weight is stored (in, out).
    """

    letters: str
    widths: tuple[int, ...]
    groups: int
    transposed: bool

    def cut(self, linear: nn.Module, letter: str) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) of one letter."""
        weight, bias = cast(Tensor, linear.weight), getattr(linear, "bias", None)
        weight = weight.T if self.transposed else weight
        return self._rows(weight, letter), None if bias is None else self._rows(bias, letter)

    def _rows(self, value: Tensor, letter: str) -> Tensor:
        parts = value.unflatten(0, (self.groups, -1)).split([width // self.groups for width in self.widths], 1)
        return parts[self.letters.index(letter)].flatten(0, 1)

    def join(self, outputs: list[Tensor]) -> Tensor:
        """The linear's output from that of each letter."""
        if len(outputs) == 1:
            return outputs[0]
        if self.groups == 1:
            return torch.cat(outputs, -1)
        return torch.cat([out.unflatten(-1, (self.groups, -1)) for out in outputs], -1).flatten(-2)


class _SplitLinear(Swapped):
    """Mixin of a layer's own linear: image rows go through the image-only one, and queries can be left out."""

    _tokendrop_parts: Parts

    def forward(self, x: Tensor) -> Tensor:
        split, sets = _using.split, _using.sets
        if split is None or sets is None:
            return super().forward(x) if _using.queries else self._letters(x, {})
        flat = x.reshape(-1, x.shape[-1])
        outputs = []
        for name, rows in zip(split.names, split.rows, strict=True):
            part = flat if len(rows) == len(flat) else flat.index_select(0, rows)
            own = {} if name is None else dict(cast(nn.ModuleDict, sets[name]).items())
            outputs.append(self._letters(part, own))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs).index_select(0, split.inverse)
        return out.view(*x.shape[:-1], -1)

    def _letters(self, x: Tensor, own: Mapping[str, nn.Module]) -> Tensor:
        parts = self._tokendrop_parts
        if _using.queries and not own.keys() & set(parts.letters):
            return super().forward(x)
        outputs: list[Tensor | None] = [self._letter(x, own, letter) for letter in parts.letters]
        made = next((out for out in outputs if out is not None), x)
        # Queries that nobody reads: zeros without memory, which the layer may reshape and rotate.
        shapes = [(*x.shape[:-1], width) for width in parts.widths]
        return parts.join(
            [
                made.new_zeros(1).expand(shape) if out is None else out
                for out, shape in zip(outputs, shapes, strict=True)
            ]
        )

    def _letter(self, x: Tensor, own: Mapping[str, nn.Module], letter: str) -> Tensor | None:
        if letter == "q" and not _using.queries:
            return None
        if letter in own:
            return own[letter](x)
        if len(self._tokendrop_parts.letters) == 1:
            return super().forward(x)
        return nn.functional.linear(x, *self._tokendrop_parts.cut(self, letter))


def _parts(layer: nn.Module, spec: LayerSpec, letters: str) -> Parts:
    widths = spec.widths(layer)
    transposed = not isinstance(spec.linear(layer, letters[0]), nn.Linear)
    return Parts(letters, tuple(widths[letter] for letter in letters), spec.groups(layer), transposed)


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
            name: nn.ModuleDict({letter: _copy(layer, spec, letter) for letter in sorted(letters)})
            for name, letters in sorted(wanted.items())
            if letters
        }
        selects = (method.route(len(layers))[index].select for method in methods.values())
        routed = any(select is not None and select.learned for select in selects)
        sets.append(nn.ModuleDict({**made, ROUTER: Router.of(layer)} if routed else made))
    return sets


class Router(nn.Linear):
    """One number for each token, in float32 at least, whatever the precision around it."""

    @classmethod
    def of(cls, layer: nn.Module) -> "Router":
        """A router of a decoder layer's input, at random."""
        first = next(module for module in layer.modules() if is_linear(module))
        weight = cast(Tensor, first.weight)
        return cls(linear_shape(first)[1], 1, bias=False, device=weight.device, dtype=weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.to(dtype), self.weight.to(dtype)).squeeze(-1)


def _copy(layer: nn.Module, spec: LayerSpec, letter: str) -> nn.Linear:
    linear = spec.linear(layer, letter)
    letters = next(letters for _, letters in spec.linears if letter in letters)
    weight, bias = _parts(layer, spec, letters).cut(linear, letter)
    copied = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    copied.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        copied.bias = nn.Parameter(bias.detach().clone())
    return copied.train(layer.training)


def swap(layers: nn.ModuleList, specs: Sequence[LayerSpec]) -> None:
    """Swap the class of the linears that make queries, keys and values; layers may share one."""
    for layer, spec in zip(layers, specs, strict=True):
        for _, letters in spec.linears:
            linear = spec.linear(layer, letters[0])
            if isinstance(linear, _SplitLinear):
                continue
            parts = _parts(layer, spec, letters)
            linear.__class__ = swapped_class(_SplitLinear, type(linear))
            linear.__dict__["_tokendrop_parts"] = parts


def restore(layers: nn.ModuleList) -> None:
    """Give the linears their own classes back."""
    for module in layers.modules():
        base = vars(type(module)).get("_tokendrop_base")
        if isinstance(module, _SplitLinear) and base is not None:
            del module.__dict__["_tokendrop_parts"]
            module.__class__ = base


def touch(sets: nn.ModuleDict, out: Tensor) -> Tensor:
    """`out`, with every parameter of `sets` in its graph, at the price of a sum over no rows."""
    for linear in sets.modules():
        if isinstance(linear, nn.Linear):
            out = out + linear(linear.weight.new_empty(0, linear.in_features)).sum().to(out.dtype)
    return out


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
        if source in state:
            parts = _parts(layers[int(index)], spec, letters)
            value = state[source].T if parts.transposed and kind == "weight" else state[source]
            state[prefix + key] = parts._rows(value, letter).detach().clone(memory_format=torch.contiguous_format)
