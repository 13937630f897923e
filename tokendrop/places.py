"""Where image tokens lie in their images.

Shape letters: V image tokens.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def places(sizes: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    """Where the V tokens of some images lie, image by image and row by row.

    Args:
        sizes: frames, rows and columns of each, in tokens.
        device: of the result.

    Returns:
        (V, 3) int64: the number of its image or frame, row and column.

    Example:
        >>> places([(1, 1, 2), (1, 2, 1)], torch.device("cpu")).tolist()
        [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0]]
    """
    found = [torch.zeros(0, 3, dtype=torch.int64)]
    for frames, rows, columns in sizes:
        found += [
            torch.cartesian_prod(torch.tensor([len(found) - 1 + frame]), torch.arange(rows), torch.arange(columns))
            for frame in range(frames)
        ]
    return torch.cat(found).to(device)


def window_by_window(place: Tensor, side: int) -> Tensor:
    """The order of tokens at `place` (..., V, 3) int64 by windows of `side` rows and columns; (..., V) int64.

    Example:
        >>> window_by_window(places([(1, 2, 4)], torch.device("cpu")), 2).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    cells = place // place.new_tensor([1, side, side])
    return ((cells[..., 0] << 40) + (cells[..., 1] << 20) + cells[..., 2]).argsort(dim=-1, stable=True)
