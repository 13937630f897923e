"""Random-LTD: in training, random image tokens skip each layer on their own, and rejoin behind it."""

from dataclasses import dataclass
from typing import ClassVar

from tokendrop.errors import check_integer
from tokendrop.methods.drop import SCORES
from tokendrop.roles import LayerRoute, Layers, Method, Role, Route, Select, check_keep, check_layers, layer_indices


@dataclass(frozen=True)
class RandomLTD(Method):
    """In each layer of the range other random image tokens of each sample stay ACTIVE; the rest are BYPASS.

    kept = round(keep M) of M image tokens, at least 1, or `keep` of them if it is a count
    kept(t) = M - int((1 - t / steps) (M - kept)) under `Schedule(steps=steps, direction="out")`

    In training only, as in its source: while the decoder is in eval mode, every image token is ACTIVE.

    Args:
        layers: the range; its source leaves the first and the last layer whole, and so does the default.
        keep: share of the sample's image tokens, or a count; in the source the count that training begins with, which
            `Schedule(steps=..., direction="out")` raises to all.
        seed: of the choice.

    Raises:
        LayerRangeError: `layers` is no range.
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.image.name for layer in RandomLTD().route(4)]
        ['ACTIVE', 'BYPASS', 'BYPASS', 'ACTIVE']

    Source: arXiv 2211.11586 section 3; its tokens are of any kind, ours are image tokens, and keep their positions.
    """

    layers: Layers = "1:-1"
    keep: int | float = 0.5
    seed: int = 0

    training_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_keep(self.keep)
        check_integer("seed", self.seed)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; below strength 1 more are kept."""
        chosen = layer_indices(self.layers, num_layers)
        return tuple(
            LayerRoute(Role.BYPASS, select=Select(self.keep, SCORES["random"], index, self.seed, strength))
            if index in chosen
            else LayerRoute()
            for index in range(num_layers)
        )
