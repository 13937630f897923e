"""HMGen: image tokens skip some layers of the middle, and compute in the others."""

from dataclasses import dataclass

from tokendrop.roles import (
    LayerRoute,
    Layers,
    Method,
    Role,
    Route,
    Separate,
    check_layers,
    check_separate,
    deepest,
    layer_indices,
    owned,
    shown,
)


@dataclass(frozen=True)
class HMGen(Method):
    """Image tokens are BYPASS in the `shallow` layers and ACTIVE in the others, the full layers.

    In a shallow layer text attends to text only, and image hidden states are handed on unchanged.

    Args:
        shallow: the shallow layers; "8:24:2" alternates them with full ones.
        separate: image-only W_v^Q, W_v^K and W_v^V in the full layers: "none" shares the text's, "shared" has one set
            for all tasks, "per-task" one for each.
        parts: what is image-only there; "qkv+o+norm+ffn" adds the output projection, the norms and the FFN.

    Raises:
        LayerRangeError: `shallow` is no range.
        MethodError: an unknown `separate`, or unknown parts.

    Example:
        >>> [layer.image.name for layer in HMGen("1:3:2").route(3)]
        ['ACTIVE', 'BYPASS', 'ACTIVE']

    Source: arXiv 2606.01503 section 4 ("HMGen for generation"). Which layers are shallow the paper leaves open.
    """

    shallow: Layers
    separate: Separate = "none"
    parts: str = "qkv"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shallow", check_layers(self.shallow))
        check_separate(self.separate)
        owned(self.parts, self.separate)

    def __repr__(self) -> str:
        return shown(self)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule switches shallow layers on from the deep end."""
        shallow = layer_indices(self.shallow, num_layers)
        on = deepest(shallow, strength)
        own = owned(self.parts, self.separate)
        return tuple(
            LayerRoute(Role.BYPASS if i in on else Role.ACTIVE, frozenset() if i in shallow else own)
            for i in range(num_layers)
        )
