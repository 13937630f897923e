"""DivPrune: image tokens that are near to others leave before the first layer."""

from dataclasses import dataclass

from torch import Tensor

from tokendrop import scores
from tokendrop.methods.stages import staged
from tokendrop.roles import Method, Route, Scoring, Select, check_keep


def _diverse(scoring: Scoring) -> Tensor:
    return scores.diverse(scoring.states, scoring.image, scoring.counts, scoring.most)


@dataclass(frozen=True)
class DivPrune(Method):
    """Image tokens are GONE from layer 0 on but for those chosen greedily to be far from one another.

    d[t, u] = 1 - cos(x[t], x[u]) of the image features as they enter layer 0; first the token whose nearest other is
    farthest, then always the one whose nearest chosen one is farthest

    Args:
        keep: share of the sample's image tokens, or a count.

    Raises:
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.select.count(576) for layer in DivPrune().route(2)]
        [56, 56]

    Source: arXiv 2503.02175 and github.com/vbdi/divprune, its ratio 0.098.
    """

    keep: int | float = 0.098

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept count."""
        return staged((), num_layers, strength, "answer", first=Select(self.keep, _diverse, 0, 0, strength))
