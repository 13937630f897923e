"""Time and memory of steps, side by side in one run.

Shape letters: none.
"""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


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
    if not torch.cuda.is_available():
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most bytes of a step on the accelerator, above those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
