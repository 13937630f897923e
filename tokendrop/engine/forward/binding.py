"""What ties a decoder layer to the handle of its model.

Shape letters: B batch, L layers.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.plan.plan import Plan
from tokendrop.layout import TokenLayout
from tokendrop.roles import Route


class Routing(Protocol):
    """What a layer asks of its handle while it runs."""

    key: str
    hint: str
    listened: bool

    def sets(self, index: int) -> nn.ModuleDict:
        """The image-only projections of layer `index`."""
        ...

    def trained(self, layer: nn.Module) -> bool:
        """Whether methods for training only hold now, by the mode of a decoder layer."""
        ...

    def plan(self, layout: TokenLayout, caching: bool = False) -> Plan:
        """What each of the L layers computes on such tokens."""
        ...

    def served(self, layout: TokenLayout) -> tuple[list[Route], list[str | None]]:
        """For each of the B samples, the route of its task and the projection set of its image tokens."""
        ...

    def say_once(self, kind: str, message: str, category: type[Warning], level: int) -> None:
        """Warn, the first time for each kind, at `level` frames above the caller."""
        ...


@dataclass(eq=False)
class Binding:
    """What ties a decoder layer to its handle."""

    handle: Routing
    index: int
    spec: LayerSpec
