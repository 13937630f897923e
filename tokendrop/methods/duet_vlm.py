"""DUET-VLM: image tokens leave by the vision encoder's attention, then in stages scored by the prompt's text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tokendrop import scores
from tokendrop.errors import MethodError, check_integer
from tokendrop.methods.stages import Stage, check_count, check_positions, check_stages, staged
from tokendrop.roles import Encoded, Merge, Method, Route, Scoring, Select, check_keep


@dataclass(frozen=True)
class DuetVLM(Method):
    """Image tokens that the vision encoder, then the prompt's text hardly look at are GONE.

    Vision stage, from layer 0 on: the tokens with the highest attention in the encoder (`dominant`) stay, and of the
    next `cluster_width` times `contextual` every `cluster_width`-th (an anchor), which becomes x'[t] = x[t] + mean of
    those x of them whose keys in the encoder are most like its own. The others leave.
    Text stages: s[t] = mean over heads and scoring rows of the attention to t in the layer that is entered, and
    kept = int(keep M) of the M image tokens that the vision stage left, at least 1, or `keep` of them if it is a count.

    The scoring rows are all text without labels behind the last image.

    Args:
        text_layers: the first layer of each text-guided stage, ascending.
        text_keep: for each, a share of M, or a count; 0 for none.
        dominant: a count, or a share of the sample's image tokens; 0 for no vision stage.
        contextual: likewise; ignored without a vision stage.
        cluster_width: pool tokens for each contextual one.
        vision_layer: the layer of the encoder; one that sees the whole image.
        positions: "keep"; or "renumber", after each stage the K tokens left, text and image, have positions 0 to K - 1,
            and a generated one that of its index less the tokens dropped before the layer, as in its code.

    Raises:
        LayerRangeError: layers that do not ascend.
        MethodError: a value that makes no sense.
        UnsupportedError: "renumber" in a decoder without rotary positions, or with those of M-RoPE.

    Example:
        >>> [layer.select.count(576) for layer in DuetVLM((1,), (0.5,), dominant=300).route(3)]
        [307, 153, 153]

    Source: DUET-VLM, github.com/AMD-AGI/DUET-VLM, for 32 layers: DuetVLM(dominant=300). It has
    positions="renumber"; its choice of salient words is left out.
    """

    text_layers: Sequence[int] = (16, 24)
    text_keep: Sequence[int | float] = (0.5, 0)
    dominant: int | float = 0
    contextual: int | float = 7
    cluster_width: int = 4
    vision_layer: int = -2
    positions: Literal["keep", "renumber"] = "keep"

    def __post_init__(self) -> None:
        check_stages(self, "text_layers", "text_keep", first=1 if self.dominant else 0)
        check_count(self.cluster_width, "cluster_width")
        check_integer("vision_layer", self.vision_layer)
        check_positions(self.positions)
        check_keep(self.contextual)
        if self.dominant != 0 or not isinstance(self.dominant, int) or isinstance(self.dominant, bool):
            check_parts(self.dominant, self.contextual)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept counts."""
        first, keep = None, self.dominant + self.contextual
        if self.dominant:
            score, merge = _vision(self.contextual / keep, self.cluster_width)
            first = Select(keep, score, 0, 0, strength, encoder=(self.vision_layer,), merge=merge)
        stages = [Stage(*one) for one in zip(self.text_layers, self.text_keep, strict=True)]
        renumber = self.positions == "renumber"
        return staged(stages, num_layers, strength, "prompt", floor=True, first=first, renumber=renumber)


def check_parts(dominant: int | float, contextual: int | float) -> None:
    """Refuse what are not two shares or two counts that fit together.

    Raises:
        MethodError: with the values.
    """
    check_keep(dominant)
    check_keep(contextual)
    if type(dominant) is not type(contextual):
        raise MethodError(f"dominant={dominant!r}, contextual={contextual!r}: expected two counts or two shares")
    check_keep(dominant + contextual)


@lru_cache
def _vision(share: float, width: int) -> tuple[Any, Any]:
    def parts(scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
        encoded = cast(Encoded, scoring.encoded)
        contextual = (scoring.counts * share).round().long()
        patches = encoded.place[..., 0] >= 0
        return scores.dominant(encoded.attention[0], scoring.image, scoring.counts, contextual, width, patches)

    def score(scoring: Scoring) -> Tensor:
        dominant, anchors, _ = parts(scoring)
        return (dominant | anchors).float()

    def merge(scoring: Scoring, kept: Tensor) -> Merge:
        _, anchors, pool = parts(scoring)
        members = pool & ~anchors
        return added_mean(scoring, members, anchors)

    return score, merge


def added_mean(scoring: Scoring, members: Tensor, anchors: Tensor) -> Merge:
    """The mean of the members whose keys in the encoder are most like an anchor's is added to it."""
    into, sizes = scores.nearest(cast(Encoded, scoring.encoded).keys[0], members, anchors)
    return Merge(into, torch.where(members, 1 / (sizes - 1).clamp(min=1), 1.0))
