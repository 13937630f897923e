"""Time of steps, side by side in one run.

Shape letters: none.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from tokendrop.analysis.timing import now


def seconds(steps: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order changes from round to round.

    On a CPU it is the process's own time, with one thread, which other processes disturb least.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for number in range(warmup + rounds):
        shuffle.shuffle(order)
        for name in order:
            one = _timed(steps[name])
            if number >= warmup:
                found[name].append(one)
    return found


def _timed(step: Callable[[], Any]) -> float:
    start = now()
    step()
    return now() - start
