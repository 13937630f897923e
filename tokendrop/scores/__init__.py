"""What an image token is worth: pure functions on tensors."""

from tokendrop.scores.attention import attention, value_norm
from tokendrop.scores.features import leverage, similarity
from tokendrop.scores.frames import temporal
from tokendrop.scores.greedy import conditional, diverse, pivots, relevance, unlike
from tokendrop.scores.simple import norm, random, uniform
from tokendrop.scores.vision import capped_scan, dominant, nearest, scan, spread

__all__ = [
    "attention",
    "capped_scan",
    "conditional",
    "diverse",
    "dominant",
    "leverage",
    "nearest",
    "norm",
    "pivots",
    "random",
    "relevance",
    "scan",
    "similarity",
    "spread",
    "temporal",
    "uniform",
    "unlike",
    "value_norm",
]
