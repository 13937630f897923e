"""SVDPrune: image tokens that span few of the directions in which they differ leave before the first layer."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokendrop import scores
from tokendrop.errors import MethodError
from tokendrop.methods.stages import check_count, staged
from tokendrop.roles import Method, Per, Route, Select, check_keep, check_per


@dataclass(frozen=True)
class SVDPrune(Method):
    """Image tokens with the lowest statistical leverage are GONE from layer 0 on.

    s[t] = sum over i <= r of U[t, i]^2, with U S V^T the thin SVD of the sample's (M, D) image features as they enter
    layer 0; the `keep` highest stay

    Args:
        keep: a count, or a share of the sample's image tokens.
        rank: r, less than M: with all M directions every token is as good as another; None to choose it by `energy`.
        energy: share of the sum of S^2, in (0, 1), that the first r directions hold at least.
        per: what keeps so many: the "sample", each "image" (or video) of it, or each "frame"; the leverage is that in
            the features of the sample all the same.

    Raises:
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.select.count(576) for layer in SVDPrune(keep=32).route(2)]
        [32, 32]

    Source: arXiv 2604.11530, whose code is not released; features neither centred nor scaled, and the default of
    `energy`, are ours.
    """

    keep: int | float = 32
    rank: int | None = None
    energy: float = 0.9
    per: Per = "sample"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_per(self.per)
        if self.rank is not None:
            check_count(self.rank, "rank")
        if not isinstance(self.energy, float) or not 0 < self.energy < 1:
            raise MethodError(f"energy={self.energy!r}: expected a share in (0, 1) as a float")

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept count."""
        score = _leverage(self.rank, self.energy)
        return staged((), num_layers, strength, "answer", first=Select(self.keep, score, 0, 0, strength, per=self.per))


@lru_cache
def _leverage(rank: int | None, energy: float) -> Any:
    return lambda scoring: scores.leverage(scoring.states, scoring.image, rank, energy)
