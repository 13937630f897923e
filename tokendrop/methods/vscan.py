"""VScan: image tokens chosen by two scans of the vision encoder, the others merged into them; then by attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

from torch import Tensor

from tokendrop import scores
from tokendrop.errors import MethodError, check_flag, check_integer
from tokendrop.methods.stages import Stage, check_count, check_positions, check_stages, staged
from tokendrop.roles import Encoded, Merge, Method, Route, Scoring, Select, check_keep


@dataclass(frozen=True)
class VScan(Method):
    """Image tokens that the vision encoder hardly looks at are GONE from layer 0 on, merged into those that stay.

    kept = floor(n / 2) tokens that get most attention in their window in a shallow layer of the encoder, and the n -
    floor(n / 2) others that get most in the whole image in a deep one; x'[t] = mean of x[t] and of all x that are most
    like it among the kept. Then, at each layer of `text_layers`, the ones that the last prompt row looks at most.

    Args:
        keep: n, a count, or a share of the sample's image tokens.
        text_layers: first layer of each stage in the decoder, ascending; () for none.
        text_keep: for each, a count, or a share of n.
        local_layer: the shallow layer; in an encoder with window attention, one that sees the whole image.
        global_layer: the deep layer, likewise.
        window: rows and columns of a window, in image tokens.
        merge: whether the others are merged.
        scan: how the local ones are found: "rounds", from each window its best, then its second best, and so on, as its
            code for LLaVA; "capped", the best anywhere, but no window with more than its share, and every share, also
            those of `text_keep`, is rounded down, as its code for Qwen2.5-VL.
        positions: "keep"; or "renumber", after each stage the K tokens left, text and image, have positions 0 to K - 1,
            and a generated one that of its index less the tokens dropped before the layer, as in its code for LLaVA.

    Raises:
        LayerRangeError: layers that do not ascend.
        MethodError: a value that makes no sense.
        UnsupportedError: "renumber" in a decoder without rotary positions, or with those of M-RoPE.

    Example:
        >>> [layer.select.count(576) for layer in VScan(text_layers=(1,)).route(3)]
        [96, 32, 32]

    Source: VScan, github.com/Tencent/SelfEvolvingAgent, for 32 layers and 24 x 24 tokens of CLIP; for Qwen2.5-VL its
    code has VScan(0.167, (14,), (0.333,), local_layer=7, global_layer=-1, window=4, scan="capped").
    """

    keep: int | float = 96
    text_layers: Sequence[int] = (16,)
    text_keep: Sequence[int | float] = (32,)
    local_layer: int = 5
    global_layer: int = -2
    window: int = 6
    merge: bool = True
    scan: Literal["rounds", "capped"] = "rounds"
    positions: Literal["keep", "renumber"] = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_stages(self, "text_layers", "text_keep", first=1)
        check_count(self.window, "window")
        check_integer("local_layer", self.local_layer)
        check_integer("global_layer", self.global_layer)
        check_flag("merge", self.merge)
        check_positions(self.positions)
        if not isinstance(self.scan, str) or self.scan not in _SCANS:
            raise MethodError(f"scan={self.scan!r} is unknown; use 'rounds' or 'capped'")

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept counts."""
        layers, merge = (self.local_layer, self.global_layer), average if self.merge else None
        score, floor = _scans(self.window, self.scan), self.scan == "capped"
        first = Select(self.keep, score, 0, 0, strength, floor=floor, encoder=layers, merge=merge)
        stages = [Stage(*one) for one in zip(self.text_layers, self.text_keep, strict=True)]
        renumber = self.positions == "renumber"
        return staged(stages, num_layers, strength, "answer", floor=floor, first=first, renumber=renumber)


_SCANS = {"rounds": scores.scan, "capped": scores.capped_scan}


@lru_cache
def _scans(window: int, kind: str) -> Any:
    def score(scoring: Scoring) -> Tensor:
        (local, whole), _, place = cast(Encoded, scoring.encoded)
        return _SCANS[kind](local, whole, scoring.image, place, scoring.counts, window)

    return score


def average(scoring: Scoring, kept: Tensor) -> Merge:
    """Each token that leaves goes to the kept one whose state is most like its own, which becomes the mean of all."""
    patches = cast(Encoded, scoring.encoded).place[..., 0] >= 0  # a newline goes to no token
    into, sizes = scores.nearest(scoring.states, scoring.image & ~kept & patches, kept & patches)
    return Merge(into, 1 / sizes)
