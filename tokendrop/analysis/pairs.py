"""Pairs of a query and a key that the query sees, beside the rectangle that the field counts.

Shape letters: B batch, T tokens, K computed rows, M context rows, N samples of a group, W window.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.plan.plan import Choice, Group, Plan
from tokendrop.engine.plan.rows import choose_rows
from tokendrop.roles import Role


class Pairs:
    """The pairs of one plan that attention lets through: causal, within a window, within a packed sample.

    seen = sum over computing rows t of |{keys s: t - W < s <= t, of the sample of t}|, T (T + 1) / 2 where all compute

    A row that fills up is a row like others. Which tokens a selection keeps is not known before it is made: they are
    taken to lie evenly among the image's, which matters only beside CONTEXT, a window or packs. Masks of a model's
    own, such as images that see all of themselves, are not read, and padding hides nothing.

    Args:
        plan: of a forward.

    Source: ours.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self._known = plan, dict[tuple[int, int | None], list[int]]()
        layout = plan.layout
        # All that lies on a device, in one transfer.
        held = [layout.image, plan.computing, *([] if plan.packs is None or layout.packs is None else [layout.packs])]
        self.image, self.computing, *packs = torch.stack([one.long() for one in held]).cpu()
        self.image, self.computing = self.image.bool(), self.computing.bool()
        self.packs: Tensor | None = packs[0] if packs else None

    def dense(self, window: int | None = None) -> list[int]:
        """Of each of the B samples where every token computes, through a window of W keys or none."""
        (batch, tokens), rows = self.plan.shape, torch.ones_like(self.image)
        if self.packs is None:
            wide = tokens if window is None else min(window, tokens)
            return [wide * (wide + 1) // 2 + (tokens - wide) * wide] * batch
        with torch.device("cpu"):
            return self._count(rows, torch.zeros_like(rows), range(batch), window)

    def of(self, group: Group, window: int | None = None) -> list[int]:
        """Of each of the N samples of a group of the plan."""
        key = group.number, window
        if key not in self._known:
            with torch.device("cpu"):
                self._known[key] = self._of(group, window)
        return self._known[key]

    def _of(self, group: Group, window: int | None) -> list[int]:
        if group.active is None and group.choice is None:
            every = self.dense(window)
            return [every[member] for member in group.members]
        members = list(group.members)
        image = self.image[members]
        kept = torch.zeros_like(image) if group.choice is None else self._kept(group.choice, members)
        chosen = self.computing[members] | kept
        index = choose_rows(chosen, chosen.sum(1), group.size).index
        rows = torch.zeros_like(image).scatter(1, index, True)
        context = image & ~kept if group.role is Role.CONTEXT else torch.zeros_like(image)
        return self._count(rows, context, members, window)

    def _kept(self, choice: Choice, members: Sequence[int]) -> Tensor:
        # The image tokens that are kept, spread evenly among those of their sample.
        kept, packs = torch.zeros(len(members), self.plan.shape[1], dtype=torch.bool), choice.packs
        own = [(row, self.image[member].nonzero().flatten()) for row, member in enumerate(members)]
        if packs is not None:
            index = [row[valid] for row, valid in zip(packs.tokens.index.cpu(), packs.tokens.valid.cpu(), strict=True)]
            own = [(members.index(row), at[self.image[row, at]]) for row, at in zip(packs.rows, index, strict=True)]
        for (row, at), count in zip(own, choice.kept.tolist(), strict=True):
            if count:
                rank = torch.arange(len(at))
                kept[row, at] = (rank + 1) * count // len(at) > rank * count // len(at)
        return kept

    def _count(self, rows: Tensor, context: Tensor, members: Sequence[int], window: int | None) -> list[int]:
        first = torch.zeros(rows.shape, dtype=torch.int64)
        at = torch.arange(rows.shape[1]).expand_as(first)
        if self.packs is not None:  # the tokens of a sample one behind the other
            packs, order = self.packs[list(members)].sort(stable=True)
            rows, context = rows.gather(1, order), context.gather(1, order)
            starts = torch.ones_like(packs, dtype=torch.bool)
            starts[:, 1:] = packs[:, 1:] != packs[:, :-1]
            first = at.where(starts, 0).cummax(1).values
        if window is not None:
            first = first.maximum(at - window + 1)
        before = torch.nn.functional.pad((rows.long() + context.long()).cumsum(1), (1, 0))
        seen: list[int] = ((before[:, 1:] - before.gather(1, first)) * rows).sum(1).tolist()
        return seen


def counted_pairs(group: Group, eager: bool) -> int:
    """Queries times keys of each sample's attention, as a counter sees them; eager attention is never split."""
    return group.size * (group.size + group.context_size) if eager else group.pairs


def window_of(attention: nn.Module | None) -> int | None:
    """W, the keys that a query of a layer's attention sees at most, itself among them; None for all before it."""
    nothing: Any = object()
    found = getattr(attention, "sliding_window", nothing)
    if found is nothing:  # Mistral's and others' say it in their config only
        found = getattr(getattr(attention, "config", None), "sliding_window", None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
