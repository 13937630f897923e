"""Steps of somebody's model, dense or under a method: run, counted and timed.

Shape letters: none.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tokendrop.analysis.equality import under
from tokendrop.analysis.flops import counter
from tokendrop.analysis.memory import saved_bytes
from tokendrop.analysis.spent import task_costs
from tokendrop.analysis.subject import Subject
from tokendrop.analysis.timing import now, peak_bytes
from tokendrop.engine.handle import Handle
from tokendrop.engine.support import Methods
from tokendrop.errors import MethodError, TaskLossError
from tokendrop.layout import TokenLayout
from tokendrop.synergy.evaluate import preserved

PARTS = ("forward", "backward", "step")
Held = Sequence[tuple[Any, TokenLayout]]


@contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Training mode inside; then modes, weights, gradients, buffers and random state as they were.

    A model in training mode may hold parts in eval mode, which stay in it.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [one for one in model.parameters() if one.requires_grad]
    weights, grads = [one.detach().to("cpu", copy=True) for one in trained], [one.grad for one in trained]
    if not model.training:
        model.train()
    for one in trained:
        one.grad = None
    try:
        with preserved(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for one, weight, grad in zip(trained, weights, grads, strict=True):
                one.copy_(weight)
                one.grad = grad


@contextmanager
def work(
    subject: Subject,
    held: Held,
    methods: Methods | None,
    options: Mapping[str, Any],
    optimizer: Callable[..., Optimizer] | None,
) -> Generator["Work"]:
    """The model under methods, ready to work; None leaves it dense.

    Args:
        subject: its model is untouched.
        held: batches on its device, with their layouts.
        methods: as `apply` takes them.
        options: of `apply`.
        optimizer: parameters -> optimizer.

    Raises:
        MethodError: an optimizer that is none.
    """
    with under(subject.model, methods, options) as drop:
        trained = [one for one in subject.model.parameters() if one.requires_grad]
        made = None if optimizer is None else optimizer(trained)
        if optimizer is not None and not isinstance(made, Optimizer):
            raise MethodError(
                f"optimizer: expected a function of parameters that makes one; it made {type(made).__name__}"
            )
        try:
            yield Work(subject, held, drop, trained, made)
        finally:
            for one in trained:
                one.grad = None


@dataclass(frozen=True)
class Work:
    """A model that works on batches.

    Args:
        subject: whose it is.
        held: batches with their layouts.
        drop: its handle; None where it is dense.
        trained: its trained parameters, added ones too.
        optimizer: what updates them, or None.
    """

    subject: Subject
    held: Held
    drop: Handle | None
    trained: Sequence[Tensor]
    optimizer: Optimizer | None

    @property
    def devices(self) -> set[torch.device]:
        """Where its parameters are."""
        return {one.device for one in self.subject.model.parameters()}

    @contextmanager
    def entered(self, layout: TokenLayout) -> Generator[None]:
        """A batch's layout, where the model is dropped; selections are those of the first step."""
        with ExitStack() as stack:
            if self.drop is not None:
                stack.enter_context(self.drop.layout(layout, step=(0, 0)))
            yield

    def warm_up(self) -> None:
        """A step on the first batch, which is not measured.

        Raises:
            TaskLossError: a loss without a gradient.
        """
        batch, layout = self.held[0]
        with self.entered(layout):
            loss = self.subject.loss_of(batch)
            if not loss.requires_grad:
                raise TaskLossError("the loss of a batch has no gradient; expected one that depends on the parameters")
            loss.backward()
        self.update()

    def update(self) -> None:
        """The end of a step."""
        if self.optimizer is not None:
            self.optimizer.step()
        for one in self.trained:
            one.grad = None

    def seconds(self) -> Iterator[tuple[float, float, float]]:
        """Of each batch: forward (what the engine plans included), backward, and the whole step."""
        for batch, layout in self.held:
            start = now(self.devices)
            with self.entered(layout):
                loss = self.subject.loss_of(batch)
                there = now(self.devices)
                loss.backward()
                back = now(self.devices)
            self.update()
            yield there - start, back - there, now(self.devices) - start

    def flops(self) -> Iterator[tuple[int, int]]:
        """Counted FLOPs of each batch, forward and backward."""
        for batch, layout in self.held:
            with self.entered(layout):
                with counter() as forward:
                    loss = self.subject.loss_of(batch)
                with counter() as backward:
                    loss.backward()
            self.update()
            yield forward.get_total_flops(), backward.get_total_flops()

    def memory(self) -> int:
        """Of the batch that needs most: on CUDA the peak of a step, elsewhere what a forward keeps for its backward."""
        cuda = [one for one in self.devices if one.type == "cuda"]
        return max(self._peak(*one, cuda) if cuda else self._kept(*one) for one in self.held)

    def _peak(self, batch: Any, layout: TokenLayout, devices: list[torch.device]) -> int:
        def step() -> None:
            with self.entered(layout):
                self.subject.loss_of(batch).backward()
            self.update()

        return peak_bytes(step, devices)

    def _kept(self, batch: Any, layout: TokenLayout) -> int:
        with self.entered(layout):
            return saved_bytes(lambda: self.subject.loss_of(batch), self.subject.model.parameters())

    def kept_ratio(self) -> float:
        """Computed token-layers over all, of all batches."""
        if self.drop is None:
            return 1.0
        computed = dense = 0
        for _, layout in self.held:
            with self.drop.layout(layout, step=(0, 0)) as plan:
                for cost in task_costs(self.drop, plan, layout.tasks).values():
                    computed, dense = computed + cost.token_layers, dense + cost.dense_token_layers
        return computed / dense


@dataclass
class Measured:
    """What was measured of a model's work.

    Args:
        seconds: part -> of each round, all batches together.
        flops: part -> of all batches.
        memory: bytes.
        kept_ratio: computed token-layers over all.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    flops: dict[str, int] = field(default_factory=dict)
    memory: int = 0
    kept_ratio: float = 1.0

    def count(self, one: Work) -> None:
        """What is the same in every round."""
        forward, backward = (sum(each) for each in zip(*one.flops(), strict=True))
        self.flops = {"forward": forward, "backward": backward, "step": forward + backward}
        self.memory, self.kept_ratio = one.memory(), one.kept_ratio()

    def time(self, one: Work) -> None:
        """A round."""
        for part, each in zip(PARTS, zip(*one.seconds(), strict=True), strict=True):
            self.seconds[part].append(sum(each))
