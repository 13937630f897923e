"""Scores of image tokens among each other, from their features alone.

Shape letters: B batch, T tokens, M image tokens, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(states: Tensor, image: Tensor) -> Tensor:
    """How unlike the other image tokens of its sample a token is.

    s[b, t] = -mean over the other image tokens u of cos(x[b, t], x[b, u])

    Args:
        states: (B, T, D).
        image: (B, T) bool, the tokens to score.

    Returns:
        (B, T) float32; 0 for other tokens, and for one alone.

    Source: ours.
    """
    unit = F.normalize(_finite(states), dim=-1) * image[:, :, None]
    own = unit.square().sum(-1)
    others = (unit @ unit.sum(1)[:, :, None])[:, :, 0] - own
    return -others / (image.sum(1, keepdim=True) - 1).clamp(min=1)


def leverage(states: Tensor, image: Tensor, rank: int | None = None, energy: float = 0.9) -> Tensor:
    """How much a token spans of the directions in which the image tokens of its sample differ most.

    s[b, t] = sum over i <= r of U[t, i]^2, with U S V^T the thin SVD of the (M, D) image states, and r the given rank
    or the least with sum over i <= r of S[i]^2 >= energy sum of all S^2; no more than the matrix has

    Args:
        states: (B, T, D).
        image: (B, T) bool, the tokens to score.
        rank: r; None to choose it by `energy`.
        energy: share of the squared singular values, in (0, 1].

    Returns:
        (B, T) float32 in [0, 1]; 0 for other tokens.

    Example:
        >>> leverage(torch.tensor([[[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]), torch.tensor([[True, True, False]]), rank=1)
        tensor([[1., 0., 0.]])

    Source: statistical leverage scores; as a choice of image tokens after arXiv 2604.11530, whose code is not released.
    """
    # Rows of zeros for other tokens change no other row of U.
    matrix = _finite(states) * image[:, :, None]
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()  # Apple's GPUs have no double precision
    left, squares = _left(matrix)
    total = squares.sum(1, keepdim=True)
    if rank is None:
        before = squares.cumsum(1) - squares
        used = before < energy * total * (1 - 1e-6)
    else:
        used = torch.arange(squares.shape[1], device=squares.device) < rank
    nothing = max(matrix.shape[1:]) * torch.finfo(torch.float32).eps  # of the largest S, in what came as float32
    used = used & (squares > squares[:, :1] * nothing**2)
    return left.square().where(used[:, None], 0.0).sum(-1).clamp(max=1).float().to(image.device) * image


def _left(matrix: Tensor) -> tuple[Tensor, Tensor]:
    # U and S^2 of the thin SVD, by the eigenvectors of the smaller of X X^T and X^T X: on an H100 an SVD takes twenty
    # times as long. Products square the condition, which double precision has room for.
    tall = matrix.shape[1] > matrix.shape[2]
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix if tall else matrix @ matrix.mT)
    squares, vectors = squares.flip(-1).clamp(min=0), vectors.flip(-1)
    return (matrix @ vectors / squares.sqrt()[:, None] if tall else vectors), squares


def _finite(states: Tensor) -> Tensor:
    # One NaN would make all scores of its sample NaN, and the decomposition fail; what overflowed counts as zero.
    return states.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
