"""Scores of the image tokens of videos, from frame to frame.

Shape letters: B batch, T tokens, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal(states: Tensor, images: Tensor, frames: Tensor) -> Tensor:
    """How unlike the token at the same place of the frame before a token is.

    s[b, t] = 1 - cos(x[b, t], x[b, u]), u the token of the frame before that has as many of its frame before it as t

    Args:
        states: (B, T, D).
        images: (B, T) int64, the image or video of each image token; below 0 for other tokens.
        frames: (B, T) int64, its frame, ascending.

    Returns:
        (B, T) float32 in [0, 2]; infinite where there is no such token: in a first frame, and in an image.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, -1.0]]])
        >>> temporal(x, torch.zeros(1, 4).long(), torch.tensor([[0, 0, 1, 1]])).tolist()
        [[inf, inf, 0.0, 2.0]]

    Source: DyCoke, arXiv 2411.15024 and github.com/KD-TAO/DyCoke, which so compares every second frame with the one
    before it, then every fourth with the one two before; that each is compared with the one before is ours.
    """
    before = frame_before(images, frames)
    here, there = states.detach().float(), before.clamp(min=0)[:, :, None].expand_as(states)
    like = F.cosine_similarity(here, here.gather(1, there), dim=-1)
    return (1 - like).masked_fill(before < 0, torch.inf)


def frame_before(images: Tensor, frames: Tensor) -> Tensor:
    """For each image token that at the same place of the frame before, in the order of tokens.

    Args:
        images: (B, T) int64, the image or video of each image token; below 0 for other tokens.
        frames: (B, T) int64, its frame, ascending.

    Returns:
        (B, T) int64; -1 where there is none.

    Example:
        >>> frame_before(torch.tensor([[0, 0, -1, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1, 1, 4]])).tolist()
        [[-1, -1, -1, 0, 1, 3]]
    """
    # By video, in it by frame, in it by token: a frame is one block of these, behind that of the frame before.
    order = frames.argsort(dim=1, stable=True)
    order = order.gather(1, images.gather(1, order).argsort(dim=1, stable=True))
    video, frame = images.gather(1, order), frames.gather(1, order)
    at = torch.arange(order.shape[1], device=order.device).expand_as(order)
    begins = F.pad((video[:, 1:] != video[:, :-1]) | (frame[:, 1:] != frame[:, :-1]), (1, 0), value=True)
    start = torch.where(begins, at, 0).cummax(1).values
    last = (start - 1).clamp(min=0)
    source = start.gather(1, last) + at - start
    known = (start > 0) & (video >= 0) & (video.gather(1, last) == video) & (source < start)
    found = order.gather(1, source.clamp(max=order.shape[1] - 1)).where(known, -1)
    return torch.empty_like(order).scatter(1, order, found)
