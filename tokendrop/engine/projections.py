"""Image-only projections: a layer's own linears, each split over the rows of its input.

Shape letters: B batch, K rows, D hidden.
"""

import copy
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor, nn

from tokendrop.engine.decoder import LayerSpec
from tokendrop.engine.plan import Split
from tokendrop.roles import Method

_current = threading.local()


class _SplitLinear(nn.Module):
    """Mixin of a layer's own linear: rows of image tokens go through the image-only one."""

    _tokendrop_base: ClassVar[type[nn.Linear]]
    _tokendrop_letter: str

    def forward(self, x: Tensor) -> Tensor:
        own = super().forward
        split: Split | None = getattr(_current, "splits", {}).get(self._tokendrop_letter)
        if split is None:
            return own(x)
        flat = x.reshape(-1, x.shape[-1])
        parts = []
        for name, rows in zip(split.names, split.rows, strict=True):
            linear = own if name is None else _current.sets[name][self._tokendrop_letter]
            parts.append(linear(flat if len(rows) == len(flat) else flat.index_select(0, rows)))
        out = parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, split.inverse)
        return out.view(*x.shape[:-1], -1)

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> tuple[Any, ...]:
        return _rebuild, (self._tokendrop_base,), self.__dict__


@lru_cache
def _split_class(base: type[nn.Linear]) -> type[nn.Linear]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_tokendrop_base": base}
    return type(base.__name__, (_SplitLinear, base), names)


def _rebuild(base: type[nn.Linear]) -> nn.Linear:
    swapped = _split_class(base)
    return swapped.__new__(swapped)


@contextmanager
def using(splits: dict[str, Split], sets: nn.ModuleDict) -> Generator[None]:
    """Split the rows of this thread's linears over the projection `sets` of one layer."""
    before = getattr(_current, "splits", {}), getattr(_current, "sets", None)
    _current.splits, _current.sets = splits, sets
    try:
        yield
    finally:
        _current.splits, _current.sets = before


def set_names(methods: dict[str | None, Method]) -> dict[str | None, str]:
    """The projection set that each task uses: one for all where "shared", its own where "per-task"."""
    kinds = {"shared": lambda task: "image", "per-task": lambda task: f"image-{task}"}
    return {task: kinds[m.separate](task) for task, m in methods.items() if m.separate != "none"}


def make_sets(
    layers: nn.ModuleList, spec: LayerSpec, methods: dict[str | None, Method], names: dict[str | None, str]
) -> nn.ModuleList:
    """The image-only projections of each layer, by set and letter, as copies of the text's.

    Args:
        layers: the decoder's L layers.
        spec: how they are made.
        methods: by task.
        names: the set of each task, from `set_names`.
    """
    sets = nn.ModuleList()
    for index, layer in enumerate(layers):
        wanted: dict[str, set[str]] = {}
        for task, name in names.items():
            wanted.setdefault(name, set()).update(methods[task].route(len(layers))[index].separate)
        sets.append(
            nn.ModuleDict(
                {
                    name: nn.ModuleDict({letter: _copy(own_linear(layer, spec, letter)) for letter in sorted(letters)})
                    for name, letters in sorted(wanted.items())
                    if letters
                }
            )
        )
    return sets


def own_linear(layer: nn.Module, spec: LayerSpec, letter: str) -> nn.Linear:
    """A layer's own projection for "q", "k" or "v"."""
    return getattr(getattr(layer, spec.attention or ""), dict(spec.linears)[letter])


def _copy(linear: nn.Linear) -> nn.Linear:
    return copy.deepcopy(linear).requires_grad_()


def swap(layers: nn.ModuleList, spec: LayerSpec, sets: nn.ModuleList) -> None:
    """Swap the class of each linear that has an image-only counterpart."""
    for layer, by_name in zip(layers, sets, strict=True):
        letters = {key.split(".")[1] for key in by_name.state_dict()}
        for letter in sorted(letters):
            linear = own_linear(layer, spec, letter)
            linear.__dict__["_tokendrop_letter"] = letter
            linear.__class__ = _split_class(type(linear))


def restore(layers: nn.ModuleList) -> None:
    """Give the linears their own classes back."""
    for module in layers.modules():
        base = vars(type(module)).get("_tokendrop_base")
        if isinstance(module, _SplitLinear) and base is not None:
            del module.__dict__["_tokendrop_letter"]
            module.__class__ = base


def touch(sets: nn.ModuleDict, out: Tensor) -> Tensor:
    """`out`, with every parameter of `sets` in its graph, at the price of a sum over no rows."""
    for linear in sets.modules():
        if isinstance(linear, nn.Linear):
            out = out + linear(linear.weight.new_empty(0, linear.in_features)).sum().to(out.dtype)
    return out


def fill_missing(sets: nn.ModuleList, prefix: str, layers: str, spec: LayerSpec, state: dict[str, Tensor]) -> None:
    """Give a dense checkpoint the image-only weights it lacks, as copies of its text weights.

    Args:
        sets: the image-only projections of each layer.
        prefix: key prefix of `sets` in `state`.
        layers: key prefix of the decoder's layer list.
        spec: how the layers are made.
        state: the checkpoint; changed only if it holds no key under `prefix`.
    """
    if any(key.startswith(prefix) for key in state):
        return
    for key in sets.state_dict():
        index, _, letter, kind = key.split(".")
        source = f"{layers}.{index}.{spec.attention}.{dict(spec.linears)[letter]}.{kind}"
        if source in state:
            state[prefix + key] = state[source].detach().clone()
