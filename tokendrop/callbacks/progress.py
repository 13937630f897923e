"""How far a training is, in optimiser steps.

Shape letters: none.
"""

import math
from dataclasses import dataclass, replace

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


@dataclass(frozen=True)
class Progress:
    """Optimiser steps of a training; several optimizers that step once each in a batch make one step.

    Lightning's `global_step` counts the steps of each optimizer. Of n optimizers, a batch with s of their steps counts
    ceil(s / n): alternating ones make a step a batch, and so do those that step together.

    Args:
        steps: that are done.
        seen: the trainer's global step then.
        batches: that were done when the last of them was.
        total: of the whole training; None where it has no end, or was not asked for.
    """

    steps: int = 0
    seen: int = 0
    batches: int = 0
    total: int | None = None

    def now(self, trainer: L.Trainer) -> "Progress":
        """The same after what the trainer has done since; to be asked between batches. A new training begins at 0."""
        new = trainer.global_step - self.seen
        if new < 0:
            return Progress().now(trainer)
        if new == 0:
            return self
        steps = self.steps + math.ceil(new / max(1, len(trainer.optimizers)))
        return Progress(steps, trainer.global_step, _batches(trainer), self.total)

    def ending(self, trainer: L.Trainer, batch_idx: int) -> "Progress":
        """The same with the total, asked at the start of batch `batch_idx` of the epoch."""
        # Not Lightning's estimate, which counts each optimizer's steps, and past epochs as if they were like this one.
        left = min(self._left_of_epochs(trainer, batch_idx), self._left_of_steps(trainer))
        return replace(self, total=self.steps + int(left) if left < math.inf else None)

    def _left_of_epochs(self, trainer: L.Trainer, batch_idx: int) -> float:
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        if batches == math.inf or epochs is None or epochs < 0:
            return math.inf
        later = range(trainer.current_epoch + 1, epochs)
        if trainer.lightning_module.automatic_optimization:
            here = _accumulated(trainer, trainer.current_epoch)
            rest = sum(math.ceil(batches / _accumulated(trainer, epoch)) for epoch in later)
            return math.ceil(batches / here) - batch_idx // here + rest
        left = batches * (1 + len(later)) - batch_idx
        if not self.steps or not self.batches:
            return left
        # Nobody but the module knows when it steps; it is taken to go on as it did.
        return (left + _batches(trainer) - self.batches) * self.steps // self.batches

    def _left_of_steps(self, trainer: L.Trainer) -> float:
        if trainer.max_steps < 0:
            return math.inf
        each = self.steps / self.seen if self.seen else 1 / max(1, len(trainer.optimizers))
        return math.ceil((trainer.max_steps - self.seen) * each - 1e-9)


def _batches(trainer: L.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # ty: ignore


def _accumulated(trainer: L.Trainer, epoch: int) -> int:
    for one in trainer.callbacks:  # ty: ignore
        if isinstance(one, GradientAccumulationScheduler):
            return one.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches
