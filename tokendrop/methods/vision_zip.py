"""VisionZip: image tokens that the vision encoder hardly looks at leave before the first layer, some merged."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from torch import Tensor

from tokendrop import scores
from tokendrop.errors import check_integer
from tokendrop.methods.duet_vlm import added_mean, check_parts
from tokendrop.methods.stages import staged
from tokendrop.roles import Encoded, Merge, Method, Route, Scoring, Select


@dataclass(frozen=True)
class VisionZip(Method):
    """Image tokens are GONE from layer 0 on but for the most looked at and, evenly spread, anchors for all others.

    The `dominant` tokens with the highest attention in the encoder stay. Of the r others, in the order of the image,
    every max(1, floor(r / contextual))-th is an anchor and stays: x'[t] = x[t] + mean of those x whose keys in the
    encoder are most like its own.

    Args:
        dominant: a count, or a share of the sample's image tokens.
        contextual: likewise, of the same kind.
        vision_layer: the layer of the encoder; one that sees the whole image.

    Raises:
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.select.count(576) for layer in VisionZip().route(2)]
        [64, 64]

    Source: arXiv 2412.04467 and github.com/dvlab-research/VisionZip, whose 54 dominant tokens are 53 and [CLS], and
    which merges before the projector.
    """

    dominant: int | float = 54
    contextual: int | float = 10
    vision_layer: int = -2

    def __post_init__(self) -> None:
        check_parts(self.dominant, self.contextual)
        check_integer("vision_layer", self.vision_layer)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept count."""
        keep = self.dominant + self.contextual
        score, merge = _parts(self.contextual / keep if keep else 0.0)
        first = Select(keep, score, 0, 0, strength, encoder=(self.vision_layer,), merge=merge)
        return staged((), num_layers, strength, "answer", first=first)


@lru_cache
def _parts(share: float) -> tuple[Any, Any]:
    def parts(scoring: Scoring) -> tuple[Tensor, Tensor]:
        encoded, contextual = cast(Encoded, scoring.encoded), (scoring.counts * share).round().long()
        return scores.spread(encoded.attention[0], scoring.image, scoring.counts, contextual, encoded.patches)

    def score(scoring: Scoring) -> Tensor:
        dominant, anchors = parts(scoring)
        return (dominant | anchors).float()

    def merge(scoring: Scoring, kept: Tensor) -> Merge:
        leave = scoring.image & ~kept & cast(Encoded, scoring.encoded).patches
        return added_mean(scoring, leave, parts(scoring)[1])

    return score, merge
