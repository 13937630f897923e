"""Lightning callbacks: thin, everything they do is a function elsewhere."""

from tokendrop.callbacks.allocation import AttentionAllocation
from tokendrop.callbacks.synergy_monitor import SynergyMonitor
from tokendrop.callbacks.token_drop import TokenDrop

__all__ = ["AttentionAllocation", "SynergyMonitor", "TokenDrop"]
