"""What rows of a batch may see, where an attention is given no mask tensor that says it.

Shape letters: B batch, T tokens, K queries, C keys, N sequences, S keys of all sequences, H heads, W width.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """The same as sequences of which each is causal, its last query beside its last key.

    Args:
        keys: (S,) int64, the rows of all B * C keys that they see, one sequence behind the other; None for all keys in
            their order.
        query_ends: (N + 1,) int32, where each begins among the B * K queries.
        key_ends: (N + 1,) int32, where each begins among the S keys.
        longest: queries and keys of the longest.
    """

    keys: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]


@dataclass(eq=False)
class Sight:
    """What each query may see: keys of its own packed sample, at its position or before it.

    Args:
        rows: (B, K) int64, the position of each query among the T tokens of its row.
        columns: (B, C) int64, that of each key.
        own: (B, K) int64, the column with the key of each query; None where they look and nothing else.
        valid: (B, C) bool, the keys that may be seen; None for all. A query whose own key may not be seen sees that.
        packs: the packed sample (B, K) of each query and (B, C) of each key; None where each row is one.
        tokens: T.
        causal: whether it is what attention makes of keys and queries as they stand.
        both: whether it sees keys behind it too.
        before: P, where the first P queries of each row see none of the first C - K keys and the others all of them, so
            that sizes alone say what sequences there are.
    """

    rows: Tensor
    columns: Tensor
    own: Tensor | None
    valid: Tensor | None
    packs: tuple[Tensor, Tensor] | None
    tokens: int
    causal: bool = False
    both: bool = False
    before: int | None = None
    _made: list[Sequences] = field(default_factory=list)

    def mask(self, window: int | None) -> Tensor:
        """(B, 1, K, C) bool, within a window of so many positions."""
        behind = self.rows[:, :, None] - self.columns[:, None]
        seen = torch.ones_like(behind, dtype=torch.bool) if self.both else behind >= 0
        if window is not None:
            seen = seen & (behind.abs() < window)
        if self.packs is not None:
            seen &= self.packs[0][:, :, None] == self.packs[1][:, None]
        return self.among(seen[:, None])

    def among(self, mask: Tensor) -> Tensor:
        """Of a mask (B, H or 1, K, C), bool or additive, what is left where some keys may not be seen."""
        if self.valid is None:
            return mask
        seen, fills = self.valid[:, None, None], self.fills
        if mask.dtype == torch.bool:
            return mask & seen if fills is None else (mask & seen) | fills
        return mask.masked_fill(~(seen if fills is None else seen | fills), torch.finfo(mask.dtype).min)

    @property
    def fills(self) -> Tensor | None:
        """(B, 1, K, C) bool, the own keys of queries that only fill up, so that their discarded softmax is finite."""
        if self.valid is None or self.own is None:
            return None
        columns = torch.arange(self.columns.shape[1], device=self.own.device)
        return ((self.own[:, :, None] == columns) & ~self.valid.gather(1, self.own)[:, :, None])[:, None]

    def sequences(self) -> Sequences:
        """What a kernel for sequences of different lengths is given; made once."""
        if not self._made:
            self._made.append(self._sequences() if self.before is None else self._around_image(self.before))
        return self._made[0]

    def _around_image(self, before: int) -> Sequences:
        # Also under a compiler and without a transfer from the device.
        (batch, queries), columns, device = self.rows.shape, self.columns.shape[1], self.rows.device
        parts = [(before, before), (queries - before, columns)]
        each = [pair for pair in parts if pair[0]] * batch
        ends = [torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device) for x in zip(*each, strict=True)]
        every = torch.arange(columns, device=device)
        own = torch.cat([every[columns - queries :][:before], every])
        keys = (own + columns * torch.arange(batch, device=device)[:, None]).flatten() if before else None
        return Sequences(keys, ends[0], ends[1], (max(q for q, _ in each), max(k for _, k in each)))

    def _sequences(self) -> Sequences:
        # A query sees its own key and those before it in the order (packed sample, position). Queries whose keys follow
        # one another there are one sequence, of all keys up to the last one's.
        order, first, final = self._order()
        each, columns = torch.arange(len(order), device=order.device)[:, None], order.shape[1]
        place = torch.empty_like(order).scatter(1, order, torch.arange(columns, device=order.device).expand_as(order))
        last = place.gather(1, cast(Tensor, self.own))
        begin, last = first.gather(1, last), final.gather(1, last) if self.both else last
        starts = torch.ones_like(last, dtype=torch.bool)
        starts[:, 1:] = (last[:, 1:] != last[:, :-1] + (not self.both)) | (begin[:, 1:] != begin[:, :-1])
        query_ends = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
        of = query_ends[1:] - 1  # the last query of each sequence
        stop, begin = (x.flatten()[of] for x in (last + 1 + each * columns, begin + each * columns))
        key_ends = F.pad((stop - begin).cumsum(0), (1, 0))
        total, *longest = torch.stack([key_ends[-1], query_ends.diff().max(), key_ends.diff().max()]).tolist()
        shift = (begin - key_ends[:-1]).repeat_interleave(stop - begin, output_size=total)
        keys = (order + each * columns).flatten()[shift + torch.arange(total, device=shift.device)]
        every = torch.arange(order.numel(), device=keys.device)
        given = None if total == len(every) and torch.equal(keys, every) else keys
        return Sequences(given, query_ends.int(), key_ends.int(), (longest[0], longest[1]))

    def _order(self) -> tuple[Tensor, Tensor, Tensor]:
        # (B, C) columns by packed sample and position; for each place there the first and last of its packed sample.
        columns, count = self.columns, self.columns.shape[1]
        packs = torch.zeros_like(columns) if self.packs is None else self.packs[1] - self.packs[1].min()
        place, at = columns, torch.arange(count, device=columns.device).expand_as(columns)
        if self.valid is not None:  # what may not be seen is a packed sample of its own, behind the others
            packs = packs.where(self.valid, packs.max() + 1)
            place = place.where(self.valid, at)
        order = (packs * max(self.tokens, count) + place).argsort(dim=1, stable=True)
        packs = packs.gather(1, order)
        begins = torch.ones_like(order, dtype=torch.bool)
        begins[:, 1:] = packs[:, 1:] != packs[:, :-1]
        ends = torch.ones_like(begins)
        ends[:, :-1] = begins[:, 1:]
        last = at.where(ends, count).flip(1).cummin(1).values.flip(1)
        return order, at.where(begins, 0).cummax(1).values, last


def pick_keys(x: Tensor, keys: Tensor) -> Tensor:
    """Rows (S,) of keys or values (B, H, C, W), as (1, H, S, W)."""
    return x.transpose(1, 2).flatten(0, 1)[keys].transpose(0, 1)[None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as one that is added to logits."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
