"""FastV: image tokens that the prompt's last token hardly looks at leave behind the first layers."""

from dataclasses import dataclass

from tokendrop.errors import MethodError
from tokendrop.methods.stages import Stage, check_stage_layers, staged
from tokendrop.roles import Method, Per, Route, check_keep, check_per


@dataclass(frozen=True)
class FastV(Method):
    """Image tokens with the lowest attention in layer `layer` - 1 are GONE from `layer` on.

    s[t] = mean over heads of the attention of the last prompt row to t; the round(keep M) highest of M stay

    Args:
        layer: K, the first layer without them.
        keep: share of the sample's image tokens, or a count.
        per: what keeps so many: the "sample", each "image" (or video) of it, or each "frame"; see `Drop`.

    Raises:
        LayerRangeError: a layer that is none.
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.image.name for layer in FastV(layer=2, keep=0.5).route(4)]
        ['ACTIVE', 'ACTIVE', 'GONE', 'GONE']

    Source: arXiv 2403.06764 section 4 and github.com/pkunlp-icler/FastV. Training is ours: the rows before each answer.
    """

    layer: int = 2
    keep: int | float = 0.5
    per: Per = "sample"

    def __post_init__(self) -> None:
        check_stage_layers((self.layer,), "layer")
        check_keep(self.keep)
        check_per(self.per)
        if self.layer == 0:
            raise MethodError("layer=0: FastV scores with the attention of the layer before; use 1 or more")

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept count."""
        return staged((Stage(self.layer, self.keep),), num_layers, strength, "answer", back=1, per=self.per)
