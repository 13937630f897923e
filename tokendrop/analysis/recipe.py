"""Recipes: published settings for a task, fitted to the depth of a decoder and to a budget of FLOPs.

Shape letters: L layers.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from tokendrop.analysis.flop_report import flops
from tokendrop.engine.model.decoder import find_layers
from tokendrop.engine.model.from_config import model_from_config
from tokendrop.errors import LayerRangeError, MethodError, UnsupportedError
from tokendrop.methods import HiDrop, HiMix, HMGen, SVDPrune
from tokendrop.roles import Method

TASKS = ("understanding", "generation")


@dataclass(frozen=True)
class Kind:
    """Settings of one method, from mild to severe.

    Args:
        methods: each costs less than the one before.
        source: of the settings.
    """

    methods: Sequence[Method]
    source: str


def recipe(
    config_or_model: Any,
    task: str,
    budget: float,
    *,
    text: int = 64,
    image: int = 576,
    layers: str | None = None,
) -> Method:
    """The mildest published setting of a method for a task whose FLOPs meet a budget; nobody measured it on the model.

    understanding: HiMix from the latest layer on that meets it, down to all layers; below that HiDrop's stages, and
    then SVD-Prune to 32 or 16 of 576 image tokens. generation: HMGen with the fewest shallow layers that meet it, in
    the middle, alternating with full ones, and adjacent where more are needed; the first and the last layer are full.

    The setting is logged with its FLOPs and its source, and that it was not measured on this model: look at what it
    does to your loss with `tokendrop analyze`.

    Args:
        config_or_model: a model, a Hugging Face config, or the path of a config.json; nothing needs weights.
        task: "understanding" or "generation".
        budget: share of the dense FLOPs, above 0 and at most 1, as `flops` counts a forward.
        text: text tokens of a sample.
        image: image tokens of a sample; by default LLaVA-1.5's.
        layers: dotted path of the decoder's layer list, where inspection finds several.

    Raises:
        MethodError: another task, a budget that is no share, or one below the least that is possible.
        DecoderError: no decoder, or no config of one.
        LayoutError: token counts that make no sense.
        UnsupportedError: layers that none of these methods can run in, or whose FLOPs are unknown.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
        ...                      num_attention_heads=4)
        >>> recipe(config, "understanding", 0.7), recipe(config, "generation", 0.7)
        (HiMix(layers='5:', separate='none'), HMGen(shallow='1:6:2', separate='none'))

    Source: HiMix and HMGen arXiv 2606.01503 sections 3 and 4 (every layer; K alternating shallow layers in the middle).
    Leaving HiMix's first layers dense is ours, from docs/synergy.md, at a small scale. HiDrop
    github.com/EIT-NLP/HiDrop (entry 8, stages 10, 14, 16, 18, exit 24 of 32 layers; 80, 64 and 48 of 576 tokens on
    average). SVD-Prune arXiv 2604.11530.
    """
    if task not in TASKS:
        raise MethodError(f"task={task!r}: there are recipes for 'understanding' and 'generation'; name one of them")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise MethodError(f"budget={budget!r}: expected a share of the dense FLOPs, above 0 and at most 1")
    model = config_or_model if isinstance(config_or_model, nn.Module) else model_from_config(config_or_model)
    depth, costs = len(find_layers(model, layers)[1]), _Costs(model, text, image, layers)
    least: list[tuple[float, str]] = []
    for kind in _kinds(task, depth):
        found, severest = _mildest(kind.methods, budget, costs)
        if found is not None:
            rank_zero_info(
                f"tokendrop.recipe: {found} costs {costs(found):.2f} of the dense FLOPs of {type(model).__name__} with "
                f"{text} text and {image} image tokens. Its settings are those of {kind.source}, fitted to {depth} "
                "layers; it was not measured on this model"
            )
            return found
        if severest is not None:
            least.append((costs(severest), str(severest)))
    if not least:
        reason = next(iter(costs.refused), f"its decoder has {depth} layers, and some must stay full")
        raise UnsupportedError(f"no recipe for {task} in {type(model).__name__}: {reason}")
    cost, method = min(least)
    raise MethodError(
        f"budget={budget!r}: the least for {task} with {text} text and {image} image tokens is "
        f"{ceil(1000 * cost) / 1000}, by {method}; ask for that or more"
    )


class _Costs:
    """FLOPs ratios of methods in a model, each worked out once; infinite where it cannot have one."""

    def __init__(self, model: nn.Module, text: int, image: int, layers: str | None) -> None:
        self.model, self.tokens, self.layers = model, (text, image), layers
        self.known: dict[str, float] = {}
        self.refused: list[Exception] = []

    def __call__(self, method: Method) -> float:
        if str(method) not in self.known:
            self.known[str(method)] = self._ratio(method)
        return self.known[str(method)]

    def _ratio(self, method: Method) -> float:
        try:
            return flops(self.model, method, *self.tokens, layers=self.layers).ratio
        except (UnsupportedError, LayerRangeError) as error:
            self.refused.append(error)
            return inf


def _mildest(methods: Sequence[Method], budget: float, costs: _Costs) -> tuple[Method | None, Method | None]:
    """The first that meets the budget, and the last that the model can have."""
    # A model that cannot have a method cannot have one that is more severe: it reaches more layers.
    can = bisect_left(methods, True, key=lambda one: costs(one) == inf)
    if can == 0:
        return None, None
    at = bisect_left(methods[:can], True, key=lambda one: costs(one) <= budget)
    return (methods[at] if at < can else None), methods[can - 1]


def _kinds(task: str, depth: int) -> list[Kind]:
    if task == "generation":
        paper, methods = "arXiv 2606.01503 (HMGen)", _shallow(depth)
        alternating = [one for one in methods if str(one.shallow).count(":") == 2]
        adjacent = [one for one in methods if one not in alternating]
        return [
            Kind(adjacent[:1], f"{paper}, with one shallow layer"),
            Kind(alternating, f"{paper}, alternating shallow layers in the middle"),
            Kind(adjacent[1:], f"{paper}, with adjacent shallow layers, of which it has no figures"),
        ]
    late: list[Method] = [HiMix(f"{start}:") for start in reversed(range(depth))]
    # As shares of the 576 image tokens that its counts are for, 80, 64 and 48 of them on average.
    stages = [_stages(depth, (10, 13, 16, 19), 453), _stages(depth, (10, 14, 16, 18), 215)]
    stages.append(_stages(depth, (10, 14, 16, 18), 87))
    few: list[Method] = [SVDPrune(round(kept / 576, 4)) for kept in (32, 16)]
    return [
        Kind(late, "arXiv 2606.01503 (HiMix) from a later layer on" if depth > 1 else "arXiv 2606.01503 (HiMix)"),
        Kind([one for one in stages if one is not None], "HiDrop's code for 32 layers"),
        Kind(few, "arXiv 2604.11530 (SVD-Prune, 32 and 16 of 576 tokens)"),
    ]


def _shallow(depth: int) -> list[HMGen]:
    inner = depth - 2 if depth > 2 else depth - 1  # the first layer and, where there are three, the last are full
    found: list[HMGen] = []
    for count in range(1, inner + 1):
        step = 2 if 2 * count - 1 <= inner else 1
        width = step * (count - 1) + 1
        start = 1 + (inner - width) // 2
        found.append(HMGen(f"{start}:{start + width}:{step}" if step > 1 and count > 1 else f"{start}:{start + width}"))
    return found


def _stages(depth: int, published: Sequence[int], first: int) -> HiDrop | None:
    """HiDrop's stages for 32 layers, in `depth`; None where they do not fit."""

    def scaled(layer: int) -> int:
        return round(layer * depth / 32)

    # Where two stages fall into one layer, the later one holds. HiDrop rounds counts down, so shares are rounded up.
    counts = zip(published, (first, 10, 5, 1), strict=True)
    kept = {scaled(layer): ceil(count * 10_000 / 576) / 10_000 for layer, count in counts}
    layers = tuple(kept)
    end = max(scaled(24), layers[-1] + 1)
    if layers[0] < 1 or end >= depth:
        return None
    return HiDrop(min(scaled(8), layers[0]), layers, tuple(kept.values()), end)
