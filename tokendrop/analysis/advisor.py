"""What to drop: plans that meet a FLOPs budget, ranked by what they do to the loss of a trained model.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tokendrop.analysis.advice import Advice, Plan
from tokendrop.analysis.flops import task_costs
from tokendrop.analysis.memory import saved_bytes
from tokendrop.engine.forward.groups import split_output
from tokendrop.engine.handle import Handle, handle
from tokendrop.engine.inject import apply
from tokendrop.engine.model.decoder import find_layers, layer_spec
from tokendrop.engine.plan.plan import needed_rows
from tokendrop.errors import LayerRangeError, LayoutError, MethodError, UnsupportedError
from tokendrop.layout import TokenLayout
from tokendrop.methods import Drop, FastV, HiMix, HMGen, PyramidDrop, RandomLTD
from tokendrop.roles import Method
from tokendrop.synergy.evaluate import gradients, preserved, shared_parameters

Held = list[tuple[Any, TokenLayout]]
SHARES = tuple(share / 20 for share in range(19, 0, -1))
ROUNDS = 5


def advise(
    model: nn.Module,
    batches: Sequence[Any],
    layout: Callable[[Any], TokenLayout],
    budget: float = 0.5,
    loss: Callable[[Any], Tensor] | None = None,
) -> Advice:
    """Plans for each task that meet a FLOPs budget, those that move the task's loss least first.

    Candidates are HMGen over the adjacent layers in which image tokens change least, RandomLTD, and, where no image
    token is trained, HiMix from a layer on, FastV, Drop and PyramidDrop; each as mild as the budget lets it be.

    Args:
        model: an untouched model, trained: plans are judged by what its layers do now.
        batches: a few, each of one task.
        layout: batch -> TokenLayout.
        budget: FLOPs of decoder and head, forward and backward, over dense ones.
        loss: batch -> scalar; `model(**batch).loss` by default.

    Raises:
        MethodError: a budget outside (0, 1), or one that no plan meets.
        LayoutError: no batches, or one without images or with several tasks.

    Source: ours.
    """
    if not isinstance(budget, float) or not 0 < budget < 1:
        raise MethodError(f"budget={budget!r}: expected a share of the dense FLOPs, above 0 and below 1")
    loss_of = loss or (lambda batch: model(**batch).loss)
    by_task: dict[str, Held] = {}
    for batch in batches:
        made = layout(batch)
        if len(set(made.tasks)) > 1 or not made.image.any():
            raise LayoutError(
                f"a batch of the tasks {sorted(set(map(str, made.tasks)))} with {int(made.image.sum())} image tokens; "
                "expected one task and images in each"
            )
        by_task.setdefault(made.tasks[0] or "all", []).append((batch, made))
    if not by_task:
        raise LayoutError("no batches; give a few of each task")
    tries = {task: Trials(model, task, held, loss_of) for task, held in by_task.items()}
    plans = {task: one.ranked(budget) for task, one in tries.items()}
    costs = {task: one.cost(plans[task][0].method) for task, one in tries.items()}
    seconds, memory = ({task: cost[at] for task, cost in costs.items()} for at in (0, 1))
    return Advice(budget, plans, {task: one.redundancy for task, one in tries.items()}, seconds, memory)


class Trials:
    """A task's batches, on which methods are tried.

    Args:
        model: untouched, and so again after each trial.
        task: its name.
        held: batches with their layouts.
        loss: batch -> scalar.
    """

    def __init__(self, model: nn.Module, task: str, held: Held, loss: Callable[[Any], Tensor]) -> None:
        self.model, self.task, self.held, self.loss = model, task, held, loss
        self.layers = find_layers(model, None)[1]
        self.redundancy = self._redundancy()
        self.generates = any(bool((x.image & needed_rows(x)).any()) for _, x in held)

    @contextmanager
    def under(self, method: Method | None) -> Generator[Handle | None]:
        """The model under a method inside, and as it was again."""
        drop = None if method is None else apply(self.model, {self.task: method})
        if drop is not None:
            drop.in_training = True  # plans are for training, whatever mode the model is in
        try:
            with preserved(self.model):
                yield drop
        finally:
            if drop is not None:
                drop.remove()

    def ranked(self, budget: float) -> tuple[Plan, ...]:
        """The plans that meet the budget, those that move the loss least first.

        Raises:
            MethodError: there is none.
        """
        found = list(self._candidates(lambda method: self._flops(method) <= budget))
        if not found:
            raise MethodError(f"budget={budget!r}: no plan for task {self.task!r} costs so little; ask for more")
        dense = self.gradients(None)
        return tuple(sorted((self.plan(method, dense) for method in found), key=lambda plan: plan.loss_gap))

    def _candidates(self, fits: Callable[[Method], bool]) -> Iterator[Method]:
        depth = len(self.layers)
        quarter, half = max(1, depth // 4), max(1, depth // 2)
        kinds: list[Iterable[Method]] = [map(self._calm, range(1, depth + 1)), (RandomLTD("1:-1", x) for x in SHARES)]
        if not self.generates:
            starts = sorted({1, 2, quarter, half} & set(range(depth)))
            stages = tuple(sorted({quarter, half, 3 * depth // 4}))
            kinds.append(HiMix(f"{start}:") for start in reversed(range(depth)))
            kinds += [[Drop(f"{start}:", x, "leverage", "gone") for x in SHARES] for start in (0, *starts)]
            kinds += [[FastV(start, x) for x in SHARES] for start in starts]
            powers = range(1, len(stages) + 1)
            kinds.append(PyramidDrop(stages, tuple(max(0.001, round(x**n, 3)) for n in powers)) for x in SHARES)
        for kind in kinds:
            # Each kind goes from mild to severe.
            mildest = next((method for method in kind if fits(method)), None)
            if mildest is not None:
                yield mildest

    def _calm(self, count: int) -> HMGen:
        change = self.redundancy
        start = max(range(len(change) - count + 1), key=lambda at: mean(change[at : at + count]))
        return HMGen(f"{start}:{start + count}")

    def _flops(self, method: Method) -> float:
        try:
            with self.under(method):
                drop, ratios = handle(self.model), []
                for _, layout in self.held:
                    with drop.layout(layout) as plan:
                        (cost,) = task_costs(drop, plan, (self.task,) * len(layout.tasks)).values()
                        ratios.append(cost.flops_ratio)
                return mean(ratios)
        except (UnsupportedError, LayerRangeError, LayoutError):
            return float("inf")  # such a decoder or such labels cannot have it

    def gradients(self, method: Method | None) -> list[tuple[float, list[Tensor]]]:
        """The loss of each batch under a method, and its gradient."""
        parameters = shared_parameters(self.model)
        with self.under(method) as drop:
            found = []
            for batch, layout in self.held:
                with nullcontext() if drop is None else drop.layout(layout, step=(0, 0)):
                    value = self.loss(batch)
                    found.append((value.item(), gradients(value, parameters, self.task)))
            return found

    def plan(self, method: Method, dense: list[tuple[float, list[Tensor]]]) -> Plan:
        """What a method does, beside the dense losses and gradients."""
        dropped = self.gradients(method)
        gaps = [a - b for (a, _), (b, _) in zip(dropped, dense, strict=True)]
        cosines = [_cosine(a, b) for (_, a), (_, b) in zip(dropped, dense, strict=True)]
        return Plan(method, self._flops(method), mean(gaps), mean(cosines))

    def cost(self, method: Method) -> tuple[float, float]:
        """Seconds of a step and bytes kept for its backward, over those of a dense step, on the first batch."""
        (batch, layout), *_ = self.held
        seconds: dict[Method | None, list[float]] = {None: [], method: []}
        kept: dict[Method | None, int] = {}
        for turn in range(1 + ROUNDS):
            for one, spent in seconds.items():
                with self.under(one) as drop, nullcontext() if drop is None else drop.layout(layout, step=(0, 0)):
                    if turn == 0:
                        kept[one] = saved_bytes(lambda: self.loss(batch), self.model.parameters())
                    spent.append(_seconds(lambda: gradients(self.loss(batch), shared_parameters(self.model), "")))
        ratios = [a / b for a, b in zip(seconds[method][1:], seconds[None][1:], strict=True)]
        return median(ratios), kept[method] / kept[None]

    @torch.no_grad()
    def _redundancy(self) -> tuple[float, ...]:
        found: list[list[float]] = [[] for _ in self.layers]
        spec = layer_spec(self.layers[0], type(self.layers[0]))

        def look(index: int, _: Any, args: Any, kwargs: Any, out: Any) -> None:
            before, after = spec.bind(args, kwargs)[0], split_output(out)[0]
            found[index].append(cosine_similarity(before[image].float(), after[image].float(), dim=-1).mean().item())

        hooks = [
            layer.register_forward_hook(partial(look, at), with_kwargs=True) for at, layer in enumerate(self.layers)
        ]
        try:
            with preserved(self.model):
                for batch, layout in self.held:
                    image = layout.image
                    self.loss(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(map(mean, found))


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
        return sum((p.double() * q.double()).sum().item() for p, q in zip(x, y, strict=True))

    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


def _seconds(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
