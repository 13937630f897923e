"""DART: image tokens that are like a few pivots leave, whatever is looked at."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from torch import Tensor

from tokendrop import scores
from tokendrop.errors import LayerRangeError, MethodError
from tokendrop.methods.stages import check_count, check_stage_layers
from tokendrop.roles import Attention, LayerRoute, Method, Queries, Role, Route, Scoring, Select, check_keep


@dataclass(frozen=True)
class DART(Method):
    """From `layer` on image tokens are GONE but for pivots and those least like each pivot.

    Pivots are the image tokens, and the prompt's text behind the image, whose keys in layer `layer` - 1 have the
    largest sum of absolute values. Each in turn, image pivots first, keeps an equal share of the image tokens that are
    left: those with the lowest cosine to it of the states that enter `layer`.

    Args:
        layer: the first layer without them.
        keep: share of the sample's image tokens, or a count; image pivots count.
        image_pivots: how many of them.
        text_pivots: likewise.

    Raises:
        LayerRangeError: a layer that is none.
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.image.name for layer in DART(layer=2).route(4)]
        ['ACTIVE', 'ACTIVE', 'GONE', 'GONE']

    Source: arXiv 2502.11494, as in github.com/ModelTC/LightCompress, whose defaults these are.
    """

    layer: int = 5
    keep: int | float = 0.2222
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        check_stage_layers((self.layer,), "layer")
        check_keep(self.keep)
        check_count(self.image_pivots, "image_pivots")
        check_count(self.text_pivots, "text_pivots")
        if self.layer == 0:
            raise MethodError("layer=0: DART chooses pivots by the keys of the layer before; use 1 or more")

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept count."""
        if self.layer >= num_layers:
            raise LayerRangeError(
                f"layer={self.layer}, but the decoder has {num_layers} layers; use 1 to {num_layers - 1}"
            )
        score, queries = _score(self.image_pivots, self.text_pivots), Queries("answer", self.layer - 1)
        gone = LayerRoute(Role.GONE, select=Select(self.keep, score, self.layer, 0, strength, queries))
        return (LayerRoute(),) * self.layer + (gone,) * (num_layers - self.layer)


@lru_cache
def _score(images: int, texts: int) -> Any:
    def score(scoring: Scoring) -> Tensor:
        keys, text = cast(Tensor, cast(Attention, scoring.attention).keys), cast(Tensor, scoring.text)
        found = scores.pivots(keys, scoring.image, text, images, texts)
        return scores.unlike(scoring.states, scoring.image, scoring.counts, *found)

    return score
