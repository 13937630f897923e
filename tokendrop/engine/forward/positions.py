"""Rows numbered anew once others left: rotary tables gathered at a row's rank instead of its place.

Shape letters: B batch, T tokens, P samples (packed ones count each), W tokens of the longest, R rows, Q new tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor

from tokendrop.engine.forward.arguments import is_bias, is_rotary
from tokendrop.engine.model.cache import HoledLayer
from tokendrop.engine.plan.packs import Packs
from tokendrop.engine.plan.plan import Plan, Span
from tokendrop.engine.plan.rows import choose_rows
from tokendrop.errors import UnsupportedError
from tokendrop.kernels import gather_rotary

_FIRST = object()  # asks for padding before the tokens of its sample


class Positions:
    """The rotary tables of one forward, as the rows of the span that runs are numbered.

    Args:
        plan: of the forward.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.span: Span | None = None
        self.at: Tensor | None = None
        self.made: list[tuple[Any, Any, Any]] = []
        self.turned: list[tuple[Any, Tensor, int, Any]] = []

    def enter(self, span: Span) -> None:
        """Number the rows of a span whose selections are made."""
        self.span, self.at = span, places(self.plan, span) if any(span.renumber) else None
        self.made = [one for one in self.made if one[1] is _FIRST]

    def of(self, named: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer of the span, its rotary tables (B or 1, T, D) in the order of the new numbers.

        Raises:
            UnsupportedError: there are none.
        """
        if self.at is None:
            return named
        return named | {name: self._once(value, None) for name, value in _tables(named, self.plan.shape).items()}

    def fill(self, cache: Any, index: int, named: dict[str, Any]) -> None:
        """Leave the tables with a layer of the cache that this forward fills, for tokens behind it.

        Args:
            cache: it.
            index: of the layer.
            named: its arguments, as the model gives them.

        Raises:
            UnsupportedError: samples of which some keep their positions.
        """
        store = cache.layers[index] if self.at is not None and index < len(cache.layers) else None
        if self.span is None or not isinstance(store, HoledLayer):
            return
        if not all(self.span.renumber):
            raise UnsupportedError(
                f"layer {index} keeps the positions of some samples of one batch and renumbers those of others; with a "
                "cache, generate the tasks in batches of their own, or pass use_cache=False"
            )
        (store.turns,) = (self._once(value, _FIRST) for value in _tables(named, self.plan.shape).values())

    def step(self, store: Any, named: dict[str, Any], rows: int, new: int) -> dict[str, Any]:
        """The arguments for Q new tokens: each at its index less the tokens dropped before the layer.

        Args:
            store: the layer of the cache, before it counts them.
            named: the arguments, as the model gives them.
            rows: R.
            new: Q.
        """
        if not isinstance(store, HoledLayer) or store.turns is None:
            return named
        (name, value), *_ = _tables(named, (rows, new)).items()
        store.turns = self._once(value, store.turns)
        return named | {name: self._turned(store, store.turns, new)}

    def _turned(self, store: HoledLayer, turns: tuple[Tensor, Tensor], new: int) -> Any:
        # Layers that hold the same tokens share it: a new token is behind those that are stored and may be seen.
        valid = store.named[1]
        for given, of, behind, made in self.turned:
            if given is turns and of is valid and behind == store.behind:
                return made
        at = valid.sum(1, keepdim=True) + torch.arange(store.behind, store.behind + new, device=valid.device)
        made = gather_rotary(*turns, at)
        self.turned.append((turns, valid, store.behind, made))
        return made

    def _once(self, value: Any, before: Any) -> Any:
        # Layers are given the same tables, of which there is one copy then.
        for one, other, made in self.made:
            if one[0] is value[0] and other is before:
                return made
        if before is None:
            made = gather_rotary(*value, cast(Tensor, self.at))
        elif before is _FIRST:
            made = _padding_first(value, self.plan.layout.padding)
        else:
            rows = max(len(before[0]), len(value[0]))
            made = tuple(
                torch.cat([x.expand(rows, -1, -1) for x in pair], 1) for pair in zip(before, value, strict=True)
            )
        self.made.append((value, before, made))
        return made


def places(plan: Plan, span: Span) -> Tensor:
    """(B, T) int64, the token of its sample whose place each token has: that of its rank, where it computes."""
    layout, every = plan.layout, torch.arange(plan.shape[1], device=plan.layout.image.device)
    computes = torch.ones_like(layout.image)
    for group in span.groups:
        if group.active is not None:
            rows = torch.zeros_like(layout.image[group.samples]).scatter(1, group.active.index, group.active.valid)
            computes = computes.index_copy(0, group.samples, rows)
    real = torch.ones_like(layout.image) if layout.padding is None else layout.padding
    packs = plan.packs
    if packs is None:
        samples = torch.arange(len(real), device=real.device)
        packs = Packs(samples, tuple(range(len(real))), samples, choose_rows(real, real.sum(1), len(every)))
    computes = computes & real & torch.tensor(span.renumber, device=real.device)[:, None]
    taken = packs.take(computes)
    at = packs.tokens.index.gather(1, (taken.cumsum(1) - 1).clamp(min=0))
    return packs.put(every.expand_as(real), at).where(computes, every)


def _padding_first(tables: tuple[Tensor, Tensor], padding: Tensor | None) -> tuple[Tensor, Tensor]:
    # So that the tokens before a new one have the places before its own.
    if padding is None:
        return tables
    return gather_rotary(*tables, padding.to(torch.uint8).argsort(dim=1, stable=True))


def _tables(named: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    found = {name: value for name, value in named.items() if is_rotary(value, shape)}
    biases = [name for name, value in named.items() if is_bias(value, shape[1])]
    if len(found) != 1 or biases:
        raise UnsupportedError(
            f"positions='renumber' gives rows other rotary positions, and the layer has {len(found)} arguments of cos "
            f"and sin, ({shape[0]} or 1, {shape[1]}, width) each, as a tuple, and {len(biases)} biases {biases}, "
            "expected one and none: learned positions and linear biases cannot be numbered anew; use positions='keep'"
        )
    return found
