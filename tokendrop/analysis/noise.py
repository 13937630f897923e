"""Figures printed no finer than they are known."""

import math


def to_noise(value: float, noise: float, signed: bool = False) -> str:
    """A figure rounded to the first digit of its noise, with the noise behind it.

    Args:
        value: the figure.
        noise: its standard error or spread, above 0.
        signed: write the sign of positive figures too.

    Raises:
        ValueError: a noise that is not a positive number, which would promise endless digits.

    Example:
        >>> to_noise(0.70512, 0.0163), to_noise(0.0482, 0.021, signed=True), to_noise(1234.5, 38)
        ('0.71 ±0.02', '+0.05 ±0.02', '1230 ±40')
    """
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise: found {noise}; a figure is printed to its noise, a finite number above 0: measure it")
    decimals = -math.floor(math.log10(noise))
    # 0.096 rounds up to 0.1, which has a decimal less.
    decimals = -math.floor(math.log10(round(noise, decimals)))
    shown = max(decimals, 0)
    sign = "+" if signed else ""
    return f"{round(value, decimals):{sign}.{shown}f} ±{round(noise, decimals):.{shown}f}"
