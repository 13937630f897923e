"""HiDrop: image tokens enter late, leave in stages, and are out before the last layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokendrop.errors import LayerRangeError
from tokendrop.methods.stages import Stage, check_stages, staged
from tokendrop.roles import LayerRoute, Method, Per, Role, Route, check_per


@dataclass(frozen=True)
class HiDrop(Method):
    """Image tokens are BYPASS until `entry`, fewer at each stage, and all GONE from `exit` on.

    s[t] = mean over heads and scoring rows of the attention to t in the layer that is entered
    kept = int(keep M) of the M image tokens a sample began with, at least 1, or `keep` of them if it is a count

    The scoring rows are the row before each answer begins; the last prompt row in generation.

    Args:
        entry: the first layer that sees image tokens, as they were embedded.
        layers: the first layer of each stage, ascending.
        keep: for each stage, a share of the sample's original image tokens, or a count.
        exit: the first layer without any.
        per: what keeps so many: the "sample", each "image" (or video) of it, or each "frame"; see `Drop`.

    Raises:
        LayerRangeError: layers that do not ascend from `entry` to `exit`.
        MethodError: a value that makes no sense.

    Example:
        >>> [layer.image.name for layer in HiDrop(entry=1, layers=(2,), keep=(0.5,), exit=3).route(4)]
        ['BYPASS', 'ACTIVE', 'GONE', 'GONE']

    Source: HiDrop (ICLR 2026) and github.com/EIT-NLP/HiDrop, its schedule of 64 tokens on average for 576 in 32 layers.
    """

    entry: int = 8
    layers: Sequence[int] = (10, 14, 16, 18)
    keep: Sequence[int | float] = (215, 10, 5, 1)
    exit: int = 24
    per: Per = "sample"

    def __post_init__(self) -> None:
        check_stages(self, "layers", "keep")
        check_per(self.per)
        bounds = (self.entry, self.exit)
        whole = all(isinstance(one, int) and not isinstance(one, bool) for one in bounds)
        if not whole or not 0 <= self.entry <= self.layers[0] or not self.layers[-1] < self.exit:
            raise LayerRangeError(
                f"entry={self.entry!r}, layers={self.layers!r}, exit={self.exit!r}: expected layer indices with entry "
                "up to the first stage and exit behind the last"
            )

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept counts and the entry."""
        stages = [Stage(*one) for one in zip(self.layers, self.keep, strict=True)]
        route = staged([*stages, Stage(self.exit, 0)], num_layers, strength, "answer", floor=True, per=self.per)
        late = int(strength * self.entry + 1e-9)
        return (LayerRoute(Role.BYPASS),) * late + route[late:]
