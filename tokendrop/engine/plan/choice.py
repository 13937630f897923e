"""A selection that a plan leaves to the moment its span is entered.

Shape letters: B batch, P samples (packed ones count each), M context rows.
"""

from dataclasses import dataclass

from torch import Tensor

from tokendrop.engine.plan.packs import Packs
from tokendrop.engine.plan.parts import Parts
from tokendrop.roles import Select


@dataclass(frozen=True, eq=False)
class Choice:
    """A selection to make when a span is entered.

    Args:
        select: which image tokens stay ACTIVE.
        kept: (P,) int64, how many of them in each sample.
        most: the largest of these.
        counts: (B,) int64, how many rows compute then.
        context_size: M, the context rows of each sample then: those not chosen, where they are CONTEXT.
        packs: the P samples, where rows hold several.
        parts: how many stay of each image or frame, where each has a budget.
    """

    select: Select
    kept: Tensor
    most: int
    counts: Tensor
    context_size: int
    packs: Packs | None = None
    parts: Parts | None = None
