"""Index tensors: which rows of each sample matter, which compute, and which projections they use.

Shape letters: B batch, T tokens, P rows before the image, K computed rows, M context rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrop.errors import NeededRowError
from tokendrop.layout import IGNORED, TokenLayout
from tokendrop.roles import Role, Route


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of each sample, to a common count.

    Args:
        index: (B, K) int64; the chosen rows ascending, then other rows that fill up to K.
        valid: (B, K) bool, False for rows that fill.
    """

    index: Tensor
    valid: Tensor

    def of(self, samples: Tensor) -> "Rows":
        """The rows of some samples, (N,) int64."""
        return Rows(self.index[samples], self.valid[samples])


# A set of image-only parts, and which of them are used; None for the layer's own.
Own = tuple[str, frozenset[str]] | None


@dataclass(frozen=True, eq=False)
class Split:
    """Flat rows by the projection they use.

    Args:
        names: the set and the parts of it for each list of rows; None for the layer's own.
        rows: int64 rows of the flat (B * K) input, for each name.
        inverse: (B * K,) int64, puts the concatenated outputs back in order.
    """

    names: tuple[Own, ...]
    rows: tuple[Tensor, ...]
    inverse: Tensor


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


def choose_rows(chosen: Tensor, counts: Tensor, size: int) -> Rows:
    """The rows where `chosen` (B, T) is true, `counts` (B,) of them, filled up to `size`."""
    index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    return Rows(index, torch.arange(size, device=chosen.device) < counts[:, None])


def split_rows(rows: Tensor, names: tuple[Own, ...]) -> Split:
    """Flat rows by set: `rows` (B, K) bool use the parts named for their sample, others the layer's own."""
    named = {name for name in names if name is not None}
    sets: list[Own] = [None, *sorted(named, key=lambda one: (one[0], sorted(one[1])))]
    owner = torch.tensor([sets.index(name) for name in names], device=rows.device)
    choice = torch.where(rows, owner[:, None], 0).flatten()
    parts = [(choice == i).nonzero().flatten() for i in range(len(sets))]
    # The layer's own projections run, and so are in the graph, even where no row needs them.
    used = [(name, part) for name, part in zip(sets, parts, strict=True) if name is None or len(part)]
    return Split(tuple(n for n, _ in used), tuple(p for _, p in used), torch.cat([p for _, p in used]).argsort())


def needed_rows(layout: TokenLayout) -> Tensor:
    """(B, T) bool, the rows whose output is trained: labels[t + 1] is one."""
    needed = torch.zeros_like(layout.image)
    if layout.labels is not None:
        needed[:, :-1] = layout.labels[:, 1:] != IGNORED
    return needed


def check_needed(layout: TokenLayout, routes: Sequence[Route], counts: Sequence[int]) -> None:
    """Refuse to train image rows, `counts` in each sample, that end with a stale state.

    Raises:
        NeededRowError: with the sample.
    """
    for sample, (route, count) in enumerate(zip(routes, counts, strict=True)):
        if count and route[-1].image in (Role.CONTEXT, Role.GONE):
            raise NeededRowError(
                f"sample {sample} (task {layout.tasks[sample]!r}) trains {count} image rows, but its method "
                f"leaves them {route[-1].image.name} in the last layer, with a stale state; a row is trained where the "
                "next token has a label. Where images are read, set those labels to -100, also that of the first token "
                "behind an image: labels[:, 1:][image[:, :-1]] = -100; where images are made, use HMGen or SkipVision"
            )


def before_one_image(layout: TokenLayout, computing: Tensor) -> Tensor:
    """(B,) int64, computing rows before the image; -1 where there is not one image in one piece, or padding."""
    tokens = torch.arange(layout.image.shape[1], device=layout.image.device)
    first = layout.image.to(torch.uint8).argmax(1)
    last = len(tokens) - 1 - layout.image.flip(1).to(torch.uint8).argmax(1)
    one = layout.image.sum(1) == last - first + 1
    one &= True if layout.padding is None else layout.padding.all(1)
    return (computing & (tokens < first[:, None])).sum(1).where(one, -1)


def behind_image(first: int, size: int, context_size: int, device: torch.device) -> Tensor:
    """(K - P, M + K) bool, what computing rows behind one image see, where P rows `first` see none of it.

    Every image row stands before all of them, in the columns as in the sequence: the last sees all, and each before it
    one fewer.
    """
    shape = size - first, context_size + size
    return torch.ones(shape, dtype=torch.bool, device=device).tril(context_size + first)


def real_rows(layout: TokenLayout) -> Tensor:
    """(B, T) bool, rows whose output may be used; without labels nobody knows that of a padding row."""
    if layout.padding is None or layout.labels is None:
        return torch.ones_like(layout.image)
    return layout.padding
