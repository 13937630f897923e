"""CDPruner: image tokens that are little worth to the prompt, or near to others, leave before the first layer."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from tokendrop import scores
from tokendrop.methods.stages import staged
from tokendrop.roles import Method, Route, Scoring, Select, check_keep


def _conditional(scoring: Scoring) -> Tensor:
    weight = scores.relevance(scoring.states, scoring.image, cast(Tensor, scoring.text))
    return scores.conditional(scoring.states, weight, scoring.image, scoring.counts, scoring.most)


@dataclass(frozen=True)
class CDPruner(Method):
    """Image tokens are GONE from layer 0 on but for a diverse choice, weighed by the prompt.

    w[t] of the mean of -cos(x[t], x[u]) over the prompt's text u, scaled to (0, 1] in the sample, and L[t, u] = w[t]
    cos(x[t], x[u]) w[u], of the features as they enter layer 0; always the token with the largest variance given those
    chosen, under L

    Args:
        keep: share of the sample's image tokens, or a count.

    Raises:
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.select.count(576) for layer in CDPruner().route(2)]
        [64, 64]

    Source: arXiv 2506.10967 and github.com/Theia-4869/CDPruner, which weighs by CLIP's embeddings of both.
    """

    keep: int | float = 64

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept count."""
        return staged((), num_layers, strength, "answer", first=Select(self.keep, _conditional, 0, 0, strength))
