"""PyramidDrop: image tokens leave in stages, each a smaller share of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokendrop.methods.stages import Stage, check_positions, check_stages, staged
from tokendrop.roles import Method, Per, Route, check_per


@dataclass(frozen=True)
class PyramidDrop(Method):
    """At the entry of each stage's layer all but the most looked at image tokens are GONE.

    s[t] = mean over heads and scoring rows of the attention to t in the layer that is entered
    kept = int(keep M) of the M image tokens a sample began with, at least 1, or `keep` of them if it is a count

    The scoring rows are the row before each answer begins, so one for each turn; the last prompt row in generation.

    Args:
        layers: the first layer of each stage, ascending.
        keep: for each stage, a share of the sample's original image tokens, or a count.
        positions: "keep"; or "renumber", after each stage the K tokens left, text and image, have positions 0 to K - 1,
            and a generated one that of its index less the tokens dropped before the layer, as in its code.
        per: what keeps so many: the "sample", each "image" (or video) of it, or each "frame"; see `Drop`.

    Raises:
        LayerRangeError: layers that do not ascend.
        MethodError: a value that makes no sense.
        UnsupportedError: "renumber" in a decoder without rotary positions, or with those of M-RoPE.

    Example:
        >>> [layer.select and layer.select.count(576) for layer in PyramidDrop((1, 2), (0.5, 0.25)).route(3)]
        [None, 288, 144]

    Source: arXiv 2410.17247 section 3 and github.com/Cooperx521/PyramidDrop, for 32 layers, with
    positions="renumber".
    """

    layers: Sequence[int] = (8, 16, 24)
    keep: Sequence[int | float] = (0.5, 0.25, 0.125)
    positions: Literal["keep", "renumber"] = "keep"
    per: Per = "sample"

    def __post_init__(self) -> None:
        check_stages(self, "layers", "keep")
        check_positions(self.positions)
        check_per(self.per)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept counts."""
        stages = [Stage(*one) for one in zip(self.layers, self.keep, strict=True)]
        renumber = self.positions == "renumber"
        return staged(stages, num_layers, strength, "answer", floor=True, renumber=renumber, per=self.per)
