"""Rows with a label, for an output head that runs on no others.

Shape letters: B batch, T tokens, N rows with a label.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrop.engine.plan.plan import Plan
from tokendrop.engine.plan.rows import choose_rows, round_up
from tokendrop.layout import IGNORED, TokenLayout


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """The rows of a batch whose next token has a label.

    Args:
        index: (1, N) int64, of the flattened (B * T) rows; the labelled ones ascending, then others that fill.
        targets: (1, N) int64, the label of the token behind each; -100 for rows that fill.
    """

    index: Tensor
    targets: Tensor

    @classmethod
    def of(cls, layout: TokenLayout, plan: Plan, multiple: int) -> "LabelledRows | None":
        """The labelled rows of a layout, or None where there are no labels, or no fewer rows than B * T."""
        size = labelled_rows(plan, multiple)
        if layout.labels is None or size == layout.labels.numel():
            return None
        targets = torch.full_like(layout.labels, IGNORED)
        targets[:, :-1] = layout.labels[:, 1:]
        flat = targets.view(1, -1)
        rows = choose_rows(flat != IGNORED, torch.full((1,), plan.needed, device=flat.device), size)
        return cls(rows.index, flat.gather(1, rows.index))


def labelled_rows(plan: Plan, multiple: int) -> int:
    """N, the rows that the output head runs on, rounded up like those of a layer; B * T without labels."""
    rows = plan.shape[0] * plan.shape[1]
    return rows if plan.layout.labels is None else round_up(plan.needed, rows, multiple)
