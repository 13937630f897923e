"""Mixture-of-Depths: a router of each layer chooses the image tokens that run through it."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from tokendrop.roles import (
    LayerRoute,
    Layers,
    Method,
    Role,
    Route,
    Scoring,
    Select,
    check_keep,
    check_layers,
    layer_indices,
)


def routed(scoring: Scoring) -> Tensor:
    """What the layer's router gives each token."""
    return cast(Tensor, scoring.router)  # such a selection is learned


@dataclass(frozen=True)
class MixtureOfDepths(Method):
    """In each layer of the range the image tokens that its router ranks highest stay ACTIVE; the rest are BYPASS.

    out = x + r (layer(x) - x) with r = w x for a kept image token, x for the rest; text tokens run as ever

    `drop.auxiliary_loss()` is what the routers learn from beside that. `generate()` is refused: which tokens are the
    highest is known only when all are there.

    Args:
        layers: the range; every second layer by default, as in its source.
        keep: share of the sample's image tokens, or a count; the source's capacity by default.

    Raises:
        LayerRangeError: `layers` is no range.
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.image.name for layer in MixtureOfDepths().route(4)]
        ['ACTIVE', 'BYPASS', 'ACTIVE', 'BYPASS']

    Source: arXiv 2404.02258 section 3; its tokens are of any kind, ours are image tokens, chosen in each sample.
    """

    layers: Layers = "1::2"
    keep: int | float = 0.125

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_keep(self.keep)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept count, and is dense at 0."""
        chosen = layer_indices(self.layers, num_layers) if strength else ()
        return tuple(
            LayerRoute(Role.BYPASS, select=Select(self.keep, routed, index, 0, strength, learned=True))
            if index in chosen
            else LayerRoute()
            for index in range(num_layers)
        )
