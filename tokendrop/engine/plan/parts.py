"""Budgets: how many image tokens stay of each sample, or of each of its images or frames.

Shape letters: B batch, T tokens, P samples (packed ones count each), F images or frames, N image tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokendrop.engine.plan.packs import Packs
from tokendrop.errors import LayoutError, MethodError
from tokendrop.layout import TokenLayout
from tokendrop.roles import Select


class Parts(NamedTuple):
    """Parts of samples, each with a budget.

    Args:
        number: (B, T) int64, the part of its row that an image token belongs to, from 0 up; -1 for other tokens.
        kept: (P, F) int64, how many of each stay.
    """

    number: Tensor
    kept: Tensor


class Budgets:
    """How many image tokens selections keep, asked in the order of their layers.

    Args:
        layout: of (B, T) tokens.
        packs: its P samples, where rows hold several.
        counts: image tokens of each.

    Raises:
        LayoutError: frames are asked for, and the layout does not say which they are.
        MethodError: of what is left of a sample, a budget of another kind is asked.
    """

    def __init__(self, layout: TokenLayout, packs: Packs | None, counts: Sequence[int]) -> None:
        self.layout, self.packs, self.counts = layout, packs, counts
        self.owners = range(len(layout.image)) if packs is None else packs.rows
        self._left: dict[int, tuple[str, list[int]]] = {}
        self._found: dict[str, tuple[Tensor, list[list[int]]]] = {}

    def kept(self, select: Select | None, samples: Sequence[int]) -> dict[int, list[int]]:
        """How many each sample of some rows keeps: the row itself, or those packed into it."""
        if select is not None and select.frames:
            known_frames(self.layout, "a score compares frames")
        kept: dict[int, list[int]] = {sample: [] for sample in samples}
        for at, owner in enumerate(self.owners):
            if select is not None and owner in kept:
                kept[owner].append(sum(self._counts(select, at)))
        return kept

    def leave(self, select: Select | None, samples: Sequence[int]) -> None:
        """The others of some rows are GONE; all of them where nothing is selected."""
        for at, owner in enumerate(self.owners):
            if owner in samples:
                self._left[at] = ("sample", [0]) if select is None else (select.per, self._counts(select, at))

    def _counts(self, select: Select, at: int) -> list[int]:
        # Of each part of a sample, and no more than are left of it.
        counts = [select.count(size) for size in self._sizes(select.per)[at]]
        per, left = self._left.get(at, (select.per, counts))
        if per == select.per:
            return [min(pair) for pair in zip(counts, left, strict=True)]
        if select.per != "sample" and sum(left):
            raise MethodError(
                f"a selection with per={select.per!r} at layer {select.layer} behind one with per={per!r}, whose "
                "others are GONE: how many are left of each is not known beforehand; give both the same"
            )
        return [min(sum(counts), sum(left))] if select.per == "sample" else [0] * len(counts)

    def parts(self, select: Select | None, samples: Sequence[int]) -> Parts | None:
        """The parts of some rows; None where a sample is one."""
        if select is None or select.per == "sample":
            return None
        kept = [self._counts(select, at) for at, owner in enumerate(self.owners) if owner in samples]
        number, _ = self._found[select.per]
        return Parts(number, torch.tensor(kept, device=number.device))

    def _sizes(self, per: str) -> list[list[int]]:
        # Image tokens of each part, of each of the P samples.
        if per == "sample":
            return [[count] for count in self.counts]
        if per not in self._found:
            number, image = part_numbers(self.layout, per), self.layout.image
            own, inside = (number, image) if self.packs is None else (self.packs.take(number), self.packs.take(image))
            sizes = torch.zeros(len(own), int(number.max()) + 1, dtype=torch.int64, device=own.device)
            sizes = sizes.scatter_add(1, own.clamp(min=0), inside.long()) if sizes.numel() else sizes
            self._found[per] = number, sizes.tolist()
        return self._found[per][1]


def part_numbers(layout: TokenLayout, per: str) -> Tensor:
    """The image, or the frame, of its row that each image token belongs to.

    Args:
        layout: of (B, T) tokens.
        per: "image" or "frame".

    Returns:
        (B, T) int64, from 0 up in each row; -1 for other tokens.

    Raises:
        LayoutError: the layout does not say which frames there are.

    Example:
        >>> layout = TokenLayout(torch.tensor([[True, True, False, True]]), frames=torch.tensor([[0, 1, 0, 0]]))
        >>> part_numbers(layout, "image").tolist(), part_numbers(layout, "frame").tolist()
        ([[0, 0, -1, 1]], [[0, 1, -1, 2]])
    """
    image, names = layout.image, [image_numbers(layout)]
    if per == "frame":
        names.append(known_frames(layout, "per='frame' keeps a share of each frame"))
    row = torch.arange(len(image), device=image.device)[:, None].expand_as(image)
    table = torch.stack([one[image] for one in (row, *names)], 1)
    found, inverse = table.unique(dim=0, return_inverse=True)
    first = torch.searchsorted(found[:, 0].contiguous(), row[:, 0].contiguous())
    return torch.full_like(row, -1).index_put((image,), inverse - first[table[:, 0]])


def known_frames(layout: TokenLayout, asks: str) -> Tensor:
    """(B, T) int64, the frame of each image token.

    Raises:
        LayoutError: the layout does not say it, with what `asks`.
    """
    if layout.frames is None:
        raise LayoutError(
            f"{asks}, and the layout does not say which frame an image token belongs to; give TokenLayout(frames=...), "
            "(B, T) int64, 0 throughout where there is no video, or make the layout with "
            "tokendrop.callbacks.batch.batch_layout of a batch with image_grid_thw, video_grid_thw or "
            "pixel_values_videos"
        )
    return layout.frames


def image_numbers(layout: TokenLayout) -> Tensor:
    """(B, T) int64, which image or video an image token belongs to; what other tokens have means nothing."""
    if layout.images is not None:
        return layout.images
    begins = layout.image.clone()
    begins[:, 1:] &= ~layout.image[:, :-1]
    if layout.packs is not None:
        begins[:, 1:] |= layout.image[:, 1:] & (layout.packs[:, 1:] != layout.packs[:, :-1])
    return begins.cumsum(1)


def highest_of_each(order: Tensor, candidates: Tensor, parts: Parts, number: Tensor) -> Tensor:
    """The best candidates of each part.

    Args:
        order: (P, T) int64, tokens from the best on.
        candidates: (P, T) bool.
        parts: with the budget of each.
        number: (P, T) int64, the part of each image token.

    Returns:
        (P, T) bool.
    """
    part = number.where(candidates, parts.kept.shape[1])
    by_part = order.gather(1, part.gather(1, order).argsort(dim=1, stable=True))
    of = part.gather(1, by_part)
    at = torch.arange(of.shape[1], device=of.device)
    begins = pad(of[:, 1:] != of[:, :-1], (1, 0), value=True)
    rank = at - torch.where(begins, at, 0).cummax(1).values
    first = rank < pad(parts.kept, (0, 1)).gather(1, of)
    return torch.zeros_like(candidates).scatter(1, by_part, first) & candidates
