"""CONTEXT keys and values: computed where the layer updates its cache, from frozen states.

Shape letters: B batch, M context rows, K computed rows, D hidden, H heads.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.decoder import LayerSpec
from tokendrop.engine.plan import Split
from tokendrop.engine.projections import using


class ContextKeys:
    """Stands where a layer expects its cache, and appends the keys and values of the context rows.

    Args:
        layer: the decoder layer.
        spec: how it is made.
        states: (B, M, D) hidden states of the context rows, frozen at the entry of their range.
        arguments: the layer's arguments for these rows.
        splits: which projections they use.
        sets: the layer's image-only projections.
    """

    def __init__(
        self,
        layer: nn.Module,
        spec: LayerSpec,
        states: Tensor,
        arguments: dict[str, Any],
        splits: dict[str, Split],
        sets: nn.ModuleDict,
    ) -> None:
        self.layer, self.spec, self.states = layer, spec, states
        self.arguments, self.splits, self.sets = arguments, splits, sets

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, K + M, D / H): those of the computing rows, then those of the context."""
        with using(self.splits, self.sets):
            k, v = self.spec.keys_values(self.layer, self.states, self.arguments)
        return torch.cat([keys, k.to(keys.dtype)], 2), torch.cat([values, v.to(values.dtype)], 2)
