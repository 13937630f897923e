"""Selections, made where a span is entered.

Shape letters: B batch, N samples of a group, T tokens, P samples (packed ones count each), R scoring rows, D hidden.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from tokendrop.engine.plan.fused import Fused
from tokendrop.engine.plan.merged import Merged
from tokendrop.engine.plan.packs import Packs
from tokendrop.engine.plan.parts import highest_of_each, known_frames, part_numbers
from tokendrop.engine.plan.plan import Choice, Group, Plan, Span, span_rows
from tokendrop.engine.plan.rows import Rows, choose_rows
from tokendrop.errors import MethodError
from tokendrop.kernels import merge_tokens
from tokendrop.layout import prompt_text
from tokendrop.roles import Attention, Encoded, Merge, Queries, Role, Scoring, Select

# From a group, its scoring rows and its live tokens (P, T), to what these rows look at in the layer about to be called.
Look = Callable[[Group, Rows, Tensor], Attention]
# From layers of the vision encoder, the image tokens (B, T) and how often each row is repeated, what it says of them.
Encode = Callable[[tuple[int, ...], Tensor, int], Encoded]


class Selections:
    """The selections of one forward.

    Args:
        plan: of the forward.
        prompt: that of the prompt, or of the batch that is trained: whose rows score, and whose text is seen.
        step: (2,) int64, the optimiser step and the micro-batch.
        first: the index of the first sample in the global batch.
        times: rows of each sample, which a search repeats.
        encode: gives what the vision encoder says; None where no selection looks at it.

    Attributes:
        losses: of the routers so far.
        scale: (B, T) float32, what scales the update of each token in the span entered last; None where nothing does.
        weight: (B, T) float32, what scales the FFN's output for a token of it that is kept, and the state of another.
    """

    def __init__(self, plan: Plan, prompt: Plan, step: Tensor, first: int, times: int, encode: Encode | None) -> None:
        self.plan, self.prompt, self.step, self.first, self.times = plan, prompt, step, first, times
        self.losses: list[Tensor] = []
        self.scale: Tensor | None = None
        self.weight: Tensor | None = None
        self.encode = encode
        self.merges: list[tuple[Group, Select, Merge]] = []
        self.fusion: nn.Module | None = None
        self.returning: list[Merged | Fused] = []
        self.alive = plan.layout.image
        self.seen: dict[tuple[Select, tuple[int, ...]], Attention] = {}
        self.made: dict[Select, tuple[frozenset[int], Tensor]] = {}

    def enter(
        self, span: Span, states: Tensor, look: Look, router: nn.Module | None, fusion: nn.Module | None
    ) -> tuple[Span, Tensor]:
        """The span with its rows chosen, and the hidden states with tokens that leave merged into others.

        Args:
            span: about to be entered.
            states: (B, T, D) hidden states.
            look: gives the attention of scoring rows in the layer that is entered.
            router: of that layer, if it has one.
            fusion: likewise.
        """
        self.scale = self.weight = None
        if not span.selects:
            return span, states
        scores = None if router is None else router(states)
        self.fusion = fusion
        groups = tuple(
            one if one.choice is None else self._chosen(one, one.choice, states, look, scores) for one in span.groups
        )
        for group, select, merge in self.merges:
            before, samples = states, group.samples
            states = states.index_copy(0, samples, merge_tokens(states[samples], *merge))
            if select.restore:
                pair = before[samples], states[samples]
                self.returning.append(Merged(select, group.members, samples, merge.into, *pair, set(group.members)))
        self.merges.clear()
        return replace(span, groups=groups, rows=span_rows(groups, self.plan.shape[1])), states

    def scaled(self, span: Span, full: Tensor | None, states: Tensor) -> Tensor:
        """The hidden states (B, T, D) behind a span, its updates of `full` scaled, and what it skipped."""
        if self.scale is not None and full is not None:
            states = torch.lerp(full, states, self.scale[:, :, None].to(states.dtype))  # exact where the scale is 1
        for group in span.groups if self.weight is not None else ():
            if group.gate is None or group.active is None or self.weight is None:
                continue
            ran = torch.zeros_like(self.alive[group.samples]).scatter(1, group.active.index, group.active.valid)
            weight = self.weight[group.samples].masked_fill(ran, 1.0)[:, :, None]
            states = states.index_copy(0, group.samples, states[group.samples] * weight.to(states.dtype))
        return states

    def leave(self, stop: int, states: Tensor) -> Tensor:
        """The hidden states (B, T, D) that enter layer `stop`, tokens restored or fused whose selection ends there."""
        following = self.plan.span_of[stop].groups if self.returning and stop < len(self.plan.span_of) else ()
        for one in self.returning:
            groups = [group for group in following if group.choice and group.choice.select == one.select]
            states = one.restored(states, {sample for group in groups for sample in group.members})
        self.returning = [one for one in self.returning if one.on]
        return states

    def before(self, span: Span, look: Look) -> None:
        """Remember what selections at the entry of `span` look at in the layer before it.

        Args:
            span: the next one.
            look: gives the attention of scoring rows in the layer that is about to be called, the last before `span`.
        """
        for group in span.groups:
            select = None if group.choice is None else group.choice.select
            if select is None or select.queries is None or self._done(group, select):
                continue
            if select.queries.layer < span.start:
                self.seen[select, group.members] = self._look(group, select.queries, look)

    def _chosen(self, group: Group, choice: Choice, states: Tensor, look: Look, router: Tensor | None) -> Group:
        if not self._done(group, choice.select):  # a span cut by another task's goes on with the same tokens
            chosen = self._select(group, choice, states, look, router)
            done, kept = self.made.get(choice.select, (frozenset(), torch.zeros_like(self.alive)))
            self.made[choice.select] = done | set(group.members), kept.index_copy(0, group.samples, chosen)
            if choice.select.fuse:
                rows = states if group.whole else states[group.samples]
                fusion = cast(nn.Module, self.fusion)  # the range begins here
                at = choice.select, group.members, group.samples, fusion
                self.returning.append(Fused(*at, rows, self.alive[group.samples], chosen, set(group.members)))
        kept = self.made[choice.select][1][group.samples]
        active = choose_rows(self.plan.computing[group.samples] | kept, choice.counts, group.ffn_rows)
        if group.role is Role.ATTEND:
            return replace(group, ffn=active)
        if choice.context_size == 0:
            weight = self.weight if choice.select.gate else None
            gate = None if weight is None else weight[group.samples].gather(1, active.index)
            return replace(group, active=active, gate=gate)
        left = self.plan.layout.image[group.samples] & ~kept
        return replace(group, active=active, context=choose_rows(left, left.sum(1), choice.context_size))

    def _done(self, group: Group, select: Select) -> bool:
        return select in self.made and self.made[select][0].issuperset(group.members)

    def _select(self, group: Group, choice: Choice, states: Tensor, look: Look, router: Tensor | None) -> Tensor:
        select = choice.select
        if select.encoder and self.encode is not None and not self.alive.any():
            return self.alive[group.samples]
        scoring = self._scoring(group, choice, states, look, router)
        candidates, scores = scoring.image, select.score(scoring)
        if not isinstance(scores, Tensor) or scores.shape != candidates.shape:
            found = f"{tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise MethodError(
                f"a score returned {found}; expected one number for each token, {tuple(candidates.shape)}"
            )
        chosen = self._highest(group, choice, scores, candidates)
        if scoring.router is not None:
            self._learn(group, select, scoring.router, candidates, chosen)
        if select.merge is not None:
            merge = select.merge(scoring, chosen)
            if choice.packs is not None:
                merge = Merge(*(part[group.samples] for part in choice.packs.merge(merge, self.alive)))
            self.merges.append((group, select, merge))
        kept = _rows(group, torch.zeros_like(self.alive), chosen)
        if group.role is Role.GONE:
            self.alive = self.alive.index_copy(0, group.samples, kept[group.samples])
        return kept[group.samples]

    def _scoring(self, group: Group, choice: Choice, states: Tensor, look: Look, router: Tensor | None) -> Scoring:
        select, encoded = choice.select, None
        attention = self.seen.pop((select, group.members), None)
        if select.queries is not None and attention is None:
            attention = self._look(group, select.queries, look)
        if select.encoder and self.encode is not None:
            encoded = self._encoded(group, self.encode(select.encoder, self.plan.layout.image, self.times))
        images, frames = self._frames(group) if select.frames else (None, None)
        return Scoring(
            states=_samples(group, states),
            image=_samples(group, self.alive),
            samples=self._numbers(group) + self.first,
            layer=select.layer,
            seed=select.seed,
            step=self.step,
            counts=choice.kept,
            attention=attention,
            encoded=encoded,
            router=_samples(group, router) if select.learned and router is not None else None,
            text=_samples(group, prompt_text(self.plan.layout, self.prompt.shape[1])),
            images=images,
            frames=frames,
            most=choice.most,
        )

    def _frames(self, group: Group) -> tuple[Tensor, Tensor]:
        # The image and the frame of every image token, also of one that is GONE.
        layout = self.plan.layout
        images = _samples(group, part_numbers(layout, "image")).where(_samples(group, layout.image), -1)
        return images, _samples(group, known_frames(layout, "a score compares frames"))

    def _highest(self, group: Group, choice: Choice, scores: Tensor, candidates: Tensor) -> Tensor:
        if choice.parts is None:
            return highest(scores, candidates, choice.kept)
        return highest_of_each(
            best_first(scores, candidates), candidates, choice.parts, _samples(group, choice.parts.number)
        )

    def _learn(self, group: Group, select: Select, router: Tensor, candidates: Tensor, kept: Tensor) -> None:
        if select.gate:
            ones = router.new_ones(self.plan.shape) if self.weight is None else self.weight
            self.weight = _rows(group, ones, (1 + select.gate * router.tanh()).where(candidates, 1.0))
            return
        ones = router.new_ones(self.plan.shape) if self.scale is None else self.scale
        self.scale = _rows(group, ones, router.where(kept, 1.0))
        each = binary_cross_entropy_with_logits(router, kept.to(router.dtype), reduction="none")
        self.losses.append(each.where(candidates, 0.0).sum() / candidates.sum())

    def _encoded(self, group: Group, encoded: Encoded) -> Encoded:
        if packs := _packs(group):
            return packs.encoded(encoded)
        return encoded.of(group.samples * len(encoded.place) // len(self.alive))

    def _numbers(self, group: Group) -> Tensor:
        # Which samples of the batch they are; rows that a search repeats are one.
        return packs.number if (packs := _packs(group)) else group.samples // self.times

    def _look(self, group: Group, queries: Queries, look: Look) -> Attention:
        rows = self.prompt.scoring[queries.rows].of(self._numbers(group))
        live = _samples(group, self.plan.computing | self.alive)
        if packs := _packs(group):
            group = replace(group, samples=packs.row, whole=False, active=packs.tokens)
        return look(group, rows, live)


def _packs(group: Group) -> Packs | None:
    return None if group.choice is None else group.choice.packs


def _samples(group: Group, x: Tensor) -> Tensor:
    """Of (B, T, ...), the samples of a group, (P, T, ...)."""
    if packs := _packs(group):
        return packs.take(x)
    return x if group.whole else x[group.samples]


def _rows(group: Group, full: Tensor, x: Tensor) -> Tensor:
    """`full` (B, T) with the samples of a group from `x` (P, T)."""
    if packs := _packs(group):
        return packs.put(full, x)
    return full.index_copy(0, group.samples, x)


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
    order = best_first(scores, candidates)
    first = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return torch.zeros_like(candidates).scatter(1, order, first) & candidates


def best_first(scores: Tensor, candidates: Tensor) -> Tensor:
    """Tokens (B, T) int64 from the highest score on, those that are no candidates last, ties in their order."""
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    # Above the minus infinity of those that are no candidates, or one of them would be chosen instead.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=lowest, neginf=lowest)
    return scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
