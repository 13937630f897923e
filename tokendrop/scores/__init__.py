"""What an image token is worth: pure functions on tensors."""

from tokendrop.scores.attention import attention, value_norm
from tokendrop.scores.features import leverage, similarity
from tokendrop.scores.simple import norm, random, uniform
from tokendrop.scores.vision import capped_scan, dominant, nearest, scan

__all__ = [
    "attention",
    "capped_scan",
    "dominant",
    "leverage",
    "nearest",
    "norm",
    "random",
    "scan",
    "similarity",
    "uniform",
    "value_norm",
]
