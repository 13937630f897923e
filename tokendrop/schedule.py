"""When dropping sets in, grows and ends during training."""

import random
from dataclasses import dataclass, replace
from typing import Literal

from tokendrop.errors import MethodError, check_flag, check_integer


@dataclass(frozen=True)
class Schedule:
    """When dropping sets in, grows and ends, in optimiser steps t = 0, 1, ... of `total`.

    grown(t) = clip((t - start) / steps, 0, 1), or t >= start where steps = 0
    strength(t) = grown(t) for "in", 1 - grown(t) for "out";
                  times u(seed, t) where drawn; 0 for t >= total - dense_tail, and where dense_every divides t + 1

    Args:
        start: optimiser step at which the change begins.
        steps: optimiser steps that it takes; 0 changes at once.
        dense_tail: optimiser steps at the end of training that run dense.
        direction: "in" goes from dense to the method; "out" from the method to dense, as random-LTD does.
        dense_every: every so many optimiser steps one runs dense; 0 for none.
        drawn: whether the strength of each step is drawn: u is uniform in [0, 1), a function of `seed` and t alone, so
            the same on every rank and in a run that goes on. An evaluation has the strength without it.
        seed: of u.

    Raises:
        MethodError: a negative number, another direction, or a seed that is no integer.

    Example:
        >>> Schedule(start=100, steps=200).strength(150), Schedule(steps=200, direction="out").strength(50)
        (0.25, 0.75)

    Source: ours; "out" after arXiv 2211.11586 section 3.
    """

    start: int = 0
    steps: int = 0
    dense_tail: int = 0
    direction: Literal["in", "out"] = "in"
    dense_every: int = 0
    drawn: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "steps", "dense_tail", "dense_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise MethodError(f"Schedule({name}={value!r}): expected a number of steps, 0 or more")
        if self.direction not in ("in", "out"):
            raise MethodError(f"Schedule(direction={self.direction!r}): expected 'in' or 'out'")
        check_flag("drawn", self.drawn)
        check_integer("seed", self.seed)

    @property
    def final(self) -> float:
        """The strength that training ends with; a model of whose training nothing is known is evaluated with it."""
        return 0.0 if self.dense_tail or self.direction == "out" else 1.0

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
        if self.dense_every and (step + 1) % self.dense_every == 0:
            return 0.0
        grown = min(1.0, max(0, step - self.start) / self.steps) if self.steps else float(step >= self.start)
        strength = grown if self.direction == "in" else 1.0 - grown
        return strength * random.Random(f"{self.seed} {step}").random() if self.drawn else strength

    def evaluated(self, step: int, total_steps: int | None = None) -> float:
        """The strength that a model is evaluated with after `step` optimiser steps.

        It is that of the next step, unless that is drawn, or dense for `dense_every`, or for a tail of unknown place.
        """
        tail = 0 if total_steps is None else self.dense_tail
        return replace(self, dense_tail=tail, dense_every=0, drawn=False).strength(step, total_steps)
