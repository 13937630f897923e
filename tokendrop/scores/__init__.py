"""What an image token is worth: pure functions on tensors."""

from tokendrop.scores.attention import attention, value_norm
from tokendrop.scores.features import leverage, similarity
from tokendrop.scores.simple import norm, random, uniform

__all__ = ["attention", "leverage", "norm", "random", "similarity", "uniform", "value_norm"]
