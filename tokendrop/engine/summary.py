"""What methods do in a model, in words.

Shape letters: L layers.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.roles import Method, Role, Route
from tokendrop.routes import route_of

_NAMES = {Role.ATTEND: "ATTEND (without FFN)"}
IMAGES = 576  # of a sample that is spoken of; what a method counts in is said of as many as LLaVA-1.5 has


def computed_share(route: Route, images: int = IMAGES) -> float:
    """The share of image token-layers that is computed, with an FFN or without, for a sample of so many image tokens.

    Example:
        >>> from tokendrop.roles import LayerRoute
        >>> computed_share((LayerRoute(), LayerRoute(Role.BYPASS)))
        0.5
    """
    stays = zip(route, _stay(route, images), strict=True)
    return sum(images if one.image is Role.ATTEND else stay for one, stay in stays) / (images * len(route))


def in_words(route: Route) -> str:
    """What image tokens do in L layers, where they do not compute.

    Example:
        >>> from tokendrop.roles import LayerRoute
        >>> in_words((LayerRoute(), LayerRoute(Role.BYPASS), LayerRoute(), LayerRoute(Role.BYPASS)))
        'BYPASS in 1:4:2'
    """
    kinds: dict[tuple[Role, int], list[int]] = {}
    for index, (one, stay) in enumerate(zip(route, _stay(route, IMAGES), strict=True)):
        if one.image is not Role.ACTIVE:
            kinds.setdefault((one.image, stay), []).append(index)
    found = [
        f"{_NAMES.get(role, role.name)} in {_layers(indices)}" + (f" but for {stay} of {IMAGES}" if stay else "")
        for (role, stay), indices in kinds.items()
    ]
    return ", ".join(found) or "compute everywhere"


def task_lines(methods: Mapping[str | None, Method | None], num_layers: int | None) -> list[str]:
    """A line for each task: its method, and in a model of L layers what that makes of image tokens."""
    lines = []
    for task, method in methods.items():
        line = f"{task or 'any task'}: {'dense' if method is None else method}"
        if method is not None and num_layers is not None:
            route = route_of(method, num_layers)
            line += f", {in_words(route)}, {computed_share(route):.0%} of image token-layers computed"
            line += " (training only)" if getattr(method, "training_only", False) else ""
        lines.append(line)
    return lines


def text(name: str, heads: Sequence[str], lines: Sequence[str]) -> str:
    """A name with what is said of all tasks, and below it a line for each."""
    return "\n".join([f"{name}({', '.join(heads)}", *(f"  {line}" for line in lines), ")"])


class Described:
    """Mixin of the handle, which says what is done in its model."""

    path: str
    specs: Sequence[LayerSpec]
    methods: dict[str | None, Method | None]
    layers: nn.ModuleList
    strength: Any

    def heads(self) -> list[str]:
        """What is said of all tasks."""
        one = f"{self.path}: {len(self.layers)} x {self.specs[0].layer_class.__name__}"
        return [one] if self.strength == 1 else [one, f"strength {self.strength:.2f}"]

    def __repr__(self) -> str:
        return text("Handle", self.heads(), task_lines(self.methods, len(self.layers)))


def _stay(route: Route, images: int) -> list[int]:
    # How many of so many image tokens compute in each layer; those that are GONE do not come back.
    stay, left = [], images
    for one in route:
        asked = images if one.image is Role.ACTIVE else 0 if one.select is None else one.select.count(images)
        stay.append(min(asked, left))
        left = stay[-1] if one.image is Role.GONE else left
    return stay


def _layers(indices: Sequence[int]) -> str:
    steps = {b - a for a, b in pairwise(indices)}
    if len(steps) > 1:
        return " ".join(map(str, indices))
    step = next(iter(steps), 1)
    slices = f"{indices[0]}:{indices[-1] + 1}" + (f":{step}" if step > 1 else "")
    return slices if len(indices) > 1 else str(indices[0])
