"""SPRINT: in training random image tokens skip a range; where they rejoin, deep and shallow states are fused."""

from dataclasses import dataclass
from typing import ClassVar

from tokendrop.errors import check_integer
from tokendrop.methods.drop import SCORES
from tokendrop.roles import LayerRoute, Layers, Method, Role, Route, Select, check_keep, check_layers, layer_indices


@dataclass(frozen=True)
class Sprint(Method):
    """Random image tokens of each sample stay ACTIVE in the range, the rest are BYPASS; behind it all are fused.

    out = r + W [y; x] + b    for an image token that enters the range as x

    r = y, what the range makes of it, where it was kept; else r = x, and y is a learned mask token. W (D, 2 D) and b
    are 0 at first, so that the model begins as under `Drop(layers, keep)`. Text tokens are not fused.

    Tokens are dropped in training only, as in the source: while the decoder is in eval mode, every image token is
    ACTIVE, and fused. So it is at strength 0, as at the end of `Schedule(dense_tail=...)`.

    Args:
        layers: the range; its source has two layers before it and two behind it, and so has the default.
        keep: share of the sample's image tokens, or a count.
        seed: of the choice.

    Raises:
        LayerRangeError: `layers` is no range.
        MethodError: a value that makes no sense.
        UnsupportedError: image tokens are generated.

    Example:
        >>> [layer.image.name for layer in Sprint("1:-1").route(4)]
        ['ACTIVE', 'BYPASS', 'BYPASS', 'ACTIVE']

    Source: arXiv 2510.21986 and github.com/snap-research/Sprint; there out = W [y; x] + b, trained from scratch, and
    the mask token stays as it was drawn.
    """

    layers: Layers = "2:-2"
    keep: int | float = 0.25
    seed: int = 0

    training_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_keep(self.keep)
        check_integer("seed", self.seed)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; below strength 1 more are kept, at 0 all, and fused."""
        chosen = layer_indices(self.layers, num_layers)
        routes, entry = [], 0
        for index in range(num_layers):
            if index not in chosen:
                routes.append(LayerRoute())
                continue
            entry = entry if index and index - 1 in chosen else index
            select = Select(self.keep, SCORES["random"], entry, self.seed, strength, fuse=True)
            routes.append(LayerRoute(Role.BYPASS, select=select))
        return tuple(routes)
