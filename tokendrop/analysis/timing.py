"""Seconds of work, bytes of a step, and what repetitions of a figure come to.

Shape letters: none.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


def now(devices: Iterable[torch.device] = ()) -> float:
    """Seconds by a clock that every piece of work asked for before is on.

    Where there is an accelerator, or there are several threads, it is the wall's clock; else the process's own time,
    which other processes disturb least.

    Args:
        devices: accelerators that are waited for; by default the current one.
    """
    if torch.accelerator.is_available():
        for device in [one for one in devices if one.type not in ("cpu", "meta")] or [None]:
            torch.accelerator.synchronize(device) if device is not None else torch.accelerator.synchronize()
    return time.process_time() if clock() == "process" else time.perf_counter()


def clock() -> str:
    """Which clock `now` reads: "process" or "wall"."""
    alone = torch.get_num_threads() == 1 and not torch.accelerator.is_available()
    return "process" if alone else "wall"


def peak_bytes(step: Callable[[], Any], devices: Iterable[torch.device] | None = None) -> int:
    """Most bytes of a step on CUDA devices, above those before it.

    Args:
        step: is run once.
        devices: on which; by default the current one.
    """
    found = [torch.device("cuda", torch.cuda.current_device())] if devices is None else list(devices)
    for device in found:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(torch.cuda.memory_allocated(device) for device in found)
    step()
    for device in found:
        torch.cuda.synchronize(device)
    return sum(torch.cuda.max_memory_allocated(device) for device in found) - before


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and how many there are.

    Args:
        values: at least one.

    Example:
        >>> spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
        {'median': 3.5, 'p20': 2.0, 'p80': 5.0, 'n': 6}
    """
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3], "n": len(values)}
