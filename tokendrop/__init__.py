"""Token dropping for training vision-language models: one Lightning callback, any decoder."""

from tokendrop.analysis.allocation import Allocation, attention_allocation
from tokendrop.analysis.flop_report import FlopReport, flops
from tokendrop.analysis.inspection import Inspection, inspect
from tokendrop.callbacks import AttentionAllocation, SynergyMonitor, TokenDrop
from tokendrop.engine.drop_layers import DropLayers
from tokendrop.engine.handle import Handle, handle
from tokendrop.engine.inject import apply
from tokendrop.errors import (
    AppliedError,
    BatchError,
    DecoderError,
    LayerRangeError,
    LayoutError,
    LayoutTypeError,
    LayoutWarning,
    MethodError,
    MissingLayoutError,
    NeededRowError,
    NoEffectWarning,
    SynergyWarning,
    TaskLossError,
    TokenDropError,
    UnsupportedError,
)
from tokendrop.kernels import gather_tokens, scatter_tokens
from tokendrop.layout import Segment, TokenLayout
from tokendrop.methods import (
    Drop,
    DuetVLM,
    FastV,
    HiDrop,
    HiMix,
    HMGen,
    MixtureOfDepths,
    PyramidDrop,
    RandomLTD,
    SVDPrune,
    VScan,
)
from tokendrop.roles import Role
from tokendrop.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "AppliedError",
    "AttentionAllocation",
    "BatchError",
    "DecoderError",
    "Drop",
    "DropLayers",
    "DuetVLM",
    "FastV",
    "FlopReport",
    "HMGen",
    "Handle",
    "HiDrop",
    "HiMix",
    "Inspection",
    "LayerRangeError",
    "LayoutError",
    "LayoutTypeError",
    "LayoutWarning",
    "MethodError",
    "MissingLayoutError",
    "MixtureOfDepths",
    "NeededRowError",
    "NoEffectWarning",
    "PyramidDrop",
    "RandomLTD",
    "Role",
    "SVDPrune",
    "Schedule",
    "Segment",
    "SynergyMonitor",
    "SynergyWarning",
    "TaskLossError",
    "TokenDrop",
    "TokenDropError",
    "TokenLayout",
    "UnsupportedError",
    "VScan",
    "apply",
    "attention_allocation",
    "flops",
    "gather_tokens",
    "handle",
    "inspect",
    "scatter_tokens",
]
