"""One file per published method: a frozen dataclass that returns roles and knows no model."""

from tokendrop.methods.cd_pruner import CDPruner
from tokendrop.methods.dart import DART
from tokendrop.methods.div_prune import DivPrune
from tokendrop.methods.drop import Drop
from tokendrop.methods.duet_vlm import DuetVLM
from tokendrop.methods.fastv import FastV
from tokendrop.methods.hidrop import HiDrop
from tokendrop.methods.himix import HiMix
from tokendrop.methods.hmgen import HMGen
from tokendrop.methods.mixture_of_depths import MixtureOfDepths
from tokendrop.methods.mixture_of_transformers import MixtureOfTransformers
from tokendrop.methods.pmod import PMoD
from tokendrop.methods.pyramid_drop import PyramidDrop
from tokendrop.methods.random_ltd import RandomLTD
from tokendrop.methods.skip_vision import SkipVision
from tokendrop.methods.sprint import Sprint
from tokendrop.methods.svd_prune import SVDPrune
from tokendrop.methods.vision_zip import VisionZip
from tokendrop.methods.vscan import VScan

__all__ = [
    "DART",
    "CDPruner",
    "DivPrune",
    "Drop",
    "DuetVLM",
    "FastV",
    "HMGen",
    "HiDrop",
    "HiMix",
    "MixtureOfDepths",
    "MixtureOfTransformers",
    "PMoD",
    "PyramidDrop",
    "RandomLTD",
    "SVDPrune",
    "SkipVision",
    "Sprint",
    "VScan",
    "VisionZip",
]
