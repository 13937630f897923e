"""Image tokens chosen one after another, or one pivot's share after another.

Shape letters: B batch, T tokens, P pivots, G heads of keys, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def diverse(states: Tensor, image: Tensor, counts: Tensor, most: int | None = None) -> Tensor:
    """Tokens as far from one another as can be, chosen greedily.

    d[t, u] = 1 - cos(x[t], x[u]); first the token whose nearest other is farthest, then always the one whose nearest
    chosen one is farthest

    Args:
        states: (B, T, D).
        image: (B, T) bool, the tokens to choose from.
        counts: (B,) int64, how many are chosen.
        most: the largest of these; None to ask the device.

    Returns:
        (B, T) float32, minus the place in the order of choice; minus infinity for those not chosen.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.2]]])
        >>> diverse(x, torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])).topk(2).indices.tolist()
        [[2, 0]]

    Source: arXiv 2503.02175 (DivPrune), github.com/vbdi/divprune.
    """
    unit = F.normalize(states.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), dim=-1)
    # Sample by sample, so that one T x T matrix is there at a time.
    nearest = torch.stack([_nearest_other(*one) for one in zip(unit, image, strict=True)])
    nearest = nearest.masked_fill(~image, -torch.inf)
    chosen: list[Tensor] = []
    for order in range(int(counts.max()) if most is None else most):
        best = nearest.argmax(1, keepdim=True)
        chosen.append(best)
        apart = 1 - (unit @ _rows(unit, best).mT)[:, :, 0]
        nearest = torch.minimum(nearest, apart) if order else apart.masked_fill(~image, -torch.inf)
        nearest = nearest.scatter_(1, best, -torch.inf)
    return _by_order(chosen, image, counts)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


def _by_order(chosen: list[Tensor], image: Tensor, counts: Tensor) -> Tensor:
    # A sample with fewer tokens than others choose goes on to choose what it has chosen, or no image token.
    score = torch.full(image.shape, -torch.inf, device=image.device)
    if not chosen:
        return score
    order = torch.arange(len(chosen), device=image.device)
    taken = torch.where(order < torch.minimum(counts, image.sum(1))[:, None], -order.float(), -torch.inf)
    return score.scatter_reduce(1, torch.cat(chosen, 1), taken, "amax")


def _nearest_other(unit: Tensor, image: Tensor) -> Tensor:
    apart = (1 - unit @ unit.T).masked_fill(~image, torch.inf)
    return apart.fill_diagonal_(torch.inf).amin(1)


def relevance(states: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """How little an image token is like the text, between its least and its greatest.

    v[t] = mean over text u of -cos(x[t], x[u]); s[t] = (v[t] - min v + 1e-6) / (max v - min v)

    Args:
        states: (B, T, D).
        image: (B, T) bool, the tokens to score.
        text: (B, T) bool.

    Returns:
        (B, T) float32; 1 where all are alike or there is no text, 0 for other tokens.

    Source: CDPruner (arXiv 2506.10967), github.com/Theia-4869/CDPruner, whose least and greatest are of the batch.
    """
    unit = F.normalize(states.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), dim=-1)
    mean = (unit * text[:, :, None]).sum(1) / text.sum(1, keepdim=True).clamp(min=1)
    value = -(unit @ mean[:, :, None])[:, :, 0]
    least = value.masked_fill(~image, torch.inf).amin(1, keepdim=True)
    span = value.masked_fill(~image, -torch.inf).amax(1, keepdim=True) - least
    return ((value - least + 1e-6) / span).where(span > 0, 1.0).where(image, 0.0)


def conditional(states: Tensor, weight: Tensor, image: Tensor, counts: Tensor, most: int | None = None) -> Tensor:
    """Tokens that are worth much and unlike one another: the greedy choice of a determinantal point process.

    L[t, u] = w[t] cos(x[t], x[u]) w[u]; always the token with the largest variance given those chosen, under L

    Args:
        states: (B, T, D).
        weight: (B, T) float, w, above 0.
        image: (B, T) bool, the tokens to choose from.
        counts: (B,) int64, how many are chosen.
        most: the largest of these; None to ask the device.

    Returns:
        (B, T) float32, minus the place in the order of choice; minus infinity for those not chosen.

    Source: CDPruner (arXiv 2506.10967), github.com/Theia-4869/CDPruner.
    """
    unit = F.normalize(states.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), dim=-1)
    unit = unit * weight[:, :, None]
    variance = unit.square().sum(-1).masked_fill(~image, -torch.inf)
    most = int(counts.max()) if most is None else most
    chosen: list[Tensor] = []
    factors = unit.new_zeros(len(unit), most, unit.shape[1])  # rows of the Cholesky factor
    for order in range(most):
        largest, best = variance.max(1, keepdim=True)
        chosen.append(best)
        row, before = unit @ _rows(unit, best).mT, factors[:, :order]
        row = torch.baddbmm(row, before.mT, before.gather(2, best[:, None].expand(-1, order, -1)), alpha=-1)[:, :, 0]
        row = row / largest.clamp(min=1e-12).sqrt()
        factors[:, order] = row
        variance = variance.addcmul_(row, row, value=-1).scatter_(1, best, -torch.inf)
    return _by_order(chosen, image, counts)


def pivots(keys: Tensor, image: Tensor, text: Tensor, images: int, texts: int) -> tuple[Tensor, Tensor]:
    """The image tokens, then the text behind them, whose keys are longest.

    s[t] = sum over all heads and features of |k[t]|

    Args:
        keys: (B, G, T, D / H).
        image: (B, T) bool, the tokens to choose image pivots from.
        text: (B, T) bool, those to choose text pivots from; what stands before the last image token does not count.
        images: image pivots.
        texts: text pivots.

    Returns:
        (B, P) int64, by falling length, image pivots first; (B, P) bool, False where a sample has fewer.

    Source: DART (arXiv 2502.11494), as in github.com/ModelTC/LightCompress.
    """
    length = keys.detach().float().abs().sum((1, 3))
    behind = text & (image.flip(1).cumsum(1).flip(1) == 0)
    chosen = []
    for among, most in ((image, images), (behind, texts)):
        some = length.nan_to_num(nan=0.0).masked_fill(~among, -1)
        order = some.argsort(dim=1, descending=True, stable=True)[:, : min(most, length.shape[1])]
        chosen.append((order, some.gather(1, order) >= 0))
    (one, valid), (other, real) = chosen
    return torch.cat([one, other], 1), torch.cat([valid, real], 1)


def unlike(states: Tensor, image: Tensor, counts: Tensor, pivots: Tensor, valid: Tensor) -> Tensor:
    """Image pivots, and an equal share for each pivot of the other image tokens: those least like it.

    Pivot by pivot, the floor(n / P) remaining tokens (one more for the first n mod P) with the lowest cosine to it, of
    n = counts less image pivots.

    Args:
        states: (B, T, D).
        image: (B, T) bool, the tokens to choose from.
        counts: (B,) int64, how many are chosen.
        pivots: (B, P) int64, in the order in which they choose.
        valid: (B, P) bool, False for those that do not.

    Returns:
        (B, T) float32, 1 and more for image pivots by their order, 1 for those chosen, 0 for others.

    Source: DART (arXiv 2502.11494), as in github.com/ModelTC/LightCompress.
    """
    unit = F.normalize(states.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), dim=-1)
    own = valid & image.gather(1, pivots)
    place = torch.arange(pivots.shape[1], 0, -1, device=image.device, dtype=torch.float32).expand_as(pivots)
    score = torch.zeros(image.shape, device=image.device).scatter_reduce(1, pivots, place * own, "amax")
    score = torch.where(score > 0, 1 + score, score)
    shares = (counts - own.sum(1)).clamp(min=0)
    size, more = shares // valid.sum(1).clamp(min=1), shares % valid.sum(1).clamp(min=1)
    for at in range(pivots.shape[1]):
        like = (unit @ unit.gather(1, pivots[:, at, None, None].expand(-1, -1, unit.shape[-1])).mT)[:, :, 0]
        free = image & (score == 0)
        order = like.masked_fill(~free, torch.inf).argsort(dim=1, stable=True)
        take = torch.where(valid[:, at], size + (valid[:, :at].sum(1) < more), 0)
        first = torch.arange(image.shape[1], device=image.device) < take[:, None]
        score = score + torch.zeros_like(image).scatter(1, order, first).logical_and(free)
    return score
