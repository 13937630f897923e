"""Image-only projections: a layer's own linears, each split over the rows of its input.

Shape letters: B batch, K rows, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokendrop.engine.model import swap
from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.linears import base_linear, is_linear, is_transposed, linear_shape
from tokendrop.engine.model.swap import Swapped, check_forward, reach, reached
from tokendrop.engine.model.using import current, own, split_run
from tokendrop.engine.model.weights import multiplies, readable
from tokendrop.errors import UnsupportedError


@dataclass(frozen=True)
class Parts:
    """How a linear's output features divide.

    Args:
        letters: what it makes, of "qkv", or "o".
        widths: output features of each letter.
        groups: number of groups the letters alternate in, 1 where they follow one another.
        transposed: whether the weight is stored (in, out).
        multiplies: whether its class multiplies with its weight and does nothing else.
    """

    letters: str
    widths: tuple[int, ...]
    groups: int
    transposed: bool
    multiplies: bool

    def cut(self, linear: nn.Module, letter: str) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) of one letter."""
        weight, bias = cast(Tensor, linear.weight), getattr(linear, "bias", None)
        weight = weight.T if self.transposed else weight
        return self.piece(weight, letter, 0), None if bias is None else self.piece(bias, letter)

    def piece(self, value: Tensor, letter: str, dim: int = -1) -> Tensor:
        """The part of one letter of a tensor with all output features in `dim`."""
        dim %= value.dim()
        groups = value.unflatten(dim, (self.groups, -1))
        parts = groups.split([width // self.groups for width in self.widths], dim + 1)
        return parts[self.letters.index(letter)].flatten(dim, dim + 1)

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.__dict__ and (current.split is not None or not current.queries):
            return reach(self, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reached(self)
        split = current.split
        if split is None:
            return super().forward(x, *args, **kwargs) if current.queries else self._letters(x, {}, kwargs)
        given = [name for name in kwargs if kwargs[name] is not None]
        if given:
            raise UnsupportedError(
                f"{type(self).__name__} is called with {', '.join(given)}, by sample, and image-only projections split "
                "its rows; use one adapter for the batch, or separate='none'"
            )
        flat = x.reshape(-1, x.shape[-1])
        out = split_run(split, flat, lambda part, name: self._letters(part, own(name), {}))
        return out.view(*x.shape[:-1], -1)

    def _letters(self, x: Tensor, own: Mapping[str, nn.Module], more: Mapping[str, Any]) -> Tensor:
        parts = self._tokendrop_parts
        # A fused linear that is packed or adapted is right only as a whole.
        whole = current.queries or (len(parts.letters) > 1 and not self._plain())
        if whole and not own.keys() & set(parts.letters):
            return self._text(x, more)
        outputs: list[Tensor | None] = [self._letter(x, own, letter, more) for letter in parts.letters]
        made = next((out for out in outputs if out is not None), x)
        # Queries that nobody reads: zeros without memory, which the layer may reshape and rotate.
        shapes = [(*x.shape[:-1], width) for width in parts.widths]
        return parts.join(
            [
                made.new_zeros(shape[-1]).expand(shape) if out is None else out
                for out, shape in zip(outputs, shapes, strict=True)
            ]
        )

    def _letter(self, x: Tensor, own: Mapping[str, nn.Module], letter: str, more: Mapping[str, Any]) -> Tensor | None:
        if letter == "q" and not current.queries:
            return None
        if letter in own:
            return own[letter](x)
        if len(self._tokendrop_parts.letters) == 1:
            return self._text(x, more)
        if self._plain():
            return nn.functional.linear(x, *self._tokendrop_parts.cut(self, letter))
        return self._tokendrop_parts.piece(self._text(x, more), letter)

    def _plain(self) -> bool:
        return self._tokendrop_parts.multiplies and readable(self)

    def _text(self, x: Tensor, more: Mapping[str, Any]) -> Tensor:
        if x.numel() or self._plain():
            return super().forward(x, **more)
        # Kernels of quantised linears divide by the number of rows: one row, of which nothing is kept.
        out = super().forward(x.new_zeros(1, x.shape[-1]))[:0]
        return out.reshape(*x.shape[:-1], out.shape[-1])


def parts_of(layer: nn.Module, spec: LayerSpec, letters: str) -> Parts:
    """How the linear that makes `letters` divides."""
    linear, fused = spec.linear(layer, letters[0]), len(letters) > 1
    widths = spec.widths(layer) if fused else {letters: linear_shape(linear)[0]}
    kind = is_transposed(base_linear(linear)), multiplies(linear)
    groups = spec.groups(layer) if fused else 1
    return Parts(letters, tuple(widths[letter] for letter in letters), groups, *kind)


def check(layers: nn.ModuleList, specs: Sequence[LayerSpec], linears: bool) -> None:
    """Refuse layers, and linears in them, that a `forward` in their instance would lead past the swapped class.

    Args:
        layers: the decoder's.
        specs: how each is made.
        linears: whether those are swapped too.

    Raises:
        UnsupportedError: with its name.
    """
    for index, (layer, spec) in enumerate(zip(layers, specs, strict=True)):
        check_forward(layer, f"decoder layer {index}")
        for _, letters in spec.linears if linears else ():
            check_linear(layer, spec, letters[0], f"decoder layer {index}")


def check_linear(layer: nn.Module, spec: LayerSpec, letter: str, name: str) -> None:
    """Refuse a linear that a `forward` in its instance would lead past the swapped class.

    Raises:
        UnsupportedError: with its place in the layer `name`.
    """
    place = next(place for place, letters in spec.owned if letter in letters)
    check_forward(spec.linear(layer, letter), f"{spec.attention}.{place} of {name}")


def settle(layer: nn.Module, spec: LayerSpec, wanted: str) -> None:
    """Swap the class of the linears that make the `wanted` letters, adapters included, where it is not.

    An adapter belongs to the text's projection: image rows go past both, so that merging it changes none of them.

    Raises:
        UnsupportedError: something that is no linear stands in such a place now.
    """
    for _, letters in spec.owned:
        if letters not in wanted:
            continue
        linear = spec.linear(layer, letters[0])
        if isinstance(linear, _SplitLinear):
            continue
        inside = [module for module in linear.modules() if isinstance(module, _SplitLinear)]
        if is_linear(linear):
            for module in inside:
                swap.restore(module)
            parts = parts_of(layer, spec, letters)
            swap.swap(linear, _SplitLinear)  # which its class may refuse
            linear.__dict__["_tokendrop_parts"] = parts
        elif not inside:
            raise UnsupportedError(
                f"{type(linear).__name__} took the place of the linear that makes {', '.join(letters)} since "
                "apply, and cannot be split; remove() first, and apply afterwards"
            )


def touch(sets: nn.ModuleDict, out: Tensor) -> Tensor:
    """`out`, with every parameter of `sets` in its graph, at the price of a sum over no rows."""
    for module in sets.modules():
        if isinstance(module, nn.Linear):
            out = out + module(module.weight.new_empty(0, module.in_features)).sum().to(out.dtype)
            continue
        for p in module.parameters(recurse=False):  # of norms and experts
            out = out + p.reshape(-1)[:0].sum().to(out.dtype)
    return out
