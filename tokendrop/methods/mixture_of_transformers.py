"""Mixture-of-Transformers: image tokens have weights of their own, and attention is over all tokens."""

from dataclasses import dataclass

from tokendrop.errors import MethodError
from tokendrop.roles import (
    LayerRoute,
    Layers,
    Method,
    Route,
    Separate,
    check_layers,
    check_separate,
    layer_indices,
    owned,
)

_ALL = "qkv+o+norm+ffn"


@dataclass(frozen=True)
class MixtureOfTransformers(Method):
    """Image tokens are ACTIVE everywhere; in the range, parts of each layer are their own.

    h = x + W^O_m attention(q_m, k, v),  out = h + FFN_m(norm_m h)    with m a token's modality; keys are of all tokens

    The FLOPs of a token are those of the dense model.

    Args:
        layers: the range of layers.
        separate: "shared" has one set of parts for all tasks, "per-task" one for each.
        parts: which: letters of "qkv", "o" (the output projection), "norm" (norms of the layer and of its queries and
            keys) and "ffn", joined by "+".

    Raises:
        LayerRangeError: `layers` is no range.
        MethodError: `separate="none"`, which would be the dense model, or unknown parts.

    Example:
        >>> sorted(MixtureOfTransformers("1:", parts="o+ffn").route(2)[1].separate)
        ['ffn', 'o']

    Source: arXiv 2411.04996 section 3; there the weights are trained from scratch, here they start as copies. The norm
    behind the last layer, embedding and head are shared.
    """

    layers: Layers = ":"
    separate: Separate = "shared"
    parts: str = _ALL

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_separate(self.separate)
        if self.separate == "none":
            raise MethodError("separate='none' is the dense model; use 'shared' or 'per-task', or None for the task")
        owned(self.parts, self.separate, default=_ALL)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """The parts of image tokens in `num_layers` layers, which a schedule does not change."""
        chosen, own = layer_indices(self.layers, num_layers), owned(self.parts, self.separate, default=_ALL)
        return tuple(LayerRoute(separate=own if i in chosen else frozenset()) for i in range(num_layers))
