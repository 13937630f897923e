"""What to drop: plans that meet a FLOPs budget, ranked by what they do to the loss of a trained model.

Shape letters: B batch, T tokens, D hidden, L layers.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from math import nan
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tokendrop.analysis.advice import Advice, Plan
from tokendrop.analysis.flops import refusal
from tokendrop.analysis.memory import saved_bytes
from tokendrop.analysis.spent import task_costs
from tokendrop.analysis.subject import Subject
from tokendrop.engine.forward.groups import split_output
from tokendrop.engine.handle import Handle
from tokendrop.engine.inject import apply, handle
from tokendrop.engine.model.decoder import find_layers, layer_spec, layer_specs
from tokendrop.engine.plan.plan import needed_rows
from tokendrop.errors import AppliedError, LayerRangeError, LayoutError, MethodError, TaskLossError, UnsupportedError
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
    layers: str | None = None,
) -> Advice:
    """Plans for each task that meet a FLOPs budget, those that move the task's loss least, up or down, first.

    Candidates are HMGen over the adjacent layers in which image tokens change least, RandomLTD, and, where no image
    token is trained, HiMix from a layer on, FastV, Drop and PyramidDrop; each as mild as the budget lets it be.

    Args:
        model: an untouched model, trained: plans are judged by what its layers do now.
        batches: a few, each of one task; put on the model's device.
        layout: batch -> TokenLayout.
        budget: FLOPs of decoder and head, forward and backward, over dense ones.
        loss: batch -> scalar; by default as `attention_allocation` runs a model.
        layers: dotted path of the decoder's layer list, where inspection finds several.

    Raises:
        AppliedError: a dropped model.
        MethodError: a budget outside (0, 1), or one that no plan meets.
        LayoutError: no batches, or one without images or with several tasks.
        TaskLossError: a dense loss or gradient of which nothing can be said.
        UnsupportedError: layers whose FLOPs do not follow from their linears, such as experts.

    Source: ours.
    """
    check_budget(budget)
    subject = Subject(model, batches, layout, loss, layers)
    if any(isinstance(one, Handle) for one in model.modules()):
        raise AppliedError(f"{type(model).__name__} is dropped already; call remove() on its handle before advising")
    if not any(one.requires_grad for one in model.parameters()):
        raise TaskLossError(
            f"{type(model).__name__} has no trained parameter, and gradients are compared; unfreeze some"
        )
    stack = find_layers(model, layers)[1]
    if unknown := refusal(stack, layer_specs(stack)):
        raise UnsupportedError(
            f"a budget is of FLOPs, which follow from the linears of a layer, but {unknown}; choose a method "
            "yourself and measure it with td.benchmark, which counts a run"
        )
    by_task: dict[str, Held] = {}
    for batch, made in subject.held():
        if len(set(made.tasks)) > 1 or not made.image.any():
            raise LayoutError(
                f"found a batch of the tasks {sorted(set(map(str, made.tasks)))} with {int(made.image.sum())} image "
                "tokens; a plan is judged on batches of one task with images: give each task batches of its own"
            )
        by_task.setdefault(made.tasks[0] or "all", []).append((batch, made))
    tries = {task: Trials(subject, task, held) for task, held in by_task.items()}
    plans = {task: one.ranked(budget) for task, one in tries.items()}
    return Advice(budget, plans, {task: one.redundancy for task, one in tries.items()}, layers)


def check_budget(budget: object) -> None:
    """Refuse what is no share of the dense FLOPs.

    Raises:
        MethodError: with the value.
    """
    if not isinstance(budget, float) or not 0 < budget < 1:
        raise MethodError(f"budget={budget!r}: expected a share of the dense FLOPs, above 0 and below 1")


class Trials:
    """A task's batches, on which methods are tried.

    Args:
        subject: its model is untouched, and so again after each trial.
        task: its name.
        held: batches with their layouts.
    """

    def __init__(self, subject: Subject, task: str, held: Held) -> None:
        self.model, self.task, self.held, self.loss = subject.model, task, held, subject.loss_of
        self.path, self.layers = subject.layers, find_layers(self.model, subject.layers)[1]
        self.redundancy = self._redundancy()
        self.generates = any(bool((x.image & needed_rows(x)).any()) for _, x in held)

    @contextmanager
    def under(self, method: Method | None) -> Generator[Handle | None]:
        """The model under a method inside, and as it was again."""
        drop = None if method is None else apply(self.model, {self.task: method}, layers=self.path)
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
        plans = self.plans(found)
        if not plans:
            raise MethodError(f"budget={budget!r}: under no plan for task {self.task!r} is the loss a finite number")
        return tuple(sorted(plans, key=lambda plan: abs(plan.loss_gap)))

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

    def plans(self, methods: Sequence[Method]) -> list[Plan]:
        """What each of some methods does; those under which the loss is no finite number are left out.

        Raises:
            TaskLossError: the dense loss is none, or has no gradient.
        """
        dense = self._gradients(None)
        if any(all(not one.any() for one in gradient) for _, gradient in dense):
            raise TaskLossError(f"the dense loss of task {self.task!r} has a gradient of zeros; nothing compares to it")
        effects = []
        for method in methods:
            try:
                dropped = self._gradients(method)
            except TaskLossError:
                continue
            pairs = list(zip(dropped, dense, strict=True))
            gap, fidelity = mean(a - b for (a, _), (b, _) in pairs), mean(_cosine(a, b) for (_, a), (_, b) in pairs)
            effects.append((method, self._flops(method), gap, fidelity))
        costs = self._costs([method for method, *_ in effects])
        return [Plan(*effect, *cost) for effect, cost in zip(effects, costs, strict=True)]

    def _gradients(self, method: Method | None) -> list[tuple[float, list[Tensor]]]:
        parameters = shared_parameters(self.model)
        with self.under(method) as drop:
            found = []
            for batch, layout in self.held:
                with nullcontext() if drop is None else drop.layout(layout, step=(0, 0)):
                    value = self.loss(batch)
                    gradient = gradients(value, parameters, self.task)  # refuses what is no finite number
                    found.append((value.item(), gradient))
            return found

    def _costs(self, methods: Sequence[Method]) -> list[tuple[float, float]]:
        """Seconds of a step and bytes kept for its backward, over those of a dense step, on the first batch."""
        (batch, layout), *_ = self.held
        tried = (None, *methods)
        seconds: list[list[float]] = [[] for _ in tried]
        kept = [0 for _ in tried]
        for turn in range(1 + ROUNDS):
            for at, one in enumerate(tried):
                with self.under(one) as drop, nullcontext() if drop is None else drop.layout(layout, step=(0, 0)):
                    if turn == 0:
                        kept[at] = saved_bytes(lambda: self.loss(batch), self.model.parameters())
                    seconds[at].append(_seconds(self._step, batch))
        dense = seconds[0][1:]
        ratios = [median(a / b for a, b in zip(spent[1:], dense, strict=True)) for spent in seconds[1:]]
        return list(zip(ratios, (one / kept[0] for one in kept[1:]), strict=True))

    def _step(self, batch: Any) -> None:
        gradients(self.loss(batch), shared_parameters(self.model), self.task)

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

    length = (dot(a, a) * dot(b, b)) ** 0.5
    return dot(a, b) / length if length else nan


def _seconds(step: Callable[[Any], None], batch: Any) -> float:
    _wait()
    started = time.perf_counter()
    step(batch)
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    # An accelerator still works on what was asked for before.
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
