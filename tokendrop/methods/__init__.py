"""One file per published method: a frozen dataclass that returns roles and knows no model."""

from tokendrop.methods.drop import Drop
from tokendrop.methods.himix import HiMix
from tokendrop.methods.hmgen import HMGen
from tokendrop.methods.random_ltd import RandomLTD

__all__ = ["Drop", "HMGen", "HiMix", "RandomLTD"]
