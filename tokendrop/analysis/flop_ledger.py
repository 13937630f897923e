"""FLOPs counted operator by operator, and booked under the layer and the part that they belong to.

Shape letters: B batch, T tokens, D hidden.
"""

import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from tokendrop.analysis.flops import counter, output_head
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.linears import is_linear, linear_shape
from tokendrop.engine.model.sets import Router
from tokendrop.errors import UnsupportedError

PROJECTIONS, OWN, ATTENTION, FFN, SCORING, HEAD = PARTS = (
    "projections",
    "image-only projections",
    "attention",
    "FFN",
    "scoring",
    "head",
)
Parts = dict[str, int]


class _Ledger:
    """FLOPs by layer and part: what runs inside a module is its label's, and so is the backward of that."""

    def __init__(self, count: FlopCounterMode) -> None:
        self.count, self.labels, self.known = count, [(-1, "")], 0
        self.cells: Counter[tuple[int, str]] = Counter()
        self.hooks: list[RemovableHandle] = []

    def settle(self) -> None:
        """Book what was counted since the last time under the label that it ran under."""
        total = self.count.get_total_flops()
        self.cells[self.labels[-1]] += total - self.known
        self.known = total

    def watch(self, module: nn.Module, layer: int, part: str) -> None:
        """Give all that runs inside a module a label."""

        def begin(*_: Any) -> None:
            self.settle()
            # Only rows that score image tokens run without gradients.
            self.labels.append((layer, part if torch.is_grad_enabled() else SCORING))

        def end(*_: Any) -> None:
            self.settle()
            self.labels.pop()

        self.hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]

    def packed(self, saved: Tensor) -> tuple[Tensor, tuple[int, str]]:
        """A tensor saved for the backward of an operator, with the label of its forward."""
        return saved, self.labels[-1]

    def unpacked(self, saved: tuple[Tensor, tuple[int, str]]) -> Tensor:
        """The same, where that backward begins."""
        self.settle()
        self.labels[-1] = saved[1]
        return saved[0]


def _watched(drop: Handle, ledger: _Ledger) -> None:
    for index, layer in enumerate(drop.decoder_layers):
        for name, module in layer.named_modules():
            if is_linear(module):
                inside = name.partition(".")[0] == drop.spec.attention
                ledger.watch(module, index, PROJECTIONS if inside else FFN)
            elif name == drop.spec.attention:
                ledger.watch(module, index, ATTENTION)
        for module in drop.sets(index).modules():
            if is_linear(module):
                ledger.watch(module, index, SCORING if isinstance(module, Router) else OWN)


def counted_parts(drop: Handle, tokens: int, rows: int, backward: bool) -> list[Parts]:
    """FLOPs of a run, by layer and part, and last those of the head; the model's tensors are fake.

    Args:
        drop: of a model whose decoder takes `inputs_embeds`, inside a layout or disabled.
        tokens: T, of the one sample.
        rows: of the head.
        backward: run the backward too.

    Raises:
        UnsupportedError: a decoder that takes no `inputs_embeds`.

    Source: ours; operators by the conventions of torch.utils.flop_counter.
    """
    decoder, head = drop.owner.get_submodule(drop.path.rpartition(".")[0]), output_head(drop.owner)
    if "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
        raise UnsupportedError(
            f"{type(decoder).__name__}.forward takes no inputs_embeds; use the formula, counted=False"
        )
    width = linear_shape(drop.spec.linear(drop.decoder_layers[0], "k"))[1]
    states, count = torch.empty(1, tokens, width, requires_grad=True), counter()
    ledger = _Ledger(count)
    _watched(drop, ledger)
    with count, saved_tensors_hooks(ledger.packed, ledger.unpacked), torch.enable_grad():
        # With a cache, which the engine leaves out of training, transformers looks for no borders of packed sequences.
        out = decoder(inputs_embeds=states, use_cache=True)[0]
        if head is not None:
            ledger.watch(head, len(drop.layers), HEAD)
            out = head(out[:, :rows])
        if backward:
            out.sum().backward()
    ledger.settle()
    for hook in ledger.hooks:
        hook.remove()
    found: list[Parts] = [{} for _ in range(len(drop.layers) + 1)]
    for (layer, part), cost in ledger.cells.items():
        if layer >= 0:  # not of rotary tables, or of a score's own arithmetic
            found[layer][part] = cost
    return found
