"""p-MoD: routers choose the image tokens that run through a layer, fewer with depth, and weigh what all of them get."""

import math
from dataclasses import dataclass

from tokendrop.errors import MethodError
from tokendrop.methods.mixture_of_depths import routed
from tokendrop.roles import LayerRoute, Method, Role, Route, Select


@dataclass(frozen=True)
class PMoD(Method):
    """In layer l the int(a M) of M image tokens that its router ranks highest stay ACTIVE; the rest are BYPASS.

    a = max(least, shift + cos(pi l / (L - 1)) / 2), with a router where shift + cos(pi l / (L - 1)) / 2 <= most
    g = 1 + gate tanh(w x + b), w and b 0 at first, and h = x + attention(norm x) among text and kept image tokens
    out = h + g FFN(norm h) for a kept image token, g x for the rest, h + FFN(norm h) for text

    Generated tokens are not routed. There is no auxiliary loss.

    Args:
        shift: what the cosine is raised by.
        most: the share above which a layer has no router.
        least: the share that deep layers keep.
        gate: how far a weight may be from 1.

    Raises:
        MethodError: a value that makes no sense.
        UnsupportedError: layers that do more with what their FFN makes than add it.

    Example:
        >>> [layer.select and layer.select.count(100) for layer in PMoD().route(5)]
        [None, None, 50, 15, 15]

    Source: arXiv 2412.04449 and github.com/MCG-NJU/p-MoD, for any L where its code has 32.
    """

    shift: float = 0.5
    most: float = 0.85
    least: float = 0.15
    gate: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.shift, int | float) or isinstance(self.shift, bool) or not -1 <= self.shift <= 1:
            raise MethodError(f"shift={self.shift!r}: expected a number from -1 to 1")
        for name in ("most", "least", "gate"):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0 < value <= 1:
                raise MethodError(f"{name}={value!r}: expected a share in (0, 1] as a float")
        if self.least > self.most:
            raise MethodError(f"least={self.least!r}, most={self.most!r}: expected least up to most")

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """Roles of image tokens in `num_layers` layers; a schedule lowers the kept counts, and is dense at 0."""
        routes = []
        for index in range(num_layers):
            share = self.shift + math.cos(math.pi * index / max(1, num_layers - 1)) / 2
            if strength == 0 or share > self.most:
                routes.append(LayerRoute())
                continue
            keep = max(share, self.least)
            select = Select(keep, routed, index, 0, strength, floor=True, learned=True, gate=self.gate)
            routes.append(LayerRoute(Role.BYPASS, select=select))
        return tuple(routes)
