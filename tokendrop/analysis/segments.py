"""The segments of a sample, and a heat map of what looks at what.

Shape letters: B batch, T tokens, L layers, N blocks of a heat map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrop.layout import IGNORED, Segment, TokenLayout

SEGMENTS = tuple(one.name.lower() for one in Segment)
OWN_IMAGE = "own image"  # the output of a task that makes images


@dataclass(frozen=True)
class HeatMap:
    """Attention of one sample, averaged over heads and over N x N blocks of rows and columns.

    Args:
        values: (L, N, N) float32, a block's mean probability.
        borders: the first row of each run of a segment, with its name, in blocks.
    """

    values: Tensor
    borders: tuple[tuple[float, str], ...]


def segments_of(layout: TokenLayout) -> Tensor:
    """(B, T) int64 of `Segment`: the layout's own, or those that follow from images and labels.

    Example:
        >>> image = torch.tensor([[False, True, False, False]])
        >>> segments_of(TokenLayout(image, labels=torch.tensor([[-100, -100, -100, 7]]))).tolist()
        [[0, 1, 2, 3]]
    """
    if layout.segments is not None:
        return layout.segments.long()
    image = layout.image
    labelled = torch.zeros_like(image) if layout.labels is None else layout.labels != IGNORED
    before = image.long().cumsum(1) == 0
    # Most of a generated image is trained; of another, at most the token that text before it foretells.
    generated = 2 * (image & labelled).sum(1, keepdim=True) > image.sum(1, keepdim=True)
    given = before & ~generated & image.any(1, keepdim=True)
    segments = torch.where(given, Segment.SYSTEM, Segment.INSTRUCTION)
    return segments.masked_fill(labelled | image, Segment.OUTPUT).masked_fill(image & ~generated, Segment.IMAGE)


def borders(segments: Tensor, blocks: int) -> tuple[tuple[float, str], ...]:
    """Where runs of a segment begin in (T,) `segments`, in blocks, with their names."""
    tokens: Sequence[int] = segments.tolist()
    starts = [at for at, one in enumerate(tokens) if at == 0 or one != tokens[at - 1]]
    return tuple((at * blocks / len(tokens), SEGMENTS[tokens[at]]) for at in starts)
