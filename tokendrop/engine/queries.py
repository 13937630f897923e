"""Which rows score image tokens by their attention.

Shape letters: B batch, T tokens, R scoring rows.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from tokendrop.layout import IGNORED, TokenLayout
from tokendrop.roles import Route


def kinds_of(routes: Iterable[Route]) -> list[str]:
    """The kinds of scoring rows, see `Queries`, that selections of these routes ask for."""
    selects = [layer.select for route in routes for layer in route if layer.select is not None]
    return sorted({select.queries.rows for select in selects if select.queries is not None})


def scoring_mask(layout: TokenLayout, kind: str) -> Tensor:
    """The rows whose attention scores image tokens; the last real one in samples that have no other.

    Args:
        layout: of (B, T) tokens.
        kind: "answer" or "prompt", see `Queries`.

    Returns:
        (B, T) bool.

    Example:
        >>> labels = torch.tensor([[-100, -100, -100, 5, 6, -100, -100, 7]])
        >>> layout = TokenLayout(torch.arange(8)[None] == 1, labels=labels)
        >>> [scoring_mask(layout, kind).nonzero()[:, 1].tolist() for kind in ("answer", "prompt")]
        [[2, 6], [2, 5, 6]]
    """
    tokens = torch.arange(layout.image.shape[1], device=layout.image.device)
    real = torch.ones_like(layout.image) if layout.padding is None else layout.padding
    last = tokens == torch.where(real, tokens, -1).amax(1, keepdim=True)
    labelled = torch.zeros_like(real) if layout.labels is None else layout.labels != IGNORED
    if kind == "answer":
        # The row before the first label of a run of labels.
        chosen = torch.zeros_like(real)
        chosen[:, :-1] = labelled[:, 1:] & ~labelled[:, :-1]
    else:
        behind = layout.image.flip(1).cumsum(1).flip(1) == 0
        chosen = behind & real & ~labelled
    return chosen | (last & ~chosen.any(1, keepdim=True))
