"""DUET-VLM: image tokens leave in two stages, scored by all of the prompt's text."""

from dataclasses import dataclass
from typing import ClassVar

from tokendrop.methods.stages import Stage, check_stages, staged
from tokendrop.roles import Route, Separate


@dataclass(frozen=True)
class DuetVLM:
    """The text-guided stage: image tokens that the prompt's text hardly looks at are GONE.

    s[t] = mean over heads and scoring rows of the attention to t in the layer that is entered
    kept = int(keep M) of the M image tokens a sample began with, at least 1, or `keep` of them if it is a count

    The scoring rows are all text without labels behind the last image.

    Args:
        text_layers: the first layer of each text-guided stage, ascending.
        text_keep: for each, a share of the sample's original image tokens, or a count; 0 for none.

    Raises:
        LayerRangeError: layers that do not ascend.
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.select and layer.select.count(307) for layer in DuetVLM((1,), (0.5,)).route(3)]
        [None, 153, 153]

    Source: DUET-VLM, github.com/AMD-AGI/DUET-VLM, for 32 layers. Its vision stage, its choice of salient words and its
    new positions are left out.
    """

    text_layers: tuple[int, ...] = (16, 24)
    text_keep: tuple[int | float, ...] = (0.5, 0)

    separate: ClassVar[Separate] = "none"

    def __post_init__(self) -> None:
        check_stages(self, "text_layers", "text_keep")

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept counts."""
        stages = [Stage(*one) for one in zip(self.text_layers, self.text_keep, strict=True)]
        return staged(stages, num_layers, strength, "prompt", floor=True)
