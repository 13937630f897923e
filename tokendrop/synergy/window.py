"""What a monitor measured in its last events, as long as they are of the same tasks and parameters.

Shape letters: G groups, N tasks, S = 2 N samples.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import torch

from tokendrop.synergy.estimates import Estimate, over_events
from tokendrop.synergy.metrics import TaskProducts


class Window:
    """Products and figures of the last events; those of other tasks or other parameters are no part of a mean.

    Args:
        tasks: N names.
        size: events that are kept.

    Source: ours.
    """

    def __init__(self, tasks: tuple[str, ...], size: int) -> None:
        self.products = TaskProducts(tasks, size)
        self.direct: dict[str, list[float]] = {}
        self._of = ""

    def reset(self) -> None:
        """Forget all events."""
        self.products.reset()
        self.direct, self._of = {}, ""

    def measuring(self, names: Iterable[str]) -> None:
        """Say which parameters the next event looks at; where they are others than before, begin anew."""
        of = sha256("\n".join(names).encode()).hexdigest()
        if of != self._of:
            self.reset()
            self._of = of

    def over_events(self, kind: str, values: Mapping[str, float]) -> dict[str, Estimate]:
        """Take figures of an event by name, and say what those of the last events are."""
        for name, value in values.items():
            held = self.direct.setdefault(f"{kind}/{name}", [])
            held.append(value)
            del held[: -self.products.window]
        return {name: over_events(self.direct[f"{kind}/{name}"]) for name in values}

    def state_dict(self) -> dict[str, Any]:
        """All as plain data."""
        held = {name: torch.stack(getattr(self.products, name)) for name in ("grams", "shares") if self.products.grams}
        direct = {name: list(values) for name, values in self.direct.items()}
        return {"tasks": list(self.products.tasks), "of": self._of, "direct": direct, **held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, or begin anew where it was of other tasks."""
        self.reset()
        if state.get("tasks") != list(self.products.tasks):
            return
        self._of, self.direct = state["of"], {name: list(values) for name, values in state["direct"].items()}
        for gram, share in zip(state.get("grams", ()), state.get("shares", ()), strict=True):
            self.products.update(gram, share)
