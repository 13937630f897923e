"""Scores that need no attention.

Shape letters: B batch, T tokens, D hidden.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def random(image: Tensor, samples: Tensor, layer: int, seed: int, step: Tensor) -> Tensor:
    """Uniform draws, a function of (seed, step, micro-batch, layer, sample, token) alone.

    s[b, t] = mix(mix(key + b c1) + t c2) / 2^64, with key of (seed, layer, step, micro-batch) and mix of splitmix64

    Args:
        image: (B, T) bool, the tokens to score.
        samples: (B,) int64, the index of each sample in the global batch.
        layer: where they are scored.
        seed: of the method.
        step: (2,) int64, the optimiser step and the micro-batch.

    Returns:
        (B, T) float64 in [0, 1).

    Source: splitmix64 (Steele, Lea, Flood, OOPSLA 2014); its use here is ours.
    """
    key = torch.full_like(step[0], _mix_int(_mix_int(seed) + layer))
    for part in step:
        key = _mix(key + part * _GOLDEN + _GOLDEN)
    tokens = torch.arange(image.shape[1], device=image.device)
    mixed = _mix(key + samples[:, None] * _GOLDEN)
    return _shift(_mix(mixed + tokens * _signed(0xD1B54A32D192ED03)), 11).double() * 2.0**-53


def uniform(image: Tensor) -> Tensor:
    """Evenly spaced tokens, by the bit-reversed rank of each among the image tokens of its sample.

    s[b, t] = -reverse(rank of t), so that any number of kept tokens covers the image evenly

    Args:
        image: (B, T) bool, the tokens to score.

    Returns:
        (B, T) float64.

    Source: van der Corput's sequence; its use here is ours.
    """
    rank = image.cumsum(1) - 1
    value, step = torch.zeros(rank.shape, dtype=torch.float64, device=rank.device), 0.5
    for _ in range(max(1, image.shape[1].bit_length())):
        value, rank, step = value + (rank & 1) * step, rank >> 1, step / 2
    return -value


def norm(states: Tensor) -> Tensor:
    """Length of the hidden state.

    s[b, t] = |x[b, t]|_2

    Args:
        states: (B, T, D).

    Returns:
        (B, T) float32.

    Source: ours, as the simplest baseline.
    """
    return states.detach().float().norm(dim=-1)


def _mix_int(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return _signed(x ^ (x >> 31))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
