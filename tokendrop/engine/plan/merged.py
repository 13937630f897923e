"""Tokens that a selection merged, and that come back where it ends.

Shape letters: B batch, N samples of a group, T tokens, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendrop.roles import Select


@dataclass(eq=False)
class Merged:
    """Tokens merged where a selection was made, to be restored where it ends.

    Args:
        select: it.
        members: positions of its N samples in the batch.
        samples: (N,) int64, the same.
        into: (N, T) int64, the token that each was added to; itself where it stayed.
        before: (N, T, D), the hidden states before they were merged.
        after: (N, T, D), then.
        on: the samples that are merged still.
    """

    select: Select
    members: tuple[int, ...]
    samples: Tensor
    into: Tensor
    before: Tensor
    after: Tensor
    on: set[int]

    def restored(self, states: Tensor, on: set[int]) -> Tensor:
        """`states` (B, T, D), where in samples that are not `on` each token has what the one it went to has been given.

        x[t] + y[into[t]] - m[into[t]], of x before the merge, m behind it, and y at the end
        """
        ends, self.on = [sample in self.on and sample not in on for sample in self.members], self.on & on
        if not any(ends):
            return states
        now, own = states[self.samples], torch.arange(states.shape[1], device=states.device)
        leaves = self.into != own
        touched = leaves | (torch.zeros_like(self.into).scatter_add(1, self.into, leaves.long()) > 0)
        touched = touched & torch.tensor(ends, device=states.device)[:, None]
        # Not by `gather_tokens`, whose backward is written for rows that come once: several go to one token.
        update = (now - self.after)[torch.arange(len(now), device=now.device)[:, None], self.into]
        return states.index_copy(0, self.samples, (self.before + update).where(touched[:, :, None], now))
