"""A task's loss and gradient in a trainer, evaluated beside its training step.

Shape letters: P parameters.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tokendrop.callbacks.batch import OURS
from tokendrop.callbacks.tasks import TaskBatch
from tokendrop.engine.handle import Handle
from tokendrop.errors import TaskLossError
from tokendrop.synergy.evaluate import gradients, local, moved, summed
from tokendrop.synergy.gradients import Compressed, compress, products


def model_loss(pl_module: L.LightningModule, batch: Any) -> Tensor:
    """The loss that `pl_module.model(**batch)` returns, without the batch's keys that are ours.

    Raises:
        TaskLossError: no such model, or no loss.
    """
    model: Any = getattr(pl_module, "model", None)
    if not callable(model):
        raise TaskLossError(
            f"{type(pl_module).__name__} has no `model`; give SynergyMonitor a loss=fn(pl_module, batch)"
        )
    loss = getattr(model(**{key: value for key, value in batch.items() if key not in OURS}), "loss", None)
    if not isinstance(loss, Tensor):
        raise TaskLossError(
            f"{type(model).__name__} returned no loss; put labels into the batch, or give SynergyMonitor a "
            "loss=fn(pl_module, batch)"
        )
    return loss


@dataclass(frozen=True)
class Evaluation:
    """How tasks are evaluated at one step.

    Args:
        trainer: whose precision holds.
        pl_module: that is trained.
        loss: (pl_module, batch) -> scalar.
        handle: of the dropped model, if it is.
        parameters: P, by name.
        sketch: see `compress`.
        seed: of dropout, and of sketches.
        step: optimiser steps done.
    """

    trainer: L.Trainer
    pl_module: L.LightningModule
    loss: Callable[[L.LightningModule, Any], Tensor]
    handle: Handle | None
    parameters: dict[str, nn.Parameter]
    sketch: int | None
    seed: int
    step: int

    def loss_of(self, batch: TaskBatch, dense: bool = False) -> Tensor:
        """The loss of a batch, dropped or dense, always with the same random numbers."""
        torch.manual_seed(self.seed)
        with ExitStack() as stack:
            if self.handle is not None and batch.layout is not None:
                layout = self.handle.layout(batch.layout, (self.step, 0))
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
        found = gradients(loss * scale, self.parameters, task)
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
