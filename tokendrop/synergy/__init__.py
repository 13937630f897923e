"""Whether the gradients of several tasks agree: pure functions of them, their noise, and what holds their history."""

from tokendrop.synergy.estimates import Estimate, alignment, conflict, jackknife, magnitude
from tokendrop.synergy.gradients import Compressed, compress, products
from tokendrop.synergy.history import heat_map, read_history
from tokendrop.synergy.metrics import Synergy, TaskProducts

__all__ = [
    "Compressed",
    "Estimate",
    "Synergy",
    "TaskProducts",
    "alignment",
    "compress",
    "conflict",
    "heat_map",
    "jackknife",
    "magnitude",
    "products",
    "read_history",
]
