"""FLOPs: counted by an operator-level counter, and by formula.

One multiply-add is 2 FLOPs. Causal attention is counted in full, as every counter does; `hidden` says by how much that
is more than what a kernel computes that skips the pairs no query sees.
Shape letters: B batch, T tokens, K computed rows, M context rows, R scoring rows, D hidden, H heads, L layers.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from tokendrop.analysis.pairs import window_of
from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.ffn import ffn_of
from tokendrop.engine.model.linears import base_linear, is_linear, linear_shape, linears
from tokendrop.engine.plan.plan import Plan
from tokendrop.roles import Select

_cpu = torch.ops.aten
# Of experts, and of packed weights: torch has no formula of theirs; older ones have fewer of the operators.
_PRODUCTS = ("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2", "_scaled_mm_v2", "_int_mm")
_LIKE_A_PRODUCT = re.compile(r"(^|_)([a-z0-9]*mm|gemv|matmul|linear|conv(olution)?(\dd)?|attention|attn)(_|$)")


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _attention_backward(grad: list[int], query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    # The scores once more, and the gradients of values, probabilities, queries and keys.
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (3 * width + 2 * value[3])


def _product(a: list[int], b: list[int], *_: Any, **__: Any) -> int:
    # Groups are of rows, (S, K) (G, K, N), or of what is summed over, (M, S) (S, N): S is that of all of them together;
    # or of columns, (G, M, K) (K, S), each of which meets the rows of its own group only.
    return 2 * prod(a[1:] if len(a) > len(b) else a) * b[-1]


def _product_backward(a: list[int], b: list[int], *_: Any, **__: Any) -> int:
    return 2 * _product(a, b)


_FALLBACKS = {"grouped_mm_fallback": _product, "grouped_mm_fallback_backward": _product_backward}


class _Counter(FlopCounterMode):
    """Names each operator that looks like a product and has no formula, once."""

    def __init__(self, formulas: dict[Any, Callable[..., int]]) -> None:
        super().__init__(display=False, custom_mapping=formulas)
        self._looked_at = set(self.flop_registry)

    @override
    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if func_packet not in self._looked_at:
            self._looked_at.add(func_packet)
            if _LIKE_A_PRODUCT.search(getattr(func_packet, "__name__", "")):
                warnings.warn(
                    f"found {func_packet}, which looks like a product of matrices, and expected a formula of its "
                    "FLOPs; they are counted as 0, so the count and its ratios are wrong by them: give a formula with "
                    "torch.utils.flop_counter.register_flop_formula",
                    stacklevel=2,
                )
        return super()._count_flops(func_packet, out, args, kwargs)


def counter() -> FlopCounterMode:
    """A FLOP counter that also sees attention on the CPU and grouped products, which torch's own counts as zero.

    An operator that looks like a product of matrices and has no formula is counted as zero, too, but with a warning.

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
    formulas |= {getattr(_cpu, name): _product for name in _PRODUCTS if hasattr(_cpu, name)}
    theirs = torch.ops.transformers  # where torch has no kernel; a counter does not see inside
    formulas |= {getattr(theirs, name): formula for name, formula in _FALLBACKS.items() if hasattr(theirs, name)}
    return _Counter(formulas)


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one decoder layer by formula.

    forward(K, M, F) = K * row - (K - F) * ffn_row + M * context_row + K * (K + M) * pair

    Args:
        row: of a computed row in the layer's linears, 2 * weights.
        attention_row: of these, in the linears of its attention.
        letters: of a row in the projections to "q", "k" and "v".
        pair: of a query and a key in attention, 4 * D.
        pair_backward: of a query and a key in the backward, 10 * D where scores are recomputed, else 8 * D.
        trained_row: of `row`, in linears whose weights are trained.
        trained_context_row: of `context_row`, likewise.
        output_row: of `row`, in the output projection of its attention.
        ffn_row: of `row`, in its FFN.
        trained_ffn_row: of `ffn_row`, likewise.
        window: keys that a query sees at most, or None.
    """

    row: int
    attention_row: int
    letters: Mapping[str, int]
    pair: int
    pair_backward: int
    trained_row: int
    trained_context_row: int
    output_row: int
    ffn_row: int
    trained_ffn_row: int
    window: int | None = None

    @property
    def context_row(self) -> int:
        """Of a context row in the key and value projections."""
        return self.letters["k"] + self.letters["v"]

    @classmethod
    def of(cls, layer: nn.Module, spec: LayerSpec) -> "LayerCost":
        """The cost of a layer, from the shapes of its linears."""
        unknown = spec.separate_refusal() is not None
        widths = {"q": 0, "k": 0, "v": 0} if unknown else spec.widths(layer)
        inputs = 0 if unknown else linear_shape(spec.linear(layer, "k"))[1]
        attention, ffn = getattr(layer, spec.attention or "", None), ffn_of(layer)
        trained = [] if unknown else [one for one in "kv" if is_trained(base_linear(spec.linear(layer, one)))]
        return cls(
            row=_linear_flops(layer),
            attention_row=0 if attention is None else _linear_flops(attention),
            letters={letter: 2 * inputs * width for letter, width in widths.items()},
            pair=4 * widths["q"],
            pair_backward=(8 if spec.backend(layer) == "eager" else 10) * widths["q"],
            trained_row=_linear_flops(layer, trained=True),
            trained_context_row=2 * inputs * sum(widths[letter] for letter in trained),
            output_row=0 if spec.output is None else _linear_flops(spec.linear(layer, "o")),
            ffn_row=0 if ffn is None else _linear_flops(ffn),
            trained_ffn_row=0 if ffn is None else _linear_flops(ffn, trained=True),
            window=window_of(attention),
        )

    def forward(self, rows: int, context: int = 0, pairs: int | None = None, attend: int = 0) -> int:
        """FLOPs of the forward of K `rows` that see themselves and M `context` rows, or `pairs` in all.

        `attend` of the rows go without an FFN.
        """
        pairs = rows * (rows + context) if pairs is None else pairs
        return rows * self.row - attend * self.ffn_row + context * self.context_row + pairs * self.pair

    def backward(self, rows: int, context: int = 0, pairs: int | None = None, attend: int = 0) -> int:
        """FLOPs of the backward of the same: the gradient of its input, and of the weights that are trained."""
        pairs = rows * (rows + context) if pairs is None else pairs
        linears = rows * (self.row + self.trained_row) + context * (self.context_row + self.trained_context_row)
        return linears - attend * (self.ffn_row + self.trained_ffn_row) + pairs * self.pair_backward


def is_trained(module: nn.Module) -> bool:
    """Whether a parameter that is its own is trained."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _linear_flops(module: nn.Module, trained: bool = False) -> int:
    return 2 * sum(prod(linear_shape(one)) for one in linears(module) if not trained or is_trained(one))


def refusal(layers: nn.ModuleList, specs: Sequence[LayerSpec]) -> str | None:
    """Why the FLOPs of such layers do not follow from their linears, or None."""
    if any(p.dim() > 2 for p in layers.parameters()):
        return f"{specs[0].layer_class.__name__} holds weights of more than two dimensions, such as experts"
    for layer, spec in zip(layers, specs, strict=True):
        if name := _list_of_linears(layer):
            return (
                f"{spec.layer_class.__name__} holds linears in a list, {name}, as experts or PEFT's modules_to_save "
                "are: nobody knows which run"
            )
    return next(filter(None, (spec.separate_refusal() for spec in specs)), None)


def _list_of_linears(layer: nn.Module) -> str | None:
    """The name of a ModuleList or ModuleDict with linears in it, or None; adapters keep what runs in such, too."""
    known = {id(child) for one in layer.modules() if base_linear(one) is not one for child in one.children()}
    for name, one in layer.named_modules():
        if isinstance(one, nn.ModuleList | nn.ModuleDict) and id(one) not in known and linears(one):
            return name
    return None


def scoring_flops(select: Select, plan: Plan, layer: LayerCost) -> int:
    """FLOPs of the attention that scores the image tokens of a sample, without gradients; 0 where nothing looks.

    (T + R) (q + k + v) + 2 R T D

    Args:
        select: what it scores them for.
        plan: of the forward.
        layer: the cost of the layer whose attention is made.
    """
    if select.queries is None:
        return 0
    tokens, scores = plan.shape[1], plan.scoring[select.queries.rows].index.shape[1]
    return (tokens + scores) * sum(layer.letters.values()) + scores * tokens * layer.pair // 2


def fusing_flops(linear: nn.Module, plan: Plan) -> int:
    """FLOPs of the forward of what fuses a sample's image tokens where a range ends, on all T: 4 T D^2."""
    return 2 * plan.shape[1] * prod(linear_shape(linear))


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
