"""FLOPs: counted by an operator-level counter, and by formula.

One multiply-add is 2 FLOPs. Causal attention is counted in full, as every counter does.
Shape letters: B batch, T tokens, K computed rows, M context rows, D hidden, H heads, L layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokendrop.engine.handle import Handle
from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.linears import is_linear, linear_shape, linear_sizes
from tokendrop.engine.plan.labelled import labelled_rows
from tokendrop.engine.plan.plan import Plan

_cpu = torch.ops.aten


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _attention_backward(grad: list[int], query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    # The scores once more, and the gradients of values, probabilities, queries and keys.
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (3 * width + 2 * value[3])


def counter() -> FlopCounterMode:
    """A FLOP counter that also sees attention on the CPU, which torch's own counts as zero.

    Example:
        >>> with counter() as counted:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> counted.get_total_flops()
        60

    Source: ours; attention by the conventions of torch.utils.flop_counter.
    """
    formulas: dict[Any, Callable[..., int]] = {
        _cpu._scaled_dot_product_flash_attention_for_cpu: _attention,
        _cpu._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one decoder layer by formula.

    forward(K, M) = K * row + M * context_row + K * (K + M) * pair

    Args:
        row: of a computed row in the layer's linears, 2 * weights.
        attention_row: of these, in the linears of its attention.
        letters: of a row in the projections to "q", "k" and "v".
        pair: of a query and a key in attention, 4 * D.
        pair_backward: of a query and a key in the backward, 10 * D where scores are recomputed, else 8 * D.
    """

    row: int
    attention_row: int
    letters: Mapping[str, int]
    pair: int
    pair_backward: int

    @property
    def context_row(self) -> int:
        """Of a context row in the key and value projections."""
        return self.letters["k"] + self.letters["v"]

    @classmethod
    def of(cls, layer: nn.Module, spec: LayerSpec) -> "LayerCost":
        """The cost of a layer, from the shapes of its linears."""
        widths = {"q": 0, "k": 0, "v": 0} if spec.separate_refusal() else spec.widths(layer)
        inputs = 0 if spec.separate_refusal() else linear_shape(spec.linear(layer, "k"))[1]
        attention = getattr(layer, spec.attention or "", None)
        return cls(
            row=_linear_flops(layer),
            attention_row=0 if attention is None else _linear_flops(attention),
            letters={letter: 2 * inputs * width for letter, width in widths.items()},
            pair=4 * widths["q"],
            pair_backward=(8 if spec.backend(layer) == "eager" else 10) * widths["q"],
        )

    def forward(self, rows: int, context: int = 0, pairs: int | None = None) -> int:
        """FLOPs of the forward of K `rows` that see themselves and M `context` rows, or `pairs` in all."""
        pairs = rows * (rows + context) if pairs is None else pairs
        return rows * self.row + context * self.context_row + pairs * self.pair

    def backward(self, rows: int, context: int = 0, pairs: int | None = None) -> int:
        """FLOPs of the backward of the same, all weights trained."""
        pairs = rows * (rows + context) if pairs is None else pairs
        return 2 * (rows * self.row + context * self.context_row) + pairs * self.pair_backward


def _linear_flops(module: nn.Module) -> int:
    return 2 * sum(prod(size) for size in linear_sizes(module))


@dataclass(frozen=True)
class TaskCost:
    """What the samples of one task cost in a batch, dropped and dense.

    Args:
        token_layers: computed rows, summed over layers and samples.
        dense_token_layers: T * L for each sample.
        flops: forward and backward of the decoder and its head.
        dense_flops: the same without dropping.
    """

    token_layers: int = 0
    dense_token_layers: int = 0
    flops: int = 0
    dense_flops: int = 0

    @property
    def kept_ratio(self) -> float:
        """Computed token-layers over dense token-layers."""
        return self.token_layers / self.dense_token_layers

    @property
    def flops_ratio(self) -> float:
        """FLOPs over dense FLOPs."""
        return self.flops / self.dense_flops

    def __add__(self, other: "TaskCost") -> "TaskCost":
        return TaskCost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def task_costs(handle: Handle, plan: Plan, tasks: tuple[str | None, ...]) -> dict[str | None, TaskCost]:
    """What a planned step costs, by formula, for each task.

    Args:
        handle: of the dropped model.
        plan: of its layout.
        tasks: of the B samples.

    Returns:
        Task -> cost of its samples.
    """
    tokens, depth = plan.shape[1], len(plan.span_of)
    layers, head = _costs(handle)
    eager = handle.backend == "eager" or None  # its attention is never split
    dense = tokens * 3 * head + sum(layer.forward(tokens) + layer.backward(tokens) for layer in layers)
    # Labelled rows of all samples run together, rounded up once.
    headed = tokens if not handle.labelled_logits else labelled_rows(plan, handle.multiple) / plan.shape[0]
    costs = dict.fromkeys(tasks, TaskCost())
    for task in tasks:
        costs[task] += TaskCost(0, tokens * depth, round(3 * head * headed), dense)
    for span in plan.spans:
        for group in span.groups:
            rows, context = group.size, group.context_size
            pairs, run = group.pairs if eager is None else None, layers[span.start : span.stop]
            one = sum(layer.forward(rows, context, pairs) + layer.backward(rows, context, pairs) for layer in run)
            for member in group.members:
                costs[tasks[member]] += TaskCost(rows * len(run), 0, one, 0)
    return costs


_known: WeakKeyDictionary[Handle, tuple[list[LayerCost], int]] = WeakKeyDictionary()


def _costs(handle: Handle) -> tuple[list[LayerCost], int]:
    if handle not in _known:
        pairs = zip(handle.decoder_layers, handle.specs, strict=True)
        _known[handle] = [LayerCost.of(layer, spec) for layer, spec in pairs], head_flops(handle.owner)
    return _known[handle]


def head_flops(model: nn.Module) -> int:
    """FLOPs of a row in the forward of the output head, 2 * weights; 0 where the model has none."""
    head = output_head(model)
    if head is None:
        return 0
    return 2 * (prod(linear_shape(head)) if is_linear(head) else cast(torch.Tensor, head.weight).numel())


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head of a Hugging Face model anywhere in `model`, or None."""
    for module in model.modules():
        find = getattr(module, "get_output_embeddings", None)
        head = find() if callable(find) else None
        if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), torch.Tensor):
            return head
    return None
