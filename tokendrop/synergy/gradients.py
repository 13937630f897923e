"""Products of task gradients, a parameter at a time.

Shape letters: S samples of all tasks' gradients, P parameters, C coordinates of one parameter, M size of a sketch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Compressed(NamedTuple):
    """One parameter's gradient, or a sketch of it.

    Args:
        values: (C,), or (M,) whose products estimate those of the gradient.
        coordinates: (C,), or (M,) of its coordinates.
    """

    values: Tensor
    coordinates: Tensor


def compress(gradient: Tensor, size: int | None = None, seed: int = 0) -> Compressed:
    """A gradient as it is, or its count sketch.

    y[m] = sum of s[c] g[c] over the c with h(c) = m; E <y_a, y_b> = <a, b>, and its variance is at most
    (|a|^2 |b|^2 + <a, b>^2) / M

    Args:
        gradient: of one parameter, any shape.
        size: M; None, or no fewer coordinates than that, keeps the gradient.
        seed: of the signs s, the places h and the coordinates; sketches multiply only under one seed.

    Example:
        >>> compress(torch.ones(2, 3)).values.shape, compress(torch.ones(2, 3), size=4).values.shape
        (torch.Size([6]), torch.Size([4]))

    Source: Charikar, Chen, Farach-Colton 2002.
    """
    flat = gradient.detach().reshape(-1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if size is None or size >= flat.numel():
        return Compressed(flat, flat)
    generator = torch.Generator().manual_seed(seed)
    count = flat.numel()
    places = torch.randint(size, (count,), generator=generator).to(flat.device)
    signs = (torch.randint(2, (count,), generator=generator) * 2 - 1).to(flat.device)
    chosen = torch.randint(count, (size,), generator=generator).to(flat.device)
    return Compressed(flat.new_zeros(size).index_add(0, places, flat * signs), flat[chosen])


def products(samples: Sequence[Sequence[Compressed]]) -> tuple[Tensor, Tensor]:
    """Inner products of every pair of samples, and how often their coordinates are opposed, for each parameter.

    gram[p, i, j] = <g_i[p], g_j[p]>, opposed[p, i, j] = share of c with g_i[p, c] g_j[p, c] < 0

    Args:
        samples: for each of S samples, the gradients of P parameters.

    Returns:
        (P, S, S) float64 on the CPU, twice.

    Example:
        >>> a, b = compress(torch.tensor([1.0, 2.0])), compress(torch.tensor([3.0, -1.0]))
        >>> gram, opposed = products([[a], [b]])
        >>> gram[0].tolist(), opposed[0].tolist()
        ([[5.0, 1.0], [1.0, 10.0]], [[0.0, 0.5], [0.5, 0.0]])

    Source: ours.
    """
    grams, shares = [], []
    for parameter in zip(*samples, strict=True):
        values = torch.stack([one.values for one in parameter])
        signs = torch.stack([one.coordinates for one in parameter]).sign()
        same = signs @ signs.T
        both = signs.abs() @ signs.abs().T
        grams.append((values @ values.T).double())
        # Of the coordinates where neither is zero, (both - same) / 2 are opposed.
        shares.append((both - same).double() / (2 * signs.shape[1]))
    return torch.stack(grams).cpu(), torch.stack(shares).cpu()
