"""Means over seeds with 95 % intervals by Student's t."""

import math
import statistics
from collections.abc import Sequence

from tokendrop.analysis.noise import to_noise
from tokendrop.study.summary import MISSING


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean; 0 where values do not differ, NaN for a single one.

    t(0.975, n - 1) * stdev / sqrt(n)

    Example:
        >>> round(half_width([0.8, 0.9, 1.0]), 4)
        0.2484
    """
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values)) * float(t.ppf(0.975, len(values) - 1))


def interval(values: Sequence[float], signed: bool = False) -> str:
    """A mean with its interval, printed no finer than it is known; without one where there is none."""
    if not values or not all(map(math.isfinite, values)):
        return MISSING
    half = half_width(values)
    if half > 0:
        return to_noise(statistics.fmean(values), half, signed)
    return f"{statistics.fmean(values):{'+' if signed else ''}.3f}"
