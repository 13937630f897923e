"""Scores from attention.

Shape letters: B batch, T tokens, R scoring rows, H heads, G heads of keys and values, D hidden.
"""

from torch import Tensor


def attention(probabilities: Tensor, valid: Tensor) -> Tensor:
    """How much the scoring rows look at a token.

    s[b, t] = mean over heads h and valid rows r of p[b, h, r, t]

    Args:
        probabilities: (B, H, R, T), of the scoring rows.
        valid: (B, R) bool, False for rows that do not count.

    Returns:
        (B, T) float32; 0 in samples without a valid row.

    Source: arXiv 2403.06764 (one row), 2410.17247 (a row for each answer).
    """
    rows = probabilities.detach().mean(1).masked_fill(~valid[:, :, None], 0)
    return rows.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


def value_norm(values: Tensor) -> Tensor:
    """Length of the value vector, over all heads.

    s[b, t] = |v[b, :, t, :]|_2

    Args:
        values: (B, G, T, D / H).

    Returns:
        (B, T) float32.

    Source: after arXiv 2406.12335, which weighs attention with it.
    """
    return values.detach().float().square().sum((1, 3)).sqrt()
