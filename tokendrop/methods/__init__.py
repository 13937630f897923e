"""One file per published method: a frozen dataclass that returns roles and knows no model."""

from tokendrop.methods.drop import Drop
from tokendrop.methods.himix import HiMix
from tokendrop.methods.hmgen import HMGen

AnyMethod = HiMix | HMGen | Drop  # a union of classes, which a LightningCLI configuration can write

__all__ = ["AnyMethod", "Drop", "HMGen", "HiMix"]
