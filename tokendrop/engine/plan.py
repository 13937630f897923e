"""From a layout and the routes of its tasks to index tensors: what each layer of one forward computes.

Shape letters: B batch, T tokens, K computed rows, M context rows, N rows of all groups, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from tokendrop.errors import NeededRowError
from tokendrop.layout import IGNORED, TokenLayout
from tokendrop.roles import LayerRoute, Role, Route


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of each sample, to a common count.

    Args:
        index: (B, K) int64; the chosen rows ascending, then other rows that fill up to K.
        valid: (B, K) bool, False for rows that fill; None where none does.
    """

    index: Tensor
    valid: Tensor | None


@dataclass(frozen=True, eq=False)
class Split:
    """Flat rows by the projection they use.

    Args:
        names: a projection set for each list of rows; None for the layer's own.
        rows: int64 rows of the flat (B * K) input, for each name.
        inverse: (B * K,) int64, puts the concatenated outputs back in order.
    """

    names: tuple[str | None, ...]
    rows: tuple[Tensor, ...]
    inverse: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of a span whose image tokens have the same role.

    Args:
        members: positions of its samples in the batch.
        samples: (B,) int64, the same.
        whole: whether that is the whole batch.
        active: rows that compute; None for every row.
        context: rows that are keys and values only; None for none.
        splits: by letter of "qkv", how the computing rows use projections.
        context_splits: likewise, for context rows.
    """

    members: tuple[int, ...]
    samples: Tensor
    whole: bool
    active: Rows | None
    context: Rows | None
    splits: dict[str, Split] = field(default_factory=dict)
    context_splits: dict[str, Split] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Span:
    """A run of layers with equal roles.

    Args:
        start: first layer.
        stop: one past the last layer.
        groups: the samples by role.
        folded: whether rows of several groups travel as one (1, N, D) tensor of the flattened batch.
        rows: what the compact form holds, of (B, T) or, folded, of (1, B * T); None where the span is dense.
    """

    start: int
    stop: int
    groups: tuple[Group, ...]
    folded: bool
    rows: Rows | None


@dataclass(frozen=True, eq=False)
class Plan:
    """What each layer computes in the forwards of one layout.

    Args:
        shape: (B, T).
        spans: ascending, from layer 0 to L.
        span_of: the span of each layer.
        dense: whether every token computes in every layer with the layer's own projections.
        has_context: whether any token is CONTEXT anywhere.
    """

    shape: tuple[int, int]
    spans: tuple[Span, ...]
    span_of: tuple[Span, ...]
    dense: bool
    has_context: bool


def round_up(count: int, tokens: int, multiple: int) -> int:
    """The row count that a layer computes for `count` selected rows of `tokens`.

    Counts go up to `multiple`, or to T / 16 (as a power of two) where that is less: few distinct shapes, and never
    more than one row in sixteen added. At least 1 row, at most T.

    Example:
        >>> round_up(130, 1024, 64), round_up(13, 45, 64)
        (192, 14)
    """
    step = min(multiple, 1 << max(0, (tokens // 16).bit_length() - 1))
    return min(tokens, max(1, -(-count // step) * step))


class Planner:
    """Builds the plan of one layout.

    Args:
        layout: what the tokens are.
        routes: the route of each sample's task.
        names: the projection set of each sample, or None.
        multiple: see `round_up`.
    """

    def __init__(
        self, layout: TokenLayout, routes: Sequence[Route], names: Sequence[str | None], multiple: int
    ) -> None:
        self.layout, self.names, self.multiple = layout, names, multiple
        self.needed = _needed(layout)
        self.computing = ~layout.image & (_real(layout) | self.needed)
        unneeded_image = layout.image & self.needed
        # The one transfer from the device: everything the shapes of this forward depend on.
        counts = torch.stack([self.computing.sum(1), layout.image.sum(1), unneeded_image.sum(1)]).tolist()
        self.text, self.images, self.needed_images = counts
        dense: Route = (LayerRoute(),) * len(routes[0])
        self.routes = [route if count else dense for route, count in zip(routes, self.images, strict=True)]
        self._groups: dict[tuple[object, ...], Group] = {}

    def plan(self) -> Plan:
        """The plan.

        Raises:
            NeededRowError: an image token that is trained ends with a stale state.
        """
        self._check_needed()
        num_layers = len(self.routes[0])
        spans: list[Span] = []
        for roles, run in groupby(range(num_layers), key=lambda layer: tuple(route[layer] for route in self.routes)):
            layers = list(run)
            spans.append(self._span(layers[0], layers[-1] + 1, roles))
        span_of = tuple(span for span in spans for _ in range(span.start, span.stop))
        dense = all(span.rows is None and not any(group.splits for group in span.groups) for span in spans)
        has_context = any(group.context is not None for span in spans for group in span.groups)
        batch, tokens = self.layout.image.shape
        return Plan((batch, tokens), tuple(spans), span_of, dense, has_context)

    def _check_needed(self) -> None:
        for sample, (route, count) in enumerate(zip(self.routes, self.needed_images, strict=True)):
            if count and route[-1].image in (Role.CONTEXT, Role.GONE):
                raise NeededRowError(
                    f"sample {sample} (task {self.layout.tasks[sample]!r}) trains {count} image rows, but its method "
                    f"leaves them {route[-1].image.name} in the last layer, with a stale state; use HMGen for this "
                    "task, or set the labels behind image tokens to -100"
                )

    def _span(self, start: int, stop: int, roles: tuple[LayerRoute, ...]) -> Span:
        by_role: dict[Role, list[int]] = {}
        for sample, role in enumerate(roles):
            by_role.setdefault(role.image, []).append(sample)
        groups = tuple(self._group(role, tuple(samples), roles) for role, samples in sorted(by_role.items()))
        if len(groups) == 1:
            return Span(start, stop, groups, False, groups[0].active)
        return Span(start, stop, groups, True, self._fold(groups))

    def _group(self, role: Role, samples: tuple[int, ...], roles: tuple[LayerRoute, ...]) -> Group:
        owns = tuple(roles[sample].separate for sample in samples)
        key = (role, samples, owns)
        if key not in self._groups:
            self._groups[key] = self._make_group(role, samples, owns)
        return self._groups[key]

    def _make_group(self, role: Role, samples: tuple[int, ...], owns: tuple[frozenset[str], ...]) -> Group:
        device = self.layout.image.device
        chosen = torch.tensor(samples, device=device)
        whole = len(samples) == len(self.layout.image)
        image = self.layout.image[chosen]
        if role is Role.ACTIVE:
            return Group(samples, chosen, whole, None, None, self._splits(image, samples, owns))
        active = self._rows(self.computing[chosen], [self.text[sample] for sample in samples])
        if role is not Role.CONTEXT:
            return Group(samples, chosen, whole, active, None)
        context = self._rows(image, [self.images[sample] for sample in samples])
        every_row = torch.ones_like(context.index, dtype=torch.bool)
        return Group(samples, chosen, whole, active, context, {}, self._splits(every_row, samples, owns))

    def _rows(self, chosen: Tensor, counts: list[int]) -> Rows:
        kept = round_up(max(counts), chosen.shape[1], self.multiple)
        index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
        if min(counts) == kept:
            return Rows(index, None)
        limits = torch.tensor(counts, device=chosen.device)
        return Rows(index, torch.arange(kept, device=chosen.device) < limits[:, None])

    def _splits(self, rows: Tensor, samples: tuple[int, ...], owns: tuple[frozenset[str], ...]) -> dict[str, Split]:
        splits: dict[str, Split] = {}
        by_names: dict[tuple[str | None, ...], Split] = {}
        for letter in sorted(frozenset().union(*owns)):
            names = tuple(
                self.names[sample] if letter in own else None for sample, own in zip(samples, owns, strict=True)
            )
            if names not in by_names:
                by_names[names] = _split(rows, names)
            splits[letter] = by_names[names]
        return splits

    def _fold(self, groups: tuple[Group, ...]) -> Rows:
        tokens = self.layout.image.shape[1]
        every = torch.arange(tokens, device=self.layout.image.device)
        indices, valids = [], []
        for group in groups:
            index = every.expand(len(group.samples), -1) if group.active is None else group.active.index
            valid = None if group.active is None else group.active.valid
            indices.append((group.samples[:, None] * tokens + index).flatten())
            valids.append((torch.ones_like(index, dtype=torch.bool) if valid is None else valid).flatten())
        valid = None if all(g.active is None or g.active.valid is None for g in groups) else torch.cat(valids)[None]
        return Rows(torch.cat(indices)[None], valid)


def _needed(layout: TokenLayout) -> Tensor:
    needed = torch.zeros_like(layout.image)
    if layout.labels is not None:
        needed[:, :-1] = layout.labels[:, 1:] != IGNORED
    return needed


def _real(layout: TokenLayout) -> Tensor:
    # Without labels nobody knows whether the output of a padding row is used.
    if layout.padding is None or layout.labels is None:
        return torch.ones_like(layout.image)
    return layout.padding


def _split(rows: Tensor, names: tuple[str | None, ...]) -> Split:
    sets: list[str | None] = [None, *sorted({name for name in names if name is not None})]
    owner = torch.tensor([sets.index(name) for name in names], device=rows.device)
    choice = torch.where(rows, owner[:, None], 0).flatten()
    parts = [(choice == i).nonzero().flatten() for i in range(len(sets))]
    used: list[tuple[str | None, Tensor]] = [(name, part) for name, part in zip(sets, parts, strict=True) if len(part)]
    return Split(tuple(n for n, _ in used), tuple(p for _, p in used), torch.cat([p for _, p in used]).argsort())
