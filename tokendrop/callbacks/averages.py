"""Averages of weights, whose copy of the module must have what a method adds."""

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tokendrop.engine.handle import Handle
from tokendrop.errors import UnsupportedError


def renew_averages(trainer: L.Trainer, pl_module: L.LightningModule, handle: Handle) -> None:
    """Have averages that copied the module before it was dropped copy it again; order of callbacks does not matter.

    Parameters are averaged pair by pair, so a copy without the added ones would leave them out, or end in a crash.

    Args:
        trainer: whose callbacks they are.
        pl_module: that was dropped just now.
        handle: of it.

    Raises:
        UnsupportedError: another callback holds an `AveragedModel` without the added parameters.
    """
    if not any(True for _ in handle.parameters()):
        return
    for callback in getattr(trainer, "callbacks", ()):
        copies = [value for value in vars(callback).values() if isinstance(value, nn.Module) and not _dropped(value)]
        if copies and isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            callback.setup(trainer, pl_module, TrainerFn(trainer.state.fn).value)
        elif any(isinstance(one, AveragedModel) and type(one.module) is type(pl_module) for one in copies):
            raise UnsupportedError(
                f"{type(callback).__name__} copied {type(pl_module).__name__} before TokenDrop added its parameters, "
                "which would not be averaged; list TokenDrop before it"
            )


def _dropped(copy: nn.Module) -> bool:
    return any(isinstance(module, Handle) for module in copy.modules())
