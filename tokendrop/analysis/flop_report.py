"""FLOPs of a real model under a method: by formula, and by counting the operators of a run without weights.

Shape letters: B batch, T tokens, K computed rows, M context rows, R scoring rows, D hidden, L layers.
"""

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tokendrop.analysis.flop_ledger import (
    ATTENTION,
    FFN,
    HEAD,
    OWN,
    PARTS,
    PROJECTIONS,
    SCORING,
    Parts,
    counted_parts,
)
from tokendrop.analysis.flops import LayerCost, fusing_flops, head_flops, refusal, scoring_flops
from tokendrop.analysis.pairs import Pairs, counted_pairs
from tokendrop.engine.handle import Handle
from tokendrop.engine.inject import apply
from tokendrop.engine.model.from_config import model_from_config
from tokendrop.engine.model.linears import base_linear, is_linear, linear_shape
from tokendrop.engine.model.sets import FUSION, ROUTER, Fusion
from tokendrop.engine.model.weights import readable
from tokendrop.engine.plan.plan import Group, Plan, Planner
from tokendrop.engine.plan.rows import round_up
from tokendrop.engine.support import Methods
from tokendrop.errors import LayoutError, UnsupportedError, check_flag
from tokendrop.layout import TokenLayout
from tokendrop.roles import LayerRoute, Role, Route

LARGEST = 1 << 15


@dataclass(frozen=True)
class Cost:
    """FLOPs of the untouched model, and under the method.

    Args:
        dense: of the untouched model, causal attention in full.
        dropped: under the method.
        computed_dense: of `dense`, without the pairs that no query sees: causal attention by half.
        computed_dropped: of `dropped`, likewise.
    """

    dense: int
    dropped: int
    computed_dense: int
    computed_dropped: int

    @property
    def ratio(self) -> float:
        """Dropped over dense."""
        return self.dropped / self.dense

    @property
    def computed_ratio(self) -> float:
        """The same of computed FLOPs."""
        return self.computed_dropped / self.computed_dense


@dataclass(frozen=True)
class FlopReport:
    """FLOPs of one sample, dense and under a method.

    Args:
        dense: of the untouched model, all its layers and its head; causal attention in full, as the field counts.
        dropped: under the method.
        ratio: dropped / dense.
        computed_dense: of `dense`, without the pairs of attention that no query sees: causal attention by half.
        computed_dropped: of `dropped`, likewise.
        computed_ratio: computed_dropped / computed_dense.
        per_layer: of each of the L layers.
        per_part: of each of `PARTS`; layers and head, or parts, add up to the whole.
    """

    dense: int
    dropped: int
    ratio: float
    computed_dense: int
    computed_dropped: int
    computed_ratio: float
    per_layer: tuple[Cost, ...]
    per_part: dict[str, Cost]

    @classmethod
    def of(
        cls, dense: Sequence[Parts], dropped: Sequence[Parts], hidden: Sequence[int], hidden_dropped: Sequence[int]
    ) -> "FlopReport":
        """The report of what L layers, and then the head, cost in each part, and of the layers' pairs no one sees."""
        four = [dense, dropped, _seen(dense, hidden), _seen(dropped, hidden_dropped)]
        costs = [Cost(*(sum(one.values()) for one in each)) for each in zip(*four, strict=True)]
        parts = {part: Cost(*(sum(one.get(part, 0) for one in all_) for all_ in four)) for part in PARTS}
        total = Cost(*map(sum, zip(*(astuple(one) for one in costs), strict=True)))
        return cls(
            total.dense, total.dropped, total.ratio, total.computed_dense, total.computed_dropped,
            total.computed_ratio, tuple(costs[:-1]), parts,
        )  # fmt: skip


def _seen(layers: Sequence[Parts], hidden: Sequence[int]) -> list[Parts]:
    # The head, which is last, has no attention.
    return [one | {ATTENTION: one.get(ATTENTION, 0) - out} for one, out in zip(layers, [*hidden, 0], strict=True)]


def flops(
    model_or_config: Any,
    methods: Methods,
    text: int,
    image: int,
    task: str | None = None,
    *,
    before: int = 0,
    labelled: int | None = None,
    multiple: int = 1,
    backward: bool = False,
    counted: bool = False,
    layers: str | None = None,
) -> FlopReport:
    """FLOPs of a sample with one image in one piece: the decoder's layers and its head, 2 for a multiply-add.

    layer = K row + M (k + v) + pairs 4 D, and (T + R) (q + k + v) + 2 R T D where R rows score image tokens

    Args:
        model_or_config: a model, a Hugging Face config, or the path of a config.json; nothing needs weights.
        methods: a method, or task name -> method, as `apply` takes them.
        text: text tokens: system, instruction and output.
        image: image tokens.
        task: which of the methods.
        before: how many of the text tokens stand before the image; by default it comes first.
        labelled: rows that the head of the dropped model runs on, as with `labelled_logits`; all T by default.
        multiple: row counts are rounded up to it, as `apply` does with 64; by default they are exact.
        backward: add the backward, all weights trained; twice the forward, and 10 D for a pair where attention
            recomputes its scores, else 8 D.
        counted: count the operators of a run in place of the formula; for models whose decoder takes `inputs_embeds`.
        layers: dotted path of the decoder's layer list, where inspection finds several.

    Raises:
        LayoutError: token counts that make no sense, or a task that is missing.
        DecoderError: no decoder, or no config of one.
        MethodError: no methods.
        UnsupportedError: layers whose parts inspection does not find, or that the method cannot run in.

    Example:
        >>> from transformers import LlamaConfig
        >>> import tokendrop as td
        >>> config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        ...                      num_attention_heads=4)
        >>> report = flops(config, td.HMGen("1:2"), text=8, image=24)
        >>> report.per_layer[0].dropped == report.per_layer[0].dense, round(report.ratio, 2)
        (True, 0.64)

    Source: ours; checked against the figures of arXiv 2501.10318 and 2403.06764.
    """
    check_flag("backward", backward)
    check_flag("counted", counted)
    layout = _layout(text, image, before, task)
    if counted:
        _check_countable(model_or_config)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _on_cpu(fake) if counted else torch.device("meta"):
        drop = apply(_weightless(model_or_config), methods, layers, multiple)
    drop.in_training = True  # a method for training only is costed as it trains
    _check(drop)
    rows = text + image if labelled is None else round_up(_count("labelled", labelled), text + image, multiple)
    route = (LayerRoute(),) * len(drop.layers)
    plans = Planner(layout, [route], [None], multiple).plan(), drop.plan(layout)
    hidden = [_hidden(drop, plan, backward) for plan in plans]
    if counted:
        with _on_cpu(fake), drop.disabled():
            dense = counted_parts(drop, text + image, text + image, backward)
        with drop.layout(layout), _on_cpu(fake):
            return FlopReport.of(dense, counted_parts(drop, text + image, rows, backward), *hidden)
    dense = _formula(drop, plans[0], route, text + image, backward)
    return FlopReport.of(dense, _formula(drop, plans[1], drop.served(layout)[0][0], rows, backward), *hidden)


@contextmanager
def _on_cpu(fake: FakeTensorMode) -> Generator[None]:
    # Whatever is made elsewhere by default.
    with torch.device("cpu"), fake:
        yield


def _check_countable(model: Any) -> None:
    linears = (base_linear(one) for one in (model.modules() if isinstance(model, nn.Module) else ()) if is_linear(one))
    if packed := next((one for one in linears if not readable(one)), None):
        raise UnsupportedError(
            f"counted=True runs the model without weights, which a quantised {type(packed).__name__} cannot do; use "
            "the formula, counted=False"
        )


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LayoutError(f"{name}={value!r}: expected a number of tokens, 0 or more")
    return value


def _layout(text: int, image: int, before: int, task: str | None) -> TokenLayout:
    total = _count("text", text) + _count("image", image)
    if not 1 <= total <= LARGEST:
        raise LayoutError(f"text={text}, image={image}: expected 1 to {LARGEST} tokens in all")
    if _count("before", before) > text:
        raise LayoutError(f"before={before}: expected at most the {text} text tokens, which it is a part of")
    at = torch.arange(total, device="cpu")[None]
    return TokenLayout((at >= before) & (at < before + image), task, frames=torch.zeros_like(at))


def _weightless(source: Any) -> nn.Module:
    # A copy whose tensors have a shape and no memory; called where tensors are made so.
    model = source if isinstance(source, nn.Module) else model_from_config(source)
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.is_floating_point()) for p in model.parameters()
    }
    memo |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
    # Other tensors, which a forward may have left behind, are copied as they are.
    with unset_fake_temporarily(), torch.device("cpu"):
        made = copy.deepcopy(model, memo)
    for module in [one for one in made.modules() if isinstance(one, Handle)]:
        module.remove()
    return made.eval()  # dropout would change the attention that runs on the CPU


def _check(drop: Handle) -> None:
    if unknown := refusal(drop.decoder_layers, drop.specs):
        raise UnsupportedError(f"FLOPs follow from the linears of a layer, but {unknown}; count a run of your model")


def _hidden(drop: Handle, plan: Plan, backward: bool) -> list[int]:
    """FLOPs of each layer's pairs that no query sees, which `_formula` counts and so does a counter."""
    found, pairs, eager = [], Pairs(plan), drop.backend == "eager"
    for layer, spec, span in zip(drop.decoder_layers, drop.specs, plan.span_of, strict=True):
        (group,), cost = span.groups, LayerCost.of(layer, spec)
        (seen,) = pairs.of(group, cost.window)
        each = cost.pair + (cost.pair_backward if backward else 0)
        found.append((counted_pairs(group, eager) - seen) * each)
    return found


def _formula(drop: Handle, plan: Plan, route: Route, rows: int, backward: bool) -> list[Parts]:
    costs = [LayerCost.of(layer, spec) for layer, spec in zip(drop.decoder_layers, drop.specs, strict=True)]
    eager, times = drop.backend == "eager", 3 if backward else 1
    found = []
    for index, (cost, span, one) in enumerate(zip(costs, plan.span_of, route, strict=True)):
        (group,) = span.groups
        pairs = counted_pairs(group, eager)
        mine, able = _own_rows(group), set("kv") if one.image is Role.CONTEXT else set("qkvo")
        own = mine * sum(({"o": cost.output_row} | dict(cost.letters))[letter] for letter in one.separate & able)
        own_ffn = mine * cost.ffn_row if "ffn" in one.separate and one.image is Role.ACTIVE else 0
        skipped = (group.size - group.ffn_rows) * cost.ffn_row
        parts = {
            PROJECTIONS: times * (group.size * cost.attention_row + group.context_size * cost.context_row - own),
            OWN: times * (own + own_ffn),
            ATTENTION: pairs * (cost.pair + (cost.pair_backward if backward else 0)),
            FFN: times * (group.size * (cost.row - cost.attention_row) - skipped - own_ffn),
            SCORING: 0,
        }
        found.append(parts)
        select = None if group.choice is None or index != span.start else group.choice.select
        if select is not None and select.learned:
            parts[SCORING] += times * 2 * plan.shape[1] * linear_shape(drop.sets(index)[ROUTER])[1]
        if select is not None and select.fuse:
            parts[OWN] += times * fusing_flops(cast(Fusion, drop.sets(index)[FUSION]).linear, plan)
        if select is not None and select.queries is not None:
            # By the layer before or the one that is entered.
            at = index - (select.queries.layer < index)
            found[at][SCORING] += scoring_flops(select, plan, costs[at])
    return [*found, {HEAD: times * rows * head_flops(drop.owner)}]


def _own_rows(group: Group) -> int:
    split = group.split or group.context_split
    if split is None:
        return 0
    return sum(len(rows) for name, rows in zip(split.names, split.rows, strict=True) if name is not None)
