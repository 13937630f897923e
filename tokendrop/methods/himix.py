"""HiMix: image tokens serve as keys and values, and compute nothing."""

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
class HiMix(Method):
    """Image tokens are CONTEXT in `layers`: only text has queries, attention output and FFN.

    K_v, V_v = norm(x0) W_v^K, norm(x0) W_v^V    with x0 the image tokens as they entered the range

    Args:
        layers: the range of layers, all by default; "2:" leaves the first two dense.
        separate: image-only W_v^K and W_v^V: "none" shares the text's, "shared" has one set for all tasks,
            "per-task" one for each.
        parts: what is image-only, of the projections and, with "qkv+norm", the norms that lead to them; image tokens
            have no use for other parts.

    Raises:
        LayerRangeError: `layers` is no range.
        MethodError: an unknown `separate`, or parts that are unknown or of no use.

    Example:
        >>> [layer.image.name for layer in HiMix("1:").route(3)]
        ['ACTIVE', 'CONTEXT', 'CONTEXT']

    Source: arXiv 2606.01503 section 3 ("HiMix for understanding"), after arXiv 2501.10318. Keys keep their
    positions and pass the layer's own input norm; the paper leaves both open.
    """

    layers: Layers = ":"
    separate: Separate = "none"
    parts: str = "qkv"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_separate(self.separate)
        owned(self.parts, self.separate, Role.CONTEXT)

    def __repr__(self) -> str:
        return shown(self)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule switches layers on from the deep end."""
        chosen = layer_indices(self.layers, num_layers)
        on = deepest(chosen, strength)
        own = owned(self.parts, self.separate, Role.CONTEXT)
        return tuple(
            LayerRoute(Role.CONTEXT if i in on else Role.ACTIVE, own if i in chosen else frozenset())
            for i in range(num_layers)
        )
