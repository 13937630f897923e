"""Skip-Vision: most image tokens attend in every layer, and go without its FFN."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokendrop.methods.drop import Drop
from tokendrop.roles import Layers, Method, Route, Scoring


@dataclass(frozen=True)
class SkipVision(Method):
    """Some image tokens stay ACTIVE; the others are ATTEND in the range: queries, keys and values as ever, but no FFN.

    h = x + attention(norm x) for all; an image token that is not retained leaves the layer with that

    retained = round(keep M) of M image tokens, at least 1, or `keep` of them if it is a count

    Args:
        layers: the range of layers; all by default, as in its source.
        keep: share of the sample's image tokens, or a count; with 0 generated image tokens have no FFN either.
        score: which are retained, as in `Drop`.
        seed: of random scores.

    Raises:
        LayerRangeError: `layers` is no range.
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.image.name for layer in SkipVision("1:").route(3)]
        ['ACTIVE', 'ATTEND', 'ATTEND']

    Source: arXiv 2503.21817 section 3 and its code. What that merges before the decoder, and leaves out of its cache
    when it decodes, is not part of it.
    """

    layers: Layers = ":"
    keep: int | float = 100
    score: str | Callable[[Scoring], Tensor] = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self._drop().layers)

    def _drop(self) -> Drop:
        return Drop(self.layers, self.keep, self.score, "attend", self.seed)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; below strength 1 more are retained."""
        return self._drop().route(num_layers, strength)
