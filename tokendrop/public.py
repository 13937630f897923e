"""Every public name; `tokendrop` hands them on when the first one is asked for."""

from tokendrop.analysis.allocation import Allocation, attention_allocation
from tokendrop.analysis.bench import Benchmark, benchmark
from tokendrop.analysis.flop_report import FlopReport, flops
from tokendrop.analysis.inspection import Inspection, inspect
from tokendrop.analysis.recipe import recipe
from tokendrop.callbacks import AttentionAllocation, SynergyMonitor, TokenDrop
from tokendrop.config import from_config, methods_of, to_config
from tokendrop.engine.drop_layers import DropLayers
from tokendrop.engine.handle import Handle
from tokendrop.engine.inject import apply, handle
from tokendrop.errors import (
    AppliedError,
    BatchError,
    DecoderError,
    LayerRangeError,
    LayoutError,
    LayoutTypeError,
    LayoutWarning,
    MethodChangedWarning,
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
    DART,
    CDPruner,
    DivPrune,
    Drop,
    DuetVLM,
    FastV,
    HiDrop,
    HiMix,
    HMGen,
    MixtureOfDepths,
    MixtureOfTransformers,
    PMoD,
    PyramidDrop,
    RandomLTD,
    SkipVision,
    Sprint,
    SVDPrune,
    VisionZip,
    VScan,
)
from tokendrop.roles import Method, Role
from tokendrop.schedule import Schedule
from tokendrop.scoring import sees

__all__ = [
    "DART",
    "Allocation",
    "AppliedError",
    "AttentionAllocation",
    "BatchError",
    "Benchmark",
    "CDPruner",
    "DecoderError",
    "DivPrune",
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
    "Method",
    "MethodChangedWarning",
    "MethodError",
    "MissingLayoutError",
    "MixtureOfDepths",
    "MixtureOfTransformers",
    "NeededRowError",
    "NoEffectWarning",
    "PMoD",
    "PyramidDrop",
    "RandomLTD",
    "Role",
    "SVDPrune",
    "Schedule",
    "Segment",
    "SkipVision",
    "Sprint",
    "SynergyMonitor",
    "SynergyWarning",
    "TaskLossError",
    "TokenDrop",
    "TokenDropError",
    "TokenLayout",
    "UnsupportedError",
    "VScan",
    "VisionZip",
    "apply",
    "attention_allocation",
    "benchmark",
    "flops",
    "from_config",
    "gather_tokens",
    "handle",
    "inspect",
    "methods_of",
    "recipe",
    "scatter_tokens",
    "sees",
    "to_config",
]
