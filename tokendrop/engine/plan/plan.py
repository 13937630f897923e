"""From a layout and the routes of its tasks to index tensors: what each layer of one forward computes.

Shape letters: B batch, T tokens, P samples (packed ones count each), K computed rows, M context rows, N rows of all
groups, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

import torch
from torch import Tensor

from tokendrop.engine.plan.choice import Choice
from tokendrop.engine.plan.packs import Packs
from tokendrop.engine.plan.parts import Budgets
from tokendrop.engine.plan.rows import (
    Rows,
    Split,
    before_one_image,
    behind_image,
    check_needed,
    choose_rows,
    needed_rows,
    real_rows,
    round_up,
    split_rows,
)
from tokendrop.layout import TokenLayout, scoring_mask
from tokendrop.roles import LayerRoute, Role, Route, Select, selections


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of a span whose image tokens have the same role.

    Args:
        role: of their image tokens.
        number: of the group in its plan.
        members: positions of its samples in the batch.
        samples: (B,) int64, the same.
        whole: whether that is the whole batch.
        size: K, the rows that compute in each sample.
        active: which; None for every row, or until `choice` is made.
        context: rows that are keys and values only; None for none, or until `choice` is made.
        split: how the computing rows use projections; None where all use the layer's own.
        context_split: likewise, for context rows.
        choice: which image tokens stay ACTIVE all the same.
        late: (K - P, M + K) bool, what the computing rows behind the image see, where all P rows before it see no image
            at all: one image at one place in every sample, without padding. None elsewhere.
        ffn_size: of the K rows of each sample, those whose FFN runs; None where it runs on all.
        ffn: which; None for every row, or until `choice` is made.
        gate: (B, K), what a router scales the FFN's output by; None where none does.
        counts: of each sample, how many of the K rows compute; the others fill up. Empty where all K do.
    """

    role: Role
    number: int
    members: tuple[int, ...]
    samples: Tensor
    whole: bool
    size: int
    active: Rows | None
    context: Rows | None
    split: Split | None = None
    context_split: Split | None = None
    choice: Choice | None = None
    late: Tensor | None = None
    ffn_size: int | None = None
    ffn: Rows | None = None
    gate: Tensor | None = None
    counts: tuple[int, ...] = ()

    @property
    def ffn_rows(self) -> int:
        """The rows of each sample whose FFN runs."""
        return self.size if self.ffn_size is None else self.ffn_size

    @property
    def context_size(self) -> int:
        """M, the context rows of each sample, also before `choice` is made."""
        if self.context is None:
            return 0 if self.choice is None else self.choice.context_size
        return self.context.index.shape[1]

    @property
    def pairs(self) -> int:
        """Queries times keys of each sample's attention."""
        if self.late is None:
            return self.size * (self.size + self.context_size)
        return (self.size - len(self.late)) ** 2 + self.late.numel()


@dataclass(frozen=True, eq=False)
class Span:
    """A run of layers with equal roles.

    Args:
        start: first layer.
        stop: one past the last layer.
        groups: the samples by role.
        folded: whether rows of several groups travel as one (1, N, D) tensor of the flattened batch.
        rows: of (B, T) or, folded, of (1, B * T), that run; None where it is dense, or until selections are made.
        selects: whether a group selects.
        renumber: for each sample, whether its rows are numbered anew.
    """

    start: int
    stop: int
    groups: tuple[Group, ...]
    folded: bool
    rows: Rows | None
    selects: bool
    renumber: tuple[bool, ...] = ()


@dataclass(frozen=True, eq=False)
class Plan:
    """What each layer computes in the forwards of one layout.

    Args:
        shape: (B, T).
        layout: what the tokens are.
        computing: (B, T) bool, the tokens that are no images and whose output may matter.
        spans: ascending, from layer 0 to L.
        span_of: the span of each layer.
        dense: whether every token computes in every layer with the layer's own projections.
        routed: whether image tokens of these tasks, where there are any, do not.
        has_context: whether any token is CONTEXT anywhere.
        needed: rows whose output is trained, one for each label.
        scoring: (P, R) rows of each sample whose attention scores image tokens, by kind.
        packs: the P samples, where rows hold several.
    """

    shape: tuple[int, int]
    layout: TokenLayout
    computing: Tensor
    spans: tuple[Span, ...]
    span_of: tuple[Span, ...]
    dense: bool
    routed: bool
    has_context: bool
    needed: int
    scoring: Mapping[str, Rows]
    packs: Packs | None


class Planner:
    """Builds the plan of one layout.

    Args:
        layout: what the tokens are.
        routes: the route of each sample's task.
        names: the projection set of each sample, or None.
        multiple: see `round_up`.
        caching: whether a cache is filled, so that the samples of a task stay together where one has images.
    """

    def __init__(
        self,
        layout: TokenLayout,
        routes: Sequence[Route],
        names: Sequence[str | None],
        multiple: int,
        caching: bool = False,
    ) -> None:
        self.layout, self.names, self.multiple, self.tokens = layout, names, multiple, layout.image.shape[1]
        self.needed = needed_rows(layout)
        self.computing = ~layout.image & (real_rows(layout) | self.needed)
        self.packs = Packs.of(layout)
        alone = layout if self.packs is None else self.packs.layout(layout)
        kinds: list[str] = sorted({select.queries.rows for select in selections(routes) if select.queries is not None})
        asked = {kind: scoring_mask(alone, kind) for kind in kinds}
        masks = self.computing, layout.image, layout.image & self.needed, self.needed
        rows = torch.stack([before_one_image(layout, self.computing), *(mask.sum(1) for mask in masks)])
        samples = torch.stack([mask.sum(1) for mask in (alone.image, *asked.values())])
        # All that the shapes of this forward depend on; the one transfer from the device, but for those of packs.
        found = iter(torch.cat([rows.flatten(), samples.flatten()]).tolist())
        each = [list(islice(found, one.shape[1])) for one in (rows, samples) for _ in range(len(one))]
        self.before, self.text, self.images, self.needed_images, needed, candidates, *counts = each
        self.budgets = Budgets(layout, self.packs, candidates)
        sizes = [min(alone.image.shape[1], 1 << (max(count) - 1).bit_length()) for count in counts]  # few shapes
        pairs = zip(asked.items(), samples[1:], sizes, strict=True)
        self.scoring = {kind: choose_rows(mask, count, size) for (kind, mask), count, size in pairs}
        self.needed_rows = sum(needed)
        dense: Route = (LayerRoute(),) * len(routes[0])
        self.routed = any(route != dense for route in routes)
        together = caching and any(self.images)
        self.routes = [one if together or n else dense for one, n in zip(routes, self.images, strict=True)]
        self._groups: dict[tuple[object, ...], Group] = {}

    def plan(self) -> Plan:
        """The plan.

        Raises:
            NeededRowError: an image token that is trained ends with a stale state.
        """
        check_needed(self.layout, self.routes, self.needed_images)
        num_layers = len(self.routes[0])
        spans: list[Span] = []
        for roles, run in groupby(range(num_layers), key=lambda layer: tuple(route[layer] for route in self.routes)):
            layers = list(run)
            spans.append(self._span(layers[0], layers[-1] + 1, roles))
        span_of = tuple(span for span in spans for _ in range(span.start, span.stop))
        dense = not any(span.rows or span.selects or any(one.split or one.ffn for one in span.groups) for span in spans)
        has_context = any(group.context_size for span in spans for group in span.groups)
        more = dense, self.routed, has_context, self.needed_rows, self.scoring, self.packs
        return Plan((len(self.layout.image), self.tokens), self.layout, self.computing, tuple(spans), span_of, *more)

    def _span(self, start: int, stop: int, roles: tuple[LayerRoute, ...]) -> Span:
        by_role: dict[tuple[Role, Select | None], list[int]] = {}
        for sample, role in enumerate(roles):
            by_role.setdefault((role.image, role.select), []).append(sample)
        merged: dict[tuple[Role, Select | None], list[int]] = {}
        for (role, select), samples in by_role.items():
            merged.setdefault(self._simplest(role, select, samples), []).extend(samples)
        groups = tuple(self._group(*key, tuple(sorted(samples)), roles) for key, samples in merged.items())
        selects = any(group.choice is not None for group in groups)
        rows, renumber = None if selects else span_rows(groups, self.tokens), tuple(role.renumber for role in roles)
        return Span(start, stop, groups, len(groups) > 1, rows, selects, renumber)

    def _group(
        self, role: Role, select: Select | None, samples: tuple[int, ...], roles: tuple[LayerRoute, ...]
    ) -> Group:
        owns = tuple(roles[sample].separate for sample in samples)
        key = (role, select, samples, owns)
        if key not in self._groups:
            self._groups[key] = self._make_group(role, select, samples, owns)
        return self._groups[key]

    def _make_group(
        self, role: Role, select: Select | None, samples: tuple[int, ...], owns: tuple[frozenset[str], ...]
    ) -> Group:
        chosen = torch.tensor(samples, device=self.layout.image.device)
        whole, number = len(samples) == len(self.layout.image), len(self._groups)
        image, kept = self.layout.image[chosen], self.budgets.kept(select, samples)
        rows = [self.text[sample] + sum(kept[sample]) for sample in samples]
        left = [self.images[sample] - sum(kept[sample]) for sample in samples]
        if role is Role.ACTIVE:
            split = self._split(image, samples, owns)
            return Group(role, number, samples, chosen, whole, self.tokens, None, None, split)
        size = round_up(max(rows), self.tokens, self.multiple)
        context_size = round_up(max(left), self.tokens, self.multiple) if role is Role.CONTEXT else 0
        counts, parts = torch.tensor(rows, device=chosen.device), self.budgets.parts(select, samples)
        if role is Role.GONE:
            self.budgets.leave(select, samples)
        if select is not None:
            each = [one for own in kept.values() for one in own]
            packs, most = self.packs and self.packs.within(samples), max(each)
            choice = Choice(select, torch.tensor(each, device=chosen.device), most, counts, context_size, packs, parts)
            group = Group(role, number, samples, chosen, whole, size, None, None, choice=choice, counts=tuple(rows))
            return replace(group, size=self.tokens, ffn_size=size) if role is Role.ATTEND else group
        active = choose_rows(self.computing[chosen], counts, size)
        if role is Role.ATTEND:
            split, every = self._split(image, samples, owns), (self.tokens, None, None)
            return Group(role, number, samples, chosen, whole, *every, split, ffn_size=size, ffn=active)
        if role is not Role.CONTEXT:
            return Group(role, number, samples, chosen, whole, size, active, None, counts=tuple(rows))
        context = choose_rows(image, image.sum(1), context_size)
        split = self._split(context.index >= 0, samples, owns)  # every row
        late = self._late(samples, size, context_size)
        return Group(role, number, samples, chosen, whole, size, active, context, None, split, late=late)

    def _simplest(self, role: Role, select: Select | None, samples: Sequence[int]) -> tuple[Role, Select | None]:
        # All of the image tokens compute where none is left in the role, and none is chosen where none is kept.
        if role not in (Role.CONTEXT, Role.ATTEND) or (select is not None and (select.learned or select.merge)):
            return role, select
        kept = {sample: sum(own) for sample, own in self.budgets.kept(select, samples).items()}
        if all(count == self.images[sample] for sample, count in kept.items()):
            return Role.ACTIVE, None
        return role, select if any(kept.values()) else None

    def _late(self, samples: tuple[int, ...], size: int, context_size: int) -> Tensor | None:
        before = {self.before[sample] for sample in samples}
        if len(before) > 1 or -1 in before or any(self.images[sample] != context_size for sample in samples):
            return None
        return behind_image(before.pop(), size, context_size, self.layout.image.device)

    def _split(self, rows: Tensor, samples: tuple[int, ...], owns: tuple[frozenset[str], ...]) -> Split | None:
        pairs = ((self.names[sample], own) for sample, own in zip(samples, owns, strict=True))
        names = tuple((name, own) if own and name is not None else None for name, own in pairs)
        return split_rows(rows, names) if any(names) else None


def span_rows(groups: tuple[Group, ...], tokens: int) -> Rows | None:
    """The rows that the groups of a span compute, folded to (1, N) of the flattened batch where there are several."""
    if len(groups) == 1:
        return groups[0].active
    indices, valids = [], []
    for group in groups:
        every = torch.arange(tokens, device=group.samples.device).expand(len(group.samples), -1)
        rows = group.active or Rows(every, torch.ones_like(every, dtype=torch.bool))
        indices.append((group.samples[:, None] * tokens + rows.index).flatten())
        valids.append(rows.valid.flatten())
    return Rows(torch.cat(indices)[None], torch.cat(valids)[None])
