"""FLOPs that a planned batch spends, by formula, for each task.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn

from tokendrop.analysis.flops import (
    LayerCost,
    fusing_flops,
    head_flops,
    is_trained,
    output_head,
    refusal,
    scoring_flops,
)
from tokendrop.analysis.pairs import Pairs, counted_pairs
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.linears import base_linear, is_linear, linear_shape, linears
from tokendrop.engine.model.sets import FUSION, ROUTER, Fusion
from tokendrop.engine.plan.labelled import labelled_rows
from tokendrop.engine.plan.plan import Plan, Span
from tokendrop.roles import Select


@dataclass(frozen=True)
class TaskCost:
    """What the samples of one task cost in a batch, dropped and dense.

    Args:
        token_layers: computed rows, summed over layers and samples.
        dense_token_layers: T * L for each sample.
        flops: forward and backward of the decoder and its head.
        dense_flops: the same without dropping.
        forward: of `flops`, those of the forward.
    """

    token_layers: int = 0
    dense_token_layers: int = 0
    flops: int = 0
    dense_flops: int = 0
    forward: int = 0

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


Pass = tuple[int, int]  # forward and backward


@dataclass(frozen=True)
class _Costs:
    """The costs of a dropped model.

    Args:
        layers: of each of the L layers.
        entered: whether what enters it has a gradient: whether something before it is trained.
        reached: whether its gradient is made: whether something in it is trained, too.
        head: of a row in the forward of the output head.
        head_backward: in its backward.
        refusal: why these are not what the layers cost, or None.
    """

    layers: list[LayerCost]
    entered: list[bool]
    reached: list[bool]
    head: int
    head_backward: int
    refusal: str | None

    def run(self, start: int, stop: int, *rows: Any) -> tuple[int, int]:
        """Forward and backward of layers `start` to `stop`, on rows as `LayerCost.forward` takes them."""
        layers, reached = self.layers[start:stop], self.reached[start:stop]
        forward = sum(layer.forward(*rows) for layer in layers)
        made = (layer.backward(*rows) for layer, one in zip(layers, reached, strict=True) if one)
        return forward, sum(made)

    def hidden(self, start: int, stop: int, counted: int, seen: Callable[[int | None], list[int]]) -> list["Pass"]:
        """Of each sample, what layers `start` to `stop` are counted for pairs beyond those `seen` through a window."""
        found: list[Pass] = []
        for layer, reached in zip(self.layers[start:stop], self.reached[start:stop], strict=True):
            each = [counted - one for one in seen(layer.window)]
            found = found or [(0, 0)] * len(each)
            back = layer.pair_backward if reached else 0
            found = [(a + n * layer.pair, b + n * back) for (a, b), n in zip(found, each, strict=True)]
        return found


def task_costs(handle: Handle, plan: Plan, tasks: tuple[str | None, ...]) -> dict[str | None, TaskCost]:
    """What a planned step costs, by formula, for each task.

    The backward is that of the weights that are trained now. What activation checkpointing runs again, the vision
    encoder and the optimizer are no part of it. Its FLOPs say nothing where `unknown_flops` gives a reason.

    Args:
        handle: of the dropped model.
        plan: of its layout.
        tasks: of the B samples.

    Returns:
        Task -> cost of its samples.
    """
    tokens, depth = plan.shape[1], len(plan.span_of)
    made = _costs(handle)
    eager = handle.backend == "eager" or None  # its attention is never split
    dense = tokens * (made.head + made.head_backward) + sum(made.run(0, depth, tokens))
    # Labelled rows of all samples run together, rounded up once.
    headed = tokens if not handle.labelled_logits else labelled_rows(plan, handle.multiple) / plan.shape[0]
    ahead, back = round(made.head * headed), round(made.head_backward * headed)
    costs = dict.fromkeys(tasks, TaskCost())
    for task in tasks:
        costs[task] += TaskCost(0, tokens * depth, ahead + back, dense, ahead)
    looked = set()
    for span in plan.spans:
        routed, learning = _routing(made, handle, plan, span)
        for group in span.groups:
            pairs = group.pairs if eager is None else None
            attend = group.size - group.ffn_rows
            forward, backward = made.run(span.start, span.stop, group.size, group.context_size, pairs, attend)
            # A span cut by another task's goes on with the same tokens.
            choice, forward = None if group.choice is None else (group.choice.select, group.members), forward + routed
            if choice is not None and choice not in looked:
                looked.add(choice)
                forward += _looking(made, plan, choice[0], span.start)
                fused = _fusing(made, handle, plan, choice[0])
                forward, backward = forward + fused[0], backward + fused[1]
            rows = group.size * (span.stop - span.start)
            for member in group.members:
                costs[tasks[member]] += TaskCost(rows, 0, forward + backward + learning, 0, forward)
    return costs


def hidden_flops(handle: Handle, plan: Plan) -> tuple[list[Pass], list[Pass]]:
    """Of each of B samples, FLOPs counted for pairs of attention that no query sees: under the methods, and dense.

    Without them, causal attention is counted as computed, by half.

    Args:
        handle: of the dropped model.
        plan: of its layout.
    """
    made, pairs, (batch, tokens) = _costs(handle), Pairs(plan), plan.shape
    found = [(0, 0)] * batch
    for span in plan.spans:
        for group in span.groups:
            counted = counted_pairs(group, handle.backend == "eager")
            hidden = made.hidden(span.start, span.stop, counted, lambda window, of=group: pairs.of(of, window))
            for member, (ahead, back) in zip(group.members, hidden, strict=True):
                found[member] = found[member][0] + ahead, found[member][1] + back
    return found, made.hidden(0, len(plan.span_of), tokens * tokens, pairs.dense)


def unknown_flops(handle: Handle) -> str | None:
    """Why nothing is known of the FLOPs of a dropped model, or None."""
    return _costs(handle).refusal


def _routing(costs: _Costs, handle: Handle, plan: Plan, span: Span) -> tuple[int, int]:
    """Forward and backward of the router at the entry of a span, which runs on all samples of the batch."""
    added = handle.sets(span.start)
    if not span.selects or ROUTER not in added:
        return 0, 0
    once = 2 * plan.shape[1] * linear_shape(added[ROUTER])[1]
    learns = any(group.choice is not None and group.choice.select.learned for group in span.groups)
    return once, once * (costs.entered[span.start] + is_trained(added[ROUTER])) if learns else 0


def _fusing(costs: _Costs, handle: Handle, plan: Plan, select: Select) -> Pass:
    """Forward and backward of what fuses a sample's tokens where a selection ends."""
    if not select.fuse:
        return 0, 0
    fusion = cast(Fusion, handle.sets(select.layer)[FUSION])
    once = fusing_flops(fusion.linear, plan)
    inside = [span for span in plan.spans for one in span.groups if one.choice and one.choice.select == select]
    flows = costs.reached[inside[-1].stop - 1] or any(p.requires_grad for p in fusion.parameters())
    return once, once * (flows + is_trained(fusion.linear))


def _looking(costs: _Costs, plan: Plan, select: Select, layer: int) -> int:
    """What scores the tokens of a sample that a selection at the entry of a layer keeps."""
    before = select.queries is not None and select.queries.layer < layer
    return scoring_flops(select, plan, costs.layers[layer - before])


_known: WeakKeyDictionary[Handle, tuple[tuple[bool, ...], _Costs]] = WeakKeyDictionary()


def _costs(handle: Handle) -> _Costs:
    # Weights are frozen and unfrozen as training goes on.
    trained = tuple(p.requires_grad for p in handle.owner.parameters())
    if handle not in _known or _known[handle][0] != trained:
        _known[handle] = trained, _found(handle)
    return _known[handle][1]


def _found(handle: Handle) -> _Costs:
    owner, layers = handle.owner, handle.decoder_layers
    entered: list[bool] = []
    reached: list[bool] = []
    flows = _trained_before(handle)
    for layer, added in zip(layers, handle.layers, strict=True):
        entered.append(flows)
        # A router and a fusion work on what comes out of a layer.
        inside = [layer, *(part for name, part in cast(nn.ModuleDict, added).items() if name not in (ROUTER, FUSION))]
        flows = flows or any(p.requires_grad for part in inside for p in part.parameters())
        reached.append(flows)
        flows = flows or any(p.requires_grad for p in added.parameters())
    flows = flows or any(p.requires_grad for module, tail in _readers(handle) if tail for p in module.parameters())
    head, once = output_head(owner), head_flops(owner)
    own = head is not None and is_trained(base_linear(head))
    costs = [LayerCost.of(layer, spec) for layer, spec in zip(layers, handle.specs, strict=True)]
    return _Costs(costs, entered, reached, once, once * (flows + own), refusal(layers, handle.specs))


def _trained_before(handle: Handle) -> bool:
    """Whether something before the decoder's layers is trained, so that a gradient passes through all of them."""
    owner, head = handle.owner, output_head(handle.owner)
    behind = [handle, handle.decoder_layers, *(module for module, _ in _readers(handle))]
    rest = {id(p) for module in [*behind, *([] if head is None else [head])] for p in module.parameters()}
    # A weight tied to a head's is an embedding's, too.
    rest -= {id(p) for module in owner.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return any(p.requires_grad and id(p) not in rest for p in owner.parameters())


def _readers(handle: Handle) -> list[tuple[nn.Module, bool]]:
    """Modules that read what the layers make; and whether each stands behind them in their stack, before a head.

    Others may feed the layers. Whether they do nobody knows before a forward, which may be one without images; shapes
    tell more of it than order does, as vision towers and projectors are registered on either side of a decoder.
    """
    at, stack = handle.owner, handle.owner.get_submodule(handle.path.rpartition(".")[0])
    first = next(iter(linears(handle.decoder_layers[0])), None)
    width = 0 if first is None else linear_shape(first)[1]
    found: list[tuple[nn.Module, bool]] = []
    for name in handle.path.split("."):
        tail = False
        for key, child in at.named_children():
            if key == name:
                tail = at is stack
            elif _reads(child, width, tail):
                found.append((child, tail))
        at = at.get_submodule(name)
    return found


def _reads(module: nn.Module, width: int, tail: bool) -> bool:
    """Whether a module takes states of a width and gives none; behind the layers of a stack it may, as a norm does."""
    shapes = []
    for one in module.modules():
        if base_linear(one) is one and is_linear(one):
            shapes.append(linear_shape(one))
        elif any(p.dim() > 1 for p in one.parameters(recurse=False)):
            shapes.append((0, 0))  # an embedding or a convolution
    return shapes[0][1] == width and (tail or shapes[-1][0] != width) if shapes else tail
