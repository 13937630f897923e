"""Norms of a layer: found by inspection, and split over the rows of their input.

Shape letters: B batch, K rows, D hidden, H heads, W width of a head.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokendrop.engine.model import swap
from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.linears import is_linear, unwrapped
from tokendrop.engine.model.swap import Swapped, check_forward, reach, reached
from tokendrop.engine.model.using import current, own, split_run
from tokendrop.engine.plan.rows import Own
from tokendrop.errors import UnsupportedError


def norms_of(layer: nn.Module, spec: LayerSpec) -> dict[str, nn.Module]:
    """The norms with weights among the children of a layer and of its attention, by dotted path.

    Those of queries and keys belong to them; those behind the last layer, and of a mixer beside attention, do not.
    """
    attention = getattr(layer, spec.attention or "", None)
    found = {name: child for name, child in unwrapped(layer).named_children() if _is_norm(child)}
    inside = () if attention is None else unwrapped(attention).named_children()
    return found | {f"{spec.attention}.{name}": child for name, child in inside if _is_norm(child)}


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _SplitNorm):  # classic FSDP takes its weights away
        return True
    named = any("norm" in kind.__name__.lower() for kind in type(module).__mro__[:-1])
    leaf = next(module.children(), None) is None and next(module.parameters(), None) is not None
    return named and leaf and not is_linear(module)


class _SplitNorm(Swapped):
    """Mixin of a layer's norm: image rows go through the image-only one."""

    _tokendrop_key: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.__dict__ and current.split is not None:
            return reach(self, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        reached(self)
        split, text = current.split, super().forward
        if split is None or not any("norm" in own(name) for name in split.names):
            return text(x, *args, **kwargs)
        flat, back = flat_rows(x, current.shape)

        def run(part: Tensor, name: Own) -> Tensor:
            norms: Any = own(name).get("norm")
            return text(part, *args, **kwargs) if norms is None else norms[self._tokendrop_key](part, *args, **kwargs)

        return back(split_run(split, flat, run))


def flat_rows(x: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What a norm is given, as (B * K, ...) rows of the layer, and the way back.

    Args:
        x: (B, K, ...), (B * K, ...), or by head (B, H, K, W).
        shape: (B, K).

    Raises:
        UnsupportedError: none of these.
    """
    batch, rows = shape
    # By head or by row, where there are as many of each: heads come first by turning what was stored row by row.
    turned = x.dim() == 4 and x.shape[2] == rows and (x.shape[1] != rows or x.stride(1) < x.stride(2))
    if x.shape[0] == batch and turned:
        by_row = x.transpose(1, 2)
        return by_row.flatten(0, 1), lambda out: out.unflatten(0, shape).transpose(1, 2)
    if x.shape[:2] == shape:
        return x.flatten(0, 1), lambda out: out.unflatten(0, shape)
    if x.shape[0] == batch * rows:
        return x, lambda out: out
    raise UnsupportedError(
        f"a norm is given a tensor of {tuple(x.shape)} for {shape} rows, in which image rows cannot be told from the "
        "others; leave 'norm' out of parts"
    )


def inject(layer: nn.Module, spec: LayerSpec) -> None:
    """Make the norms of a layer split their rows."""
    for path, norm in norms_of(layer, spec).items():
        if not isinstance(norm, _SplitNorm):
            swap.swap(norm, _SplitNorm)
            norm.__dict__["_tokendrop_key"] = key_of(path)


def key_of(path: str) -> str:
    """The name of a norm among the image-only ones."""
    return path.replace(".", "-")


def check(layer: nn.Module, spec: LayerSpec, name: str) -> None:
    """Refuse a norm that a `forward` in its instance would lead past the swapped class.

    Raises:
        UnsupportedError: with its path in the layer `name`.
    """
    for path, norm in norms_of(layer, spec).items():
        check_forward(norm, f"{path} of {name}")
