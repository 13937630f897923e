"""Token dropping for training vision-language models: one Lightning callback, any decoder."""

from tokendrop.callbacks import TokenDrop
from tokendrop.engine.inject import Handle, apply, handle
from tokendrop.errors import (
    AppliedError,
    BatchError,
    DecoderError,
    LayerRangeError,
    LayoutError,
    LayoutTypeError,
    MethodError,
    MissingLayoutError,
    NeededRowError,
    NoEffectWarning,
    TokenDropError,
    UnsupportedError,
)
from tokendrop.kernels import gather_tokens, scatter_tokens
from tokendrop.layout import Segment, TokenLayout
from tokendrop.methods import HiMix, HMGen
from tokendrop.roles import Role, Schedule

__version__ = "0.1.0"

__all__ = [
    "AppliedError",
    "BatchError",
    "DecoderError",
    "HMGen",
    "Handle",
    "HiMix",
    "LayerRangeError",
    "LayoutError",
    "LayoutTypeError",
    "MethodError",
    "MissingLayoutError",
    "NeededRowError",
    "NoEffectWarning",
    "Role",
    "Schedule",
    "Segment",
    "TokenDrop",
    "TokenDropError",
    "TokenLayout",
    "UnsupportedError",
    "apply",
    "gather_tokens",
    "handle",
    "scatter_tokens",
]
