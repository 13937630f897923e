"""Selections, made where a span is entered.

Shape letters: B batch, T tokens, D hidden.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tokendrop.engine.plan import Choice, Group, Plan, Span, span_rows
from tokendrop.engine.rows import choose_rows
from tokendrop.roles import Role, Scoring, Select


class Selections:
    """The selections of one forward.

    Args:
        plan: of the forward.
        step: (2,) int64, the optimiser step and the micro-batch.
        first: the index of the first sample in the global batch.
        times: rows of each sample, which a search repeats.
    """

    def __init__(self, plan: Plan, step: Tensor, first: int, times: int) -> None:
        self.plan, self.step, self.first, self.times = plan, step, first, times
        self.alive = plan.layout.image
        self.made: dict[tuple[Select, tuple[int, ...]], Tensor] = {}

    def enter(self, span: Span, states: Tensor) -> Span:
        """The span with its rows chosen.

        Args:
            span: about to be entered.
            states: (B, T, D) hidden states.
        """
        if not span.selects:
            return span
        groups = tuple(one if one.choice is None else self._chosen(one, one.choice, states) for one in span.groups)
        return replace(span, groups=groups, rows=span_rows(groups, self.plan.shape[1]))

    def _chosen(self, group: Group, choice: Choice, states: Tensor) -> Group:
        key = (choice.select, group.members)
        if key not in self.made:  # a span cut by another task's goes on with the same tokens
            self.made[key] = self._select(group, choice, states)
        chosen = self.plan.computing[group.samples] | self.made[key]
        return replace(group, active=choose_rows(chosen, choice.counts, group.size))

    def _select(self, group: Group, choice: Choice, states: Tensor) -> Tensor:
        select, candidates = choice.select, self.alive[group.samples]
        states = states if group.whole else states[group.samples]
        samples = group.samples // self.times + self.first
        scoring = Scoring(states, candidates, samples, select.layer, select.seed, self.step)
        kept = highest(select.score(scoring), candidates, choice.kept)
        if group.role is Role.GONE:
            self.alive = self.alive.index_copy(0, group.samples, kept)
        return kept


def highest(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """The candidates with the highest scores, `counts` in each sample; ties go to the earlier token.

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
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(candidates).scatter(1, order, first) & candidates
