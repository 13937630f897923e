"""A task's loss and gradient in a trainer, evaluated beside its training step.

Shape letters: N tasks, P parameters.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tokendrop.callbacks.tasks import TaskBatch
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.decoder import find_layers, uncompiled
from tokendrop.errors import BatchError, DecoderError, TaskLossError
from tokendrop.layout import unnamed, without
from tokendrop.synergy.evaluate import gradients, local, moved, summed
from tokendrop.synergy.gradients import Compressed, compress, products


def as_given(batch: Any) -> Any:
    """A batch as it is now: its containers copied, its tensors not; a step may take keys out of the batch itself."""
    if isinstance(batch, MutableMapping) and callable(getattr(batch, "copy", None)):
        copied = batch.copy()
        for key, value in batch.items():
            if type(value) in (dict, list, tuple):
                copied[key] = as_given(value)
        return copied
    return type(batch)(map(as_given, batch)) if type(batch) in (list, tuple) else batch


def runnable(pl_module: L.LightningModule, layers: str | None = None) -> Any:
    """What a batch's keys are given to: `pl_module.model`, or else the outermost module in it that holds the decoder.

    Args:
        pl_module: that is trained.
        layers: dotted path of the decoder's layer list, where inspection finds several.

    Raises:
        DecoderError: there is none.
    """
    model = getattr(pl_module, "model", None)
    if callable(model):
        return model
    try:
        path = find_layers(pl_module, layers)[0].split(".")
        above = [pl_module.get_submodule(".".join(path[:depth])) for depth in range(1, len(path))]
        # ModuleList and ModuleDict have no forward of their own.
        return next(one for one in above if getattr(type(one), "forward", None) is not nn.Module.forward)
    except (DecoderError, StopIteration) as error:
        raise DecoderError(
            f"{type(pl_module).__name__} has no `model`, and no other module in which inspection finds one decoder; "
            "give the callback a loss=fn(pl_module, batch)"
        ) from error


def run_model(pl_module: L.LightningModule, batch: Any, layers: str | None = None) -> Any:
    """What the model of `runnable` returns of a batch, called with its keys but those of ours that it does not name.

    Raises:
        DecoderError: there is no such model.
        BatchError: a batch without keys.
    """
    model = runnable(pl_module, layers)
    return model(**_keywords(model, batch))


def model_loss(pl_module: L.LightningModule, batch: Any) -> Tensor:
    """The loss that `run_model` returns.

    Raises:
        TaskLossError: no such model, no keys, or no loss.
    """
    try:
        model = runnable(pl_module)
        keywords = _keywords(model, batch)
    except (BatchError, DecoderError) as error:
        raise TaskLossError(str(error)) from error
    loss = getattr(model(**keywords), "loss", None)
    if not isinstance(loss, Tensor):
        raise TaskLossError(
            f"{type(model).__name__} returned no loss; put labels into the batch, or give SynergyMonitor a "
            "loss=fn(pl_module, batch)"
        )
    return loss


def _keywords(model: Any, batch: Any) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"batch: expected a mapping, whose keys {type(model).__name__} is called with; found "
            f"{type(batch).__name__}. Give the callback a loss=fn(pl_module, batch)"
        )
    ours = unnamed(uncompiled(model).forward if isinstance(model, nn.Module) else model)
    return without(batch, ours)


@dataclass(frozen=True)
class Measured:
    """What an event found.

    Args:
        samples: gradients of two batches of each of the N tasks.
        losses: of the second batch of each task.
        ahead: losses of the second batches of all tasks after a step down the gradient of one.
        fidelity: cosine of each task's gradient with dropping and without.
        norm_ratio: of the same gradients.
    """

    samples: list[list[Compressed]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    ahead: dict[str, list[float]] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)
    norm_ratio: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """How tasks are evaluated at one step.

    Args:
        trainer: whose precision holds.
        pl_module: that is trained.
        loss: (pl_module, batch) -> scalar.
        handle: of the dropped model, if it is.
        parameters: P, by name.
        others: all of the module, before a forward.
        sketch: see `compress`.
        seed: of dropout, and of sketches.
        step: optimiser steps done.
    """

    trainer: L.Trainer
    pl_module: L.LightningModule
    loss: Callable[[L.LightningModule, Any], Tensor]
    handle: Handle | None
    parameters: dict[str, nn.Parameter]
    others: list[nn.Parameter]
    sketch: int | None
    seed: int
    step: int

    def measured(self, batches: Mapping[str, Sequence[TaskBatch]], affinity: float | None, fidelity: bool) -> Measured:
        """All of an event.

        Args:
            batches: two of each task.
            affinity: learning rate of the look-ahead; None leaves it out.
            fidelity: compare dropped gradients with dense ones, where there are such.
        """
        found = Measured()
        for task, (first, second) in batches.items():
            _, gradient = self.gradients(first, task)
            found.samples.append(self.compressed(gradient))
            if affinity is not None:
                found.ahead[task] = self.look_ahead(gradient, affinity, [pair[1] for pair in batches.values()])
            found.losses[task], gradient = self.gradients(second, task)
            found.samples.append(self.compressed(gradient))
            if fidelity and self.handle is not None:
                found.fidelity[task], found.norm_ratio[task] = self.compare(second, task, found.samples[-1])
        return found

    def loss_of(self, batch: TaskBatch, dense: bool = False) -> Tensor:
        """The loss of a batch, dropped or dense; random numbers are the same in both, and others in other batches."""
        # What samples have in common would count as signal.
        torch.manual_seed(hash((self.seed, self.step, batch.draw)))
        with ExitStack() as stack:
            if self.handle is not None and batch.layout is not None:
                layout = self.handle.layout(batch.layout, (self.step, batch.draw))
                stack.enter_context(self.handle.disabled() if dense else layout)
            stack.enter_context(self.trainer.precision_plugin.forward_context())
            return self.loss(self.pl_module, batch.inputs)

    def gradients(self, batch: TaskBatch, task: str, dense: bool = False) -> tuple[float, list[Tensor]]:
        """The loss of a batch, and its P gradients.

        Raises:
            TaskLossError: a loss or gradient that is not finite.
        """
        loss = self.loss_of(batch, dense)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        found = gradients(loss * scale, self.parameters, task, self.others)
        return loss.item(), found if scale == 1 else [one / scale for one in found]

    def compressed(self, found: Sequence[Tensor]) -> list[Compressed]:
        """This rank's parts of gradients, or sketches of them."""
        return [compress(local(one), self.sketch, self.seed + index) for index, one in enumerate(found)]

    def look_ahead(self, gradient: Sequence[Tensor], rate: float, batches: Sequence[TaskBatch]) -> list[float]:
        """Losses of batches after a step down a gradient."""
        with moved(self.pl_module, self.parameters, gradient, rate), torch.no_grad():
            return [self.loss_of(batch).item() for batch in batches]

    def compare(self, batch: TaskBatch, task: str, dropped: list[Compressed]) -> tuple[float, float]:
        """Cosine of a batch's gradient with dropping and without, and the ratio of their norms."""
        _, found = self.gradients(batch, task, dense=True)
        gram, _ = products([dropped, self.compressed(found)])
        total = summed(gram, found).sum(0)
        cosine = total[0, 1] / (total[0, 0] * total[1, 1]).sqrt()
        return cosine.item(), (total[0, 0] / total[1, 1]).sqrt().item()
