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
from tokendrop.analysis.spent import Pass, hidden_flops, task_costs
from tokendrop.analysis.subject import Subject
from tokendrop.analysis.timing import now, peak_bytes, spread
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.attention import seen_kernels
from tokendrop.engine.model.decoder import attention_of, find_layers
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
    layers = find_layers(subject.model, options.get("layers"))[1]
    with under(subject.model, methods, options) as drop:
        trained = [one for one in subject.model.parameters() if one.requires_grad]
        made = None if optimizer is None else optimizer(trained)
        if optimizer is not None and not isinstance(made, Optimizer):
            raise MethodError(
                f"optimizer: expected a function of parameters that makes one; it made {type(made).__name__}"
            )
        try:
            yield Work(subject, held, layers, drop, trained, made)
        finally:
            for one in trained:
                one.grad = None


@dataclass(frozen=True)
class Work:
    """A model that works on batches.

    Args:
        subject: whose it is.
        held: batches with their layouts.
        layers: of its decoder.
        drop: its handle; None where it is dense.
        trained: its trained parameters, added ones too.
        optimizer: what updates them, or None.
    """

    subject: Subject
    held: Held
    layers: nn.ModuleList
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

    def flops(self) -> Iterator[tuple[int, int, float]]:
        """Counted FLOPs of each batch, forward and backward; and what share of attention ran again in backward.

        FlashAttention and FlexAttention are counted as sdpa: the former's kernels have no formula, and torch before
        2.13 has none of the latter's and cannot run it while it counts.
        """
        calls: list[nn.Module] = []
        with ExitStack() as stack:
            stack.enter_context(seen_kernels(self.subject.model))
            for layer in self.layers:  # whose checkpointing may lie inside its __call__
                hook = (attention_of(layer) or layer).register_forward_pre_hook(lambda module, _: calls.append(module))
                stack.callback(hook.remove)
            for batch, layout in self.held:
                calls.clear()
                with self.entered(layout):
                    with counter() as forward:
                        loss = self.subject.loss_of(batch)
                    ahead = len(calls)
                    with counter() as backward:
                        loss.backward()
                self.update()
                yield forward.get_total_flops(), backward.get_total_flops(), (len(calls) - ahead) / max(1, ahead)

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

    def planned(self) -> tuple[float, list[tuple[Pass, Pass]] | None]:
        """Computed token-layers over all, of all batches; and of each batch the FLOPs of pairs that no query sees,
        under the methods and dense, or None where nobody knows the widths of attention.
        """
        if self.drop is None:
            return 1.0, None
        computed, dense, hidden = 0, 0, list[tuple[Pass, Pass]]()
        for _, layout in self.held:
            with self.drop.layout(layout, step=(0, 0)) as plan:
                for cost in task_costs(self.drop, plan, layout.tasks).values():
                    computed, dense = computed + cost.token_layers, dense + cost.dense_token_layers
                own, whole = ((sum(a for a, _ in one), sum(b for _, b in one)) for one in hidden_flops(self.drop, plan))
                hidden.append((own, whole))
        known = not any(spec.separate_refusal() for spec in self.drop.specs)
        return computed / dense, hidden if known else None


@dataclass
class Measured:
    """What was measured of a model's work.

    Args:
        seconds: part -> of each round, all batches together.
        flops: part -> of all batches.
        again: of each batch, the share of its attention that its backward ran again.
        memory: bytes.
        kept_ratio: computed token-layers over all.
        hidden: of each batch, FLOPs of pairs that no query sees, under the methods and dense; of the dropped one only.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    flops: dict[str, int] = field(default_factory=dict)
    again: Sequence[float] = ()
    memory: int = 0
    kept_ratio: float = 1.0
    hidden: Sequence[tuple[Pass, Pass]] | None = None

    def count(self, one: Work) -> None:
        """What is the same in every round."""
        ahead, back, self.again = zip(*one.flops(), strict=True)
        self.flops = {"forward": sum(ahead), "backward": sum(back), "step": sum(ahead) + sum(back)}
        self.memory = one.memory()
        self.kept_ratio, self.hidden = one.planned()

    def computed(self, part: str, hidden: Sequence[Pass]) -> int:
        """FLOPs of all batches without those of pairs that no query sees, which a backward may run again."""
        ahead = sum(one for one, _ in hidden)
        back = sum(two + round(again * one) for (one, two), again in zip(hidden, self.again, strict=True))
        return self.flops[part] - {"forward": ahead, "backward": back, "step": ahead + back}[part]

    def time(self, one: Work) -> None:
        """A round."""
        for part, each in zip(PARTS, zip(*one.seconds(), strict=True), strict=True):
            self.seconds[part].append(sum(each))


def computed_row(found: Mapping[bool, Measured], part: str, ratios: Sequence[float]) -> dict[str, Any]:
    """What a row says of computed FLOPs, without the pairs of attention that no query sees.

    Args:
        found: of the dense model (False) and under methods (True).
        part: of `PARTS`.
        ratios: of time, in each round.
    """
    row: dict[str, Any] = dict.fromkeys(
        ("computed_flops", "dense_computed_flops", "computed_flops_ratio", "computed_capture")
    )
    hidden = found[True].hidden
    if hidden is None:
        return row
    own, dense = (found[one].computed(part, [each[not one] for each in hidden]) for one in (True, False))
    row |= {"computed_flops": own, "dense_computed_flops": dense, "computed_flops_ratio": own / dense}
    return row | {"computed_capture": spread([own / dense / ratio for ratio in ratios])}
