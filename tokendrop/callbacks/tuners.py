"""Lightning's tuners, which run the loop without the trainer's callbacks."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn


@contextmanager
def kept_in_tuners(trainer: L.Trainer, callback: Any, stage: str) -> Generator[None]:
    """Inside, a callback also runs in the loops of tuners, which replace the trainer's callbacks by their own.

    No hook lies between that and the loop, so the loop's `run` is wrapped on the instance. What a learning rate is
    sought for is the whole method; a batch size must fit the dense steps of a schedule.

    Args:
        trainer: in `setup`; without a tuner among its callbacks nothing is wrapped.
        callback: that stays; its `tuned_strength` is that of a schedule while a tuner runs, None otherwise.
        stage: "fit", "validate", "test" or "predict".
    """
    if not any(isinstance(one, BatchSizeFinder | LearningRateFinder) for one in getattr(trainer, "callbacks", ())):
        yield
        return
    loop, listed = getattr(trainer, f"{TrainerFn(stage).value}_loop"), getattr(trainer, "callbacks", [])
    original = loop.run

    def run() -> Any:
        replaced: list[L.Callback] = getattr(trainer, "callbacks", [])
        if replaced is listed:
            return original()
        if callback not in replaced:
            replaced.append(callback)
        # The learning rate finder logs by a callback of its own; the batch size finder has none.
        callback.tuned_strength = 1.0 if len(replaced) > 1 else 0.0
        trained = None if callback.handle is None else callback.handle.progress
        try:
            if stage == "fit":
                callback.on_fit_start(trainer, trainer.lightning_module)
            return original()
        finally:
            callback.tuned_strength = None
            if callback.handle is not None:
                callback.handle.progress = trained  # what a tuner did is undone

    loop.run = run
    try:
        yield
    finally:
        del loop.run
