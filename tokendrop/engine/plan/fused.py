"""Image tokens that a selection fuses where it ends with what they were at its entry.

Shape letters: B batch, N samples of a group, T tokens, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokendrop.roles import Select


@dataclass(eq=False)
class Fused:
    """Image tokens to be fused where a selection ends.

    Args:
        select: it.
        members: positions of its N samples in the batch.
        samples: (N,) int64, the same.
        fusion: from shallow and deep states (N, T, D), image tokens and those kept, (N, T) bool, to (N, T, D).
        shallow: (N, T, D), the hidden states at its entry.
        image: (N, T) bool, the image tokens.
        kept: (N, T) bool, those that stayed ACTIVE.
        on: the samples that it concerns still.
    """

    select: Select
    members: tuple[int, ...]
    samples: Tensor
    fusion: nn.Module
    shallow: Tensor
    image: Tensor
    kept: Tensor
    on: set[int]

    def restored(self, states: Tensor, on: set[int]) -> Tensor:
        """`states` (B, T, D), fused in samples that are not `on`."""
        ends, self.on = [at for at, one in enumerate(self.members) if one in self.on and one not in on], self.on & on
        if not ends:
            return states
        if len(ends) == len(states):
            return self.fusion(self.shallow, states, self.image, self.kept)
        at = torch.tensor(ends, device=states.device)
        samples = self.samples[at]
        fused = self.fusion(self.shallow[at], states[samples], self.image[at], self.kept[at])
        return states.index_copy(0, samples, fused)
