"""Drop: the general method, some image tokens out of a range of layers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

from torch import Tensor

from tokendrop import scores
from tokendrop.errors import MethodError, check_integer
from tokendrop.roles import (
    Attention,
    LayerRoute,
    Layers,
    Merge,
    Method,
    Per,
    Queries,
    Role,
    Route,
    Scoring,
    Select,
    check_keep,
    check_layers,
    check_per,
    layer_indices,
)
from tokendrop.scoring import seen_by, sees

SCORES: dict[str, Callable[[Scoring], Tensor]] = {
    "random": lambda s: scores.random(s.image, s.samples, s.layer, s.seed, s.step),
    "uniform": lambda s: scores.uniform(s.image),
    "norm": lambda s: scores.norm(s.states),
    "similarity": lambda s: scores.similarity(s.states, s.image),
    "leverage": lambda s: scores.leverage(s.states, s.image),
    "attention": sees("answer")(lambda s: scores.attention(*_attention(s)[:2])),
    "value_norm": sees("answer")(lambda s: scores.value_norm(_attention(s).values)),
    "temporal": sees(frames=True)(lambda s: scores.temporal(s.states, cast(Tensor, s.images), cast(Tensor, s.frames))),
}
ROLES = {"rejoin": Role.BYPASS, "gone": Role.GONE, "context": Role.CONTEXT, "attend": Role.ATTEND, "merge": Role.BYPASS}


def _attention(scoring: Scoring) -> Attention:
    return cast(Attention, scoring.attention)  # such a selection has queries


def _average(scoring: Scoring, kept: Tensor) -> Merge:
    into, sizes = scores.nearest(scoring.states, scoring.image & ~kept, kept)
    return Merge(into, 1 / sizes)


@dataclass(frozen=True)
class Drop(Method):
    """Image tokens with the lowest scores leave where a range of layers begins.

    kept = round(keep M) of M image tokens, at least 1, or `keep` of them if it is a count

    Args:
        layers: the range; with then="gone" only its first layer counts.
        keep: share of the sample's image tokens, or a count.
        score: "random", "uniform", "norm", "similarity", "leverage", "attention", "value_norm" or "temporal"; or a
            function from `Scoring` to (B, T) float, higher is kept, which sees attention, keys, the encoder and frames
            where `td.sees` asks so.
        then: "rejoin" carries the others past the range (BYPASS), "gone" ends them (GONE), "context" leaves them as
            keys and values of the state they had at its entry (CONTEXT) until its end, "attend" lets them go on without
            an FFN (ATTEND) until its end; with keep=0 image tokens that are generated, too; "merge" makes each kept
            token the mean of itself and those most like it by cosine, and at the end gives all of these its update.
        seed: of random scores.
        per: what keeps `keep`: the "sample", each "image" (or video) of it, or each "frame" (an image is one). Images
            and frames are those of the layout.

    Raises:
        LayerRangeError: `layers` is no range.
        LayoutError: frames are asked for, and the layout does not say which they are.
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.image.name for layer in Drop("1:3", keep=0.5).route(4)]
        ['ACTIVE', 'BYPASS', 'BYPASS', 'ACTIVE']

    Source: ours; random-LTD (arXiv 2211.11586) and FastV (arXiv 2403.06764) are special cases.
    """

    layers: Layers
    keep: int | float
    score: str | Callable[[Scoring], Tensor] = "random"
    then: Literal["rejoin", "gone", "context", "attend", "merge"] = "rejoin"
    seed: int = 0
    per: Per = "sample"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_keep(self.keep)
        check_per(self.per)
        check_integer("seed", self.seed)
        if not callable(self.score) and (not isinstance(self.score, str) or self.score not in SCORES):
            raise MethodError(
                f"score={self.score!r} is unknown; use one of {', '.join(map(repr, SCORES))}, or a function"
            )
        if self.then not in tuple(ROLES):
            raise MethodError(f"then={self.then!r} is unknown; use one of {', '.join(map(repr, ROLES))}")

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept count."""
        chosen = layer_indices(self.layers, num_layers)
        gone, none = self.then == "gone", self.then == "attend" and self.keep == 0 and strength == 1
        inside = range(chosen[0], num_layers) if gone else chosen
        routes = []
        entry, score = chosen[0], SCORES[self.score] if isinstance(self.score, str) else self.score
        asked = seen_by(score)
        for index in range(num_layers):
            if index in inside:
                entry = entry if index - 1 in inside else index
                rows, layer = asked.attention, max(0, entry - asked.before)
                queries = None if rows is None else Queries(rows, layer)
                merge = _average if self.then == "merge" else None
                kept = partial(Select, encoder=asked.encoder, merge=merge, restore=merge is not None)
                kept = partial(kept, per=self.per, frames=asked.frames)
                select = kept(self.keep, score, entry, self.seed, strength, queries)
                # With none to choose, a token that is generated is like those of the prompt.
                select = None if none else select
                routes.append(LayerRoute(ROLES[self.then], select=select))
            else:
                routes.append(LayerRoute())
        return tuple(routes)
