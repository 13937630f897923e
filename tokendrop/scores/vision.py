"""Image tokens chosen by what the vision encoder looks at, and those that leave matched to those that stay.

Shape letters: B batch, T tokens, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(local: Tensor, whole: Tensor, image: Tensor, place: Tensor, counts: Tensor, window: int) -> Tensor:
    """The best of each window of an image, then the best of the whole.

    The first floor(n / 2) of n tokens are taken window by window: from each its best by `local`, then from each its
    second best, and so on; within such a round the better first. The others are the best by `whole`.

    Args:
        local: (B, T) float, attention in a shallow layer.
        whole: (B, T) float, attention in a deep layer.
        image: (B, T) bool, the tokens to score.
        place: (B, T, 3) int64, image, row and column of each; -1 for tokens that come of no patch, which stay last.
        counts: (B,) int64, n.
        window: rows and columns of a window, in tokens.

    Returns:
        (B, T) float; infinite for those taken window by window.

    Source: VScan, github.com/Tencent/SelfEvolvingAgent, which takes as many of each window and so may keep fewer.
    """
    seen = image & (place[..., 0] >= 0)
    best, rounds = _rounds(local, seen, place // place.new_tensor([1, window, window]))
    taken = best.gather(1, rounds.gather(1, best).argsort(dim=1, stable=True))
    at = torch.arange(image.shape[1], device=image.device)
    first = torch.zeros_like(image).scatter(1, taken, at < counts[:, None] // 2)
    return whole.masked_fill(image & ~seen, -1.0).masked_fill(first & seen, torch.inf)


def capped_scan(local: Tensor, whole: Tensor, image: Tensor, place: Tensor, counts: Tensor, window: int) -> Tensor:
    """The best by `local`, no window with more than its share, then the best of the whole.

    Of n tokens the first floor(n / 2) are the best by `local` whose window holds fewer than ceil(floor(n / 2) / W)
    better ones, of W whole windows; rows and columns behind the last whole window belong to it.

    Args:
        local: (B, T) float, attention in a shallow layer.
        whole: (B, T) float, attention in a deep layer.
        image: (B, T) bool, the tokens to score.
        place: (B, T, 3) int64, image, row and column of each; -1 for tokens that come of no patch, which stay last.
        counts: (B,) int64, n.
        window: rows and columns of a window, in tokens.

    Returns:
        (B, T) float; infinite for the first ones.

    Source: VScan, github.com/Tencent/SelfEvolvingAgent, its code for Qwen2.5-VL.
    """
    seen = image & (place[..., 0] >= 0)
    number = place[..., 0].masked_fill(~seen, 0)
    extent = place.new_zeros(len(image), int(number.max()) + 1, 2)
    inside = (place[..., 1:] + 1).masked_fill(~seen[..., None], 0)
    at = number[..., None].expand(-1, -1, 2)
    extent = extent.scatter_reduce(1, at, inside, "amax")  # rows and columns of each image
    windows = (extent // window).clamp(min=1) * (extent > 0)
    cells = torch.minimum(place[..., 1:] // window, (windows.gather(1, at) - 1).clamp(min=0))
    best, rounds = _rounds(local, seen, torch.cat([place[..., :1], cells], -1))
    half = counts // 2
    limit = -(-half // windows.prod(-1).sum(1).clamp(min=1))
    fits = (rounds < limit[:, None]).gather(1, best)  # from the best on
    first = fits & (fits.cumsum(1) <= half[:, None])
    taken = torch.zeros_like(image).scatter(1, best, first) & seen
    return whole.masked_fill(image & ~seen, -1.0).masked_fill(taken, torch.inf)


def _rounds(local: Tensor, image: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    # The order of tokens from the best on, and how many of its window are better than each.
    cell = ((cells[..., 0] << 40) + (cells[..., 1] << 20) + cells[..., 2]).masked_fill(~image, -1)
    best = _order(local, image)
    by_cell = best.gather(1, cell.gather(1, best).argsort(dim=1, stable=True))
    at, sorted_cells = torch.arange(image.shape[1], device=image.device), cell.gather(1, by_cell)
    begins = F.pad(sorted_cells[:, 1:] != sorted_cells[:, :-1], (1, 0), value=True)
    rounds = at - torch.where(begins, at, 0).cummax(1).values
    return best, torch.empty_like(best).scatter(1, by_cell, rounds).masked_fill(~image, len(at))


def dominant(
    looked: Tensor, image: Tensor, counts: Tensor, contextual: Tensor, width: int, patches: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The dominant tokens, the anchors of the contextual ones, and the pool that these stand for.

    The n - c tokens with the highest attention are dominant. The pool are the next w c by attention, fewer where there
    are no more; its p tokens in that order are cut into c runs, whose first ones are the anchors.

    Args:
        looked: (B, T) float, attention in the vision encoder.
        image: (B, T) bool, the tokens to choose from, n or more.
        counts: (B,) int64, n.
        contextual: (B,) int64, c.
        width: w.
        patches: (B, T) bool, those that come of patches, before which none of the others is taken; None for all.

    Returns:
        The three, (B, T) bool each; anchors are in the pool.

    Source: DUET-VLM, github.com/AMD-AGI/DUET-VLM, after VisionZip.
    """
    seen = image if patches is None else image & patches
    looked = looked.masked_fill(~seen, -1.0)
    order, at = _order(looked, image), torch.arange(image.shape[1], device=image.device)
    rank = torch.empty_like(order).scatter(1, order, at.expand_as(order))
    first = counts[:, None] - contextual[:, None]
    size = torch.minimum(width * contextual, seen.sum(1).maximum(counts) - first[:, 0])[:, None]
    pool = image & (rank >= first) & (rank < first + size)
    runs = [(rank - first - back) * contextual[:, None] // size.clamp(min=1) for back in (0, 1)]
    return image & (rank < first), pool & (runs[0] != runs[1]), pool


def spread(
    looked: Tensor, image: Tensor, counts: Tensor, contextual: Tensor, patches: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The dominant tokens, and anchors spread evenly over the others.

    The n - c tokens with the highest attention are dominant. Of the r others, in the order of the image, every
    max(1, floor(r / c))-th is an anchor, from the first on, c in all.

    Args:
        looked: (B, T) float, attention in the vision encoder.
        image: (B, T) bool, the tokens to choose from, n or more.
        counts: (B,) int64, n.
        contextual: (B,) int64, c.
        patches: (B, T) bool, those that come of patches, before which none of the others is taken; None for all.

    Returns:
        The two, (B, T) bool each; fewer than n where fewer come of patches.

    Example:
        >>> looked, image = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 0.0]]), torch.ones(1, 6, dtype=torch.bool)
        >>> one, other = spread(looked, image, torch.tensor([4]), torch.tensor([2]))
        >>> one.nonzero()[:, 1].tolist(), other.nonzero()[:, 1].tolist()
        ([0, 2], [1, 4])

    Source: VisionZip, github.com/dvlab-research/VisionZip.
    """
    seen = image if patches is None else image & patches
    order, at = _order(looked, seen), torch.arange(image.shape[1], device=image.device)
    rank = torch.empty_like(order).scatter(1, order, at.expand_as(order))
    first = seen & (rank < (counts - contextual)[:, None])
    others = seen & ~first
    step = (others.sum(1) // contextual.clamp(min=1)).clamp(min=1)[:, None]
    number = others.cumsum(1) - 1
    return first, others & (number % step == 0) & (number // step < contextual[:, None])


def nearest(features: Tensor, members: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each member the target that is most like it, by cosine; for other tokens themselves.

    Args:
        features: (B, T, D).
        members: (B, T) bool.
        targets: (B, T) bool, none of them a member.

    Returns:
        (B, T) int64, and (B, T) int64, how many tokens go where a token goes, itself among them if it stays.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.1, 3.0]]])
        >>> into, sizes = nearest(x, torch.tensor([[False, False, True]]), torch.tensor([[True, True, False]]))
        >>> into.tolist(), sizes.tolist()
        ([[0, 1, 1]], [[1, 2, 2]])

    Source: ours.
    """
    unit = F.normalize(features.detach().float(), dim=-1)
    # Sample by sample, so that one T x T matrix is there at a time.
    like = [(one @ one.T).masked_fill(~target, -torch.inf).argmax(1) for one, target in zip(unit, targets, strict=True)]
    at = torch.arange(members.shape[1], device=members.device).expand_as(members)
    into = torch.stack(like).where(members & targets.any(1, keepdim=True), at)
    sizes = torch.zeros_like(into).scatter_add(1, into, torch.ones_like(into))
    return into, sizes.gather(1, into)


def _order(score: Tensor, image: Tensor) -> Tensor:
    return score.detach().masked_fill(~image, -torch.inf).argsort(dim=1, descending=True, stable=True)
