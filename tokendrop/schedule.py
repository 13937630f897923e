"""When dropping sets in, grows and ends during training."""

from dataclasses import dataclass

from tokendrop.errors import MethodError


@dataclass(frozen=True)
class Schedule:
    """When dropping sets in: dense before `start`, growing for `steps`, dense again for the last `dense_tail` steps.

    strength(t) = clip((t - start) / steps, 0, 1), and 0 for t >= total - dense_tail

    Args:
        start: first optimiser step of the growth.
        steps: optimiser steps until the method is whole; 0 switches it on at once.
        dense_tail: optimiser steps at the end of training that run dense.

    Raises:
        MethodError: a negative number.

    Example:
        >>> Schedule(start=100, steps=200).strength(150)
        0.25
    """

    start: int = 0
    steps: int = 0
    dense_tail: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise MethodError(f"Schedule({name}={value!r}): expected a number of steps, 0 or more")

    @property
    def final(self) -> float:
        """The strength that training ends with, and that a model is therefore evaluated with."""
        return 0.0 if self.dense_tail else 1.0

    def strength(self, step: int, total_steps: int | None = None) -> float:
        """The share of the method that is on at optimiser step `step` of `total_steps`.

        Raises:
            MethodError: a dense tail, and no known end to count it from.
        """
        if self.dense_tail:
            if total_steps is None:
                raise MethodError(
                    f"Schedule(dense_tail={self.dense_tail}) needs the number of training steps, which is unbounded "
                    "here; give the Trainer max_steps or max_epochs"
                )
            if step >= total_steps - self.dense_tail:
                return 0.0
        if step < self.start:
            return 0.0
        return min(1.0, (step - self.start) / self.steps) if self.steps else 1.0
