"""What a score of image tokens may look at, and how it asks for it.

Shape letters: B batch, T tokens, R scoring rows, H heads, G heads of keys and values, D hidden, E layers of the vision
encoder.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

from torch import Tensor

from tokendrop.errors import MethodError, check_flag

Score = TypeVar("Score", bound=Callable[..., Any])


class Attention(NamedTuple):
    """What the scoring rows of a layer look at.

    Args:
        probabilities: (B, H, R, T) float32, of each scoring row over the tokens still there.
        valid: (B, R) bool, False for rows that only fill up.
        values: (B, G, T, D / H), the value vectors of the layer.
        keys: (B, G, T, D / H), its keys, rotated, as it would store them.
    """

    probabilities: Tensor
    valid: Tensor
    values: Tensor
    keys: Tensor | None = None


class Encoded(NamedTuple):
    """What the vision encoder says of image tokens, in the layers that a selection looks at; 0 for other tokens.

    Args:
        attention: (E, B, T) float32, mean over heads of the attention that a token gets from [CLS], or, where there is
            none, from the mean row of its image.
        keys: (E, B, T, D / H) float32, mean over heads of its key vectors.
        place: (B, T, 3) int64, its image (or frame) in the batch, row and column; -1 for an image token that comes of
            no patch, such as the newline behind a row, whose attention and keys are 0.
    """

    attention: Tensor
    keys: Tensor
    place: Tensor

    @property
    def patches(self) -> Tensor:
        """(B, T) bool, False for image tokens that come of no patch."""
        return self.place[..., 0] >= 0

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
        text: (B, T) bool, the text of the prompt: tokens that are no image, no padding, have no label and are not
            generated.
        images: (B, T) int64, the image or video that each image token belongs to, also one that has left; -1 for other
            tokens. None where the score does not ask for frames.
        frames: (B, T) int64, its frame, likewise.
        most: the largest of `counts`, as a number.
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
    text: Tensor | None = None
    images: Tensor | None = None
    frames: Tensor | None = None
    most: int | None = None


class Sees(NamedTuple):
    """What a score asks to see, see `sees`."""

    attention: Literal["answer", "prompt"] | None = None
    before: bool = False
    encoder: tuple[int, ...] = ()
    frames: bool = False


def sees(
    attention: Literal["answer", "prompt"] | None = None,
    before: bool = False,
    encoder: Sequence[int] = (),
    frames: bool = False,
) -> Callable[[Score], Score]:
    """Let a score function of one's own see what costs something to look at; without it, a score sees the rest.

    Args:
        attention: fills `scoring.attention`, with the keys and values: of the row before each answer begins, which is
            the last of the prompt where there are no labels ("answer"), or of all text without labels behind the last
            image ("prompt").
        before: whether that is of the layer before the one that is entered.
        encoder: layers of the vision encoder; fills `scoring.encoded`.
        frames: fills `scoring.images` and `scoring.frames`; a layout that does not say them is refused.

    Raises:
        MethodError: a value that makes no sense.

    Example:
        >>> import tokendrop as td
        >>> @td.sees(attention="answer")
        ... def longest_keys(scoring):
        ...     return scoring.attention.keys.float().norm(dim=-1).mean(1)
        >>> td.Drop("2:", keep=0.5, score=longest_keys).route(4)[2].select.queries
        Queries(rows='answer', layer=2)

    Source: ours.
    """
    if attention is not None and (not isinstance(attention, str) or attention not in ("answer", "prompt")):
        raise MethodError(f"attention={attention!r} is unknown; use 'answer', 'prompt' or None")
    check_flag("before", before)
    check_flag("frames", frames)
    layers = tuple(encoder) if isinstance(encoder, Sequence) else ()
    if not isinstance(encoder, Sequence) or any(type(one) is not int for one in layers):
        raise MethodError(f"encoder={encoder!r}: expected indices of layers of the vision encoder")
    asked = Sees(attention, before, layers, frames)

    def mark(score: Score) -> Score:
        if not callable(score):
            raise MethodError(f"sees: expected to stand above a score function; found {score!r}")
        try:
            cast(Any, score).sees = asked
        except AttributeError as error:
            raise MethodError(f"sees: {score!r} takes no attribute; write a function around it") from error
        return score

    return mark


def seen_by(score: object) -> Sees:
    """What a score asks to see; nothing where it asks for nothing.

    Raises:
        MethodError: an attribute `sees` of another kind.
    """
    asked = getattr(score, "sees", Sees())
    if not isinstance(asked, Sees):
        raise MethodError(f"score={score!r} has sees={asked!r}; write @td.sees(...) above it")
    return asked
