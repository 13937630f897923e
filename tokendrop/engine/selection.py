"""Selections, made where a span is entered.

Shape letters: B batch, T tokens, R scoring rows, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tokendrop.engine.plan import Choice, Group, Plan, Span, span_rows
from tokendrop.engine.rows import Rows, choose_rows
from tokendrop.errors import MethodError
from tokendrop.roles import Attention, Queries, Role, Scoring, Select

# From a group, its scoring rows and its live tokens (B, T), to what these rows look at in the layer about to be called.
Look = Callable[[Group, Rows, Tensor], Attention]


class Selections:
    """The selections of one forward.

    Args:
        plan: of the forward.
        scoring: rows whose attention scores, of the prompt or of the batch that is trained.
        step: (2,) int64, the optimiser step and the micro-batch.
        first: the index of the first sample in the global batch.
        times: rows of each sample, which a search repeats.
    """

    def __init__(self, plan: Plan, scoring: Mapping[str, Rows], step: Tensor, first: int, times: int) -> None:
        self.plan, self.scoring, self.step, self.first, self.times = plan, scoring, step, first, times
        self.alive = plan.layout.image
        self.seen: dict[tuple[Select, tuple[int, ...]], Attention] = {}
        self.made: dict[tuple[Select, tuple[int, ...]], Tensor] = {}

    def enter(self, span: Span, states: Tensor, look: Look) -> Span:
        """The span with its rows chosen.

        Args:
            span: about to be entered.
            states: (B, T, D) hidden states.
            look: gives the attention of scoring rows in the layer that is entered.
        """
        if not span.selects:
            return span
        groups = tuple(
            one if one.choice is None else self._chosen(one, one.choice, states, look) for one in span.groups
        )
        return replace(span, groups=groups, rows=span_rows(groups, self.plan.shape[1]))

    def before(self, span: Span, look: Look) -> None:
        """Remember what selections at the entry of `span` look at in the layer before it.

        Args:
            span: the next one.
            look: gives the attention of scoring rows in the layer that is about to be called, the last before `span`.
        """
        for group in span.groups:
            select = None if group.choice is None else group.choice.select
            if select is None or select.queries is None or (select, group.members) in self.made:
                continue
            if select.queries.layer < span.start:
                self.seen[select, group.members] = self._look(group, select.queries, look)

    def _chosen(self, group: Group, choice: Choice, states: Tensor, look: Look) -> Group:
        key = (choice.select, group.members)
        if key not in self.made:  # a span cut by another task's goes on with the same tokens
            self.made[key] = self._select(group, choice, states, look)
        chosen = self.plan.computing[group.samples] | self.made[key]
        return replace(group, active=choose_rows(chosen, choice.counts, group.size))

    def _select(self, group: Group, choice: Choice, states: Tensor, look: Look) -> Tensor:
        select, candidates = choice.select, self.alive[group.samples]
        states = states if group.whole else states[group.samples]
        samples = group.samples // self.times + self.first
        attention = self.seen.pop((select, group.members), None)
        if select.queries is not None and attention is None:
            attention = self._look(group, select.queries, look)
        scoring = Scoring(states, candidates, samples, select.layer, select.seed, self.step, attention)
        scores = select.score(scoring)
        if not isinstance(scores, Tensor) or scores.shape != candidates.shape:
            found = f"{tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise MethodError(
                f"a score returned {found}; expected one number for each token, {tuple(candidates.shape)}"
            )
        kept = highest(scores, candidates, choice.kept)
        if group.role is Role.GONE:
            self.alive = self.alive.index_copy(0, group.samples, kept)
        return kept

    def _look(self, group: Group, queries: Queries, look: Look) -> Attention:
        rows = self.scoring[queries.rows].of(group.samples // self.times)
        return look(group, rows, self.plan.computing[group.samples] | self.alive[group.samples])


def highest(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """The candidates with the highest scores, `counts` in each sample; ties go to the earlier token, NaN is lowest.

    Args:
        scores: (B, T) float.
        candidates: (B, T) bool.
        counts: (B,) int64.

    Returns:
        (B, T) bool.

    Example:
        >>> scores, candidates = torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([[True, True, True]])
        >>> highest(scores, candidates, torch.tensor([1])).tolist()
        [[False, True, False]]
    """
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    # Above the minus infinity of those that are no candidates, or one of them would be chosen instead.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=lowest, neginf=lowest)
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(candidates).scatter(1, order, first) & candidates
