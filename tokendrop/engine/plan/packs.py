"""Packed samples: several in one row of a batch, each looked at as a row of its own.

Shape letters: B batch, T tokens, P packed samples, W tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrop.engine.plan.rows import Rows, choose_rows
from tokendrop.layout import IGNORED, TokenLayout
from tokendrop.roles import Encoded, Merge


@dataclass(frozen=True, eq=False)
class Packs:
    """The packed samples of some rows of a batch.

    Args:
        row: (P,) int64, the row that each is in.
        rows: the same.
        number: (P,) int64, which of the packed samples of the batch it is, row by row.
        tokens: (P, W), its tokens.
    """

    row: Tensor
    rows: tuple[int, ...]
    number: Tensor
    tokens: Rows

    @classmethod
    def of(cls, layout: TokenLayout) -> "Packs | None":
        """Those of a layout; None where no row has several. Padding is in none."""
        if layout.packs is None:
            return None
        names, key = layout.packs.unique(return_inverse=True)
        key = key + torch.arange(len(key), device=key.device)[:, None] * len(names)
        if layout.padding is not None:
            key = key.where(layout.padding, -1)
        found, sizes = key[key >= 0].unique(return_counts=True)
        row = found // len(names)
        rows = tuple(row.tolist())
        if len(set(rows)) == len(rows):
            return None
        tokens = choose_rows(key[row] == found[:, None], sizes, int(sizes.max()))
        return cls(row, rows, torch.arange(len(rows), device=row.device), tokens)

    def within(self, members: Sequence[int]) -> "Packs":
        """Those of some rows."""
        inside = set(members)
        chosen = [at for at, row in enumerate(self.rows) if row in inside]
        some = torch.tensor(chosen, device=self.row.device)
        return Packs(self.row[some], tuple(self.rows[at] for at in chosen), self.number[some], self.tokens.of(some))

    def take(self, x: Tensor) -> Tensor:
        """Of `x` (B, T, ...), the tokens of each, (P, W, ...); those that fill are False in a mask."""
        taken = x[self.row[:, None], self.tokens.index]
        return taken & self.tokens.valid if x.dtype == torch.bool else taken

    def put(self, full: Tensor, x: Tensor) -> Tensor:
        """`full` (B, T) with the tokens of each from `x` (P, W)."""
        flat = self.row[:, None] * full.shape[1] + self.tokens.index
        flat = flat.where(self.tokens.valid, full.numel())  # one place more, for those that fill
        padded = torch.cat([full.flatten(), full.new_zeros(1)]).to(x.dtype)
        return padded.scatter(0, flat.flatten(), x.flatten())[:-1].view(full.shape)

    def layout(self, of: TokenLayout) -> TokenLayout:
        """The layout of (P, W) tokens, where each is a sample padded on the right."""
        labels = None if of.labels is None else self.take(of.labels).where(self.tokens.valid, IGNORED)
        return TokenLayout(self.take(of.image), padding=self.tokens.valid, labels=labels)

    def encoded(self, encoded: Encoded) -> Encoded:
        """What the vision encoder says of the tokens of each."""
        attention, keys = (torch.stack([self.take(one) for one in part]) for part in encoded[:2])
        return Encoded(attention, keys, self.take(encoded.place))

    def merge(self, merge: Merge, full: Tensor) -> Merge:
        """A merge within each, (P, W), as one of rows like `full` (B, T)."""
        into = torch.arange(full.shape[1], device=full.device).expand_as(full)
        weight = torch.ones_like(full, dtype=merge.weight.dtype)
        return Merge(self.put(into, self.tokens.index.gather(1, merge.into)), self.put(weight, merge.weight))
