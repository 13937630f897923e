"""Averages of weights, whose copy of the module must have what a method adds."""

import warnings

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tokendrop.engine.handle import Handle
from tokendrop.errors import NoEffectWarning, UnsupportedError


def renew_averages(trainer: L.Trainer, pl_module: L.LightningModule, handle: Handle) -> None:
    """Have averages that copied the module before it was dropped copy it again; order of callbacks does not matter.

    Parameters are averaged pair by pair, so a copy without the added ones would leave them out, or end in a crash.

    Args:
        trainer: whose callbacks they are.
        pl_module: that was dropped just now.
        handle: of it.

    Raises:
        UnsupportedError: another callback holds an `AveragedModel` without the added parameters. A warning where none
            are added: nobody knows whether that copy is run, or only gives its weights back.
    """
    adds = any(True for _ in handle.parameters())
    for callback in getattr(trainer, "callbacks", ()):
        copies = [value for value in vars(callback).values() if isinstance(value, nn.Module) and not _dropped(value)]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            if not copies or not adds:
                continue  # their copies are never run; what they hold is put into the module
            callback.setup(trainer, pl_module, TrainerFn(trainer.state.fn).value)
        elif any(isinstance(one, AveragedModel) and type(one.module) is type(pl_module) for one in copies):
            found = f"{type(callback).__name__} copied {type(pl_module).__name__} before TokenDrop changed it"
            if adds:
                raise UnsupportedError(f"{found}, so what it adds would not be averaged; list TokenDrop before it")
            warnings.warn(
                f"{found}: should the copy be run, it runs dense. To have it dropped, list TokenDrop before it",
                NoEffectWarning,
                stacklevel=2,
            )


def _dropped(copy: nn.Module) -> bool:
    return any(isinstance(module, Handle) for module in copy.modules())
