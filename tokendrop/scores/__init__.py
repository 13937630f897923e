"""What an image token is worth: pure functions on tensors."""

from tokendrop.scores.simple import norm, random, uniform

__all__ = ["norm", "random", "uniform"]
