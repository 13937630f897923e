"""Roles of image tokens per decoder layer: which layers, which role, since when.

Shape letters: B batch, T tokens, R scoring rows, H heads, G heads of keys and values, D hidden, L layers, E layers of
the vision encoder.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from tokendrop.errors import LayerRangeError, MethodError

Layers = str | Sequence[int]
Separate = Literal["none", "shared", "per-task"]
Per = Literal["sample", "image", "frame"]


class Role(IntEnum):
    """What a token does in one decoder layer."""

    ACTIVE = 0  # computes, and is seen as key and value
    CONTEXT = 1  # is seen as key and value, from a state frozen at the entry of the range
    BYPASS = 2  # is carried past the layer, neither computing nor seen
    GONE = 3  # has left for good


class Attention(NamedTuple):
    """What the scoring rows of a layer look at.

    Args:
        probabilities: (B, H, R, T) float32, of each scoring row over the tokens still there.
        valid: (B, R) bool, False for rows that only fill up.
        values: (B, G, T, D / H), the value vectors of the layer.
    """

    probabilities: Tensor
    valid: Tensor
    values: Tensor


class Encoded(NamedTuple):
    """What the vision encoder says of image tokens, in the layers that a selection looks at; 0 for other tokens.

    Args:
        attention: (E, B, T) float32, mean over heads of the attention that a token gets from [CLS], or, where there is
            none, from the mean row of its image.
        keys: (E, B, T, D / H) float32, mean over heads of its key vectors.
        place: (B, T, 3) int64, its image (or frame) in the batch, row and column; -1 for an image token of no patch.
    """

    attention: Tensor
    keys: Tensor
    place: Tensor

    def of(self, samples: Tensor) -> "Encoded":
        """The same of some samples, (N,) int64."""
        return Encoded(self.attention[:, samples], self.keys[:, samples], self.place[samples])


class Merge(NamedTuple):
    """Image tokens that leave, added to those that stay.

    x'[b, t] = sum over u with into[b, u] = t of weight[b, u] x[b, u] where into[b, t] = t, else x[b, t]

    Args:
        into: (B, T) int64, the token that each is added to; itself where it stays.
        weight: (B, T) float.
    """

    into: Tensor
    weight: Tensor


class Scoring(NamedTuple):
    """What a score may look at, at the entry of a span.

    Args:
        states: (B, T, D) hidden states.
        image: (B, T) bool, the image tokens still there.
        samples: (B,) int64, the index of each sample in the global batch.
        layer: the layer being entered.
        seed: of the method.
        step: (2,) int64, of training: the optimiser step and the micro-batch.
        counts: (B,) int64, how many image tokens stay.
        attention: of the selection's `queries`; None where it has none.
        encoded: of the selection's `encoder` layers; None where it has none.
        router: (B, T) float32, what the layer's router gives each token; None where the selection is not learned.
    """

    states: Tensor
    image: Tensor
    samples: Tensor
    layer: int
    seed: int
    step: Tensor
    counts: Tensor
    attention: Attention | None = None
    encoded: Encoded | None = None
    router: Tensor | None = None


@dataclass(frozen=True)
class Queries:
    """The rows whose attention a score looks at.

    Args:
        rows: "answer" for the row before each answer begins, which is the last of the prompt where there are no
            labels; "prompt" for all text without labels behind the last image.
        layer: whose attention: the layer being entered, or the one before it.
    """

    rows: Literal["answer", "prompt"]
    layer: int


@dataclass(frozen=True)
class Select:
    """Which image tokens stay ACTIVE in a span: those with the highest scores at its entry.

    Args:
        keep: a share of the sample's image tokens, or a count.
        score: `Scoring` -> (B, T) float, higher is kept.
        layer: the layer at whose entry the selection is made.
        seed: for scores that draw.
        strength: 1 for the whole method; below, more are kept.
        queries: the rows whose attention `score` looks at; None where it looks at none.
        floor: whether a share is rounded down.
        of: an earlier selection; shares are of what it kept.
        encoder: layers of the vision encoder that `score` and `merge` look at.
        merge: from `Scoring` and the kept (B, T), how those that leave are merged into them.
        learned: whether the layer has a router, whose output also scales what the layer adds to the tokens it keeps.
        per: what keeps so many: a sample, each of its images, or each of their frames.

    Raises:
        MethodError: queries of a layer that is neither entered nor the one before.
    """

    keep: int | float
    score: Callable[[Scoring], Tensor]
    layer: int
    seed: int = 0
    strength: float = 1.0
    queries: Queries | None = None
    floor: bool = False
    of: "Select | None" = None
    encoder: tuple[int, ...] = ()
    merge: Callable[[Scoring, Tensor], Merge] | None = None
    learned: bool = False
    per: Per = "sample"

    def __post_init__(self) -> None:
        if self.queries is not None and self.queries.layer not in (self.layer, max(0, self.layer - 1)):
            raise MethodError(
                f"a selection at layer {self.layer} looks at the attention of layer {self.queries.layer}; it can look "
                "at that layer, or at the one before"
            )

    def count(self, images: int) -> int:
        """How many of a sample's image tokens are kept: the share rounded and at least 1, or the count.

        Example:
            >>> Select(0.5, lambda scoring: scoring.states, layer=2).count(5)
            2
        """
        images = images if self.of is None else self.of.count(images)
        rounded = int(self.keep * images + 1e-9) if self.floor else round(self.keep * images)
        least = min(images, max(1, rounded) if isinstance(self.keep, float) else self.keep)
        return images - int(self.strength * (images - least) + 1e-9)


@dataclass(frozen=True)
class LayerRoute:
    """What image tokens do in one layer.

    Args:
        image: their role; with `select`, that of the tokens it does not keep.
        separate: the projections ("q", "k", "v") that are their own.
        select: which of them stay ACTIVE; None for none.
        renumber: whether the rows that compute take the first positions of their sample.
    """

    image: Role = Role.ACTIVE
    separate: frozenset[str] = frozenset()
    select: Select | None = None
    renumber: bool = False


Route = tuple[LayerRoute, ...]


def selections(routes: Iterable[Route]) -> list[Select]:
    """Every selection of some routes."""
    return [layer.select for route in routes for layer in route if layer.select is not None]


@runtime_checkable
class Method(Protocol):
    """A rule that gives image tokens a role in each of L layers; any class with these two is one.

    Where it also has `training_only = True`, image tokens are ACTIVE while the decoder's layers are in eval mode. As a
    dataclass with fields of plain data it is written into checkpoints and read back; see `td.to_config`.
    """

    @property
    def separate(self) -> Separate:
        """Whether image tokens get projections of their own, and whose."""
        return "none"

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """The L routes, with the schedule at `strength` (0 dense, 1 the whole method)."""
        ...


def check_layers(layers: Layers | slice) -> Layers:
    """Normalise a layer range to text or a tuple of indices.

    Args:
        layers: half-open slice as text ("2:24:2") or `slice`, or a sequence of layer indices.

    Raises:
        LayerRangeError: neither of these.

    Example:
        >>> check_layers(slice(2, 24, 2)), check_layers([0, 3])
        ('2:24:2', (0, 3))
    """
    if isinstance(layers, slice):
        step = 1 if layers.step is None else layers.step
        layers = ":".join("" if part is None else str(part) for part in (layers.start, layers.stop, step))
    if isinstance(layers, str):
        if not re.fullmatch(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?", layers):
            raise LayerRangeError(f"the layer range {layers!r} is no slice; write it as 'start:stop' or 'start:stop:2'")
        return layers
    if isinstance(layers, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        return tuple(layers)
    raise LayerRangeError(
        f"a layer range is a slice as text such as '2:24:2', a slice, or a list of layer indices; found {layers!r}"
    )


def layer_indices(layers: Layers, num_layers: int) -> tuple[int, ...]:
    """The layers a range names, ascending.

    Args:
        layers: half-open slice as text, or layer indices; negative bounds count from the end.
        num_layers: L.

    Raises:
        LayerRangeError: a bound or an index outside the model, an index twice, or a range without a layer.

    Example:
        >>> layer_indices("2:-1:2", 8)
        (2, 4, 6)
    """

    def inside(value: int, last: int) -> int:
        if not -num_layers <= value <= last:
            raise LayerRangeError(
                f"the layer range {layers!r} reaches layer {value}, but the decoder has {num_layers} layers; "
                f"use bounds from {-num_layers} to {last}"
            )
        return value + num_layers if value < 0 else value

    if isinstance(layers, str):
        start, stop, step = ([int(part) if part else None for part in layers.split(":")] + [None])[:3]
        first = inside(start, num_layers) if start is not None else 0
        end = inside(stop, num_layers) if stop is not None else num_layers
        chosen = list(range(first, end, step or 1))
    else:
        chosen = sorted(inside(index, num_layers - 1) for index in layers)
    if not chosen:
        raise LayerRangeError(f"the layer range {layers!r} names none of the decoder's {num_layers} layers; name one")
    if len(set(chosen)) < len(chosen):
        raise LayerRangeError(f"the layer range {layers!r} names a layer twice; name each layer once")
    return tuple(chosen)


def check_separate(separate: str) -> None:
    """Refuse an unknown sharing mode.

    Raises:
        MethodError: not "none", "shared" or "per-task".
    """
    if separate not in ("none", "shared", "per-task"):
        raise MethodError(f"separate={separate!r} is unknown; use 'none', 'shared' or 'per-task'")


def deepest(layers: tuple[int, ...], strength: float) -> frozenset[int]:
    """The share `strength` of ascending `layers` that a schedule has switched on, from the deep end.

    Example:
        >>> sorted(deepest((2, 4, 6, 8), 0.5))
        [6, 8]
    """
    return frozenset(layers[len(layers) - int(strength * len(layers) + 1e-9) :])
