"""Trainers whose work runs in processes that they start (ddp_spawn, ddp_fork, ddp_notebook).

The first of these sends its trained weights back, and the caller's module takes those that it has a place for. No hook
of Lightning's runs in the caller's process, so its launcher is wrapped: what is added is added there too, and comes
home.
"""

import functools
from typing import Any

import lightning as L
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from tokendrop.engine.handle import Handle
from tokendrop.errors import UnsupportedError


class BeforeLaunch(L.Callback):
    """A callback that is told before a trainer starts processes, in the process that does."""

    def before_launch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called with the caller's own module, before any other hook."""


def check_home(trainer: L.Trainer, handle: Handle) -> None:
    """Refuse parameters that were added in a started process only; trained, they would be lost with it.

    Args:
        trainer: in `setup`.
        handle: of the module that was dropped just now.

    Raises:
        UnsupportedError: with the way out; the module is what it was.
    """
    added = sum(1 for _ in handle.parameters())
    if trainer.state.fn == "fit" and added and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        module = type(handle.owner).__name__
        handle.remove()
        raise UnsupportedError(
            f"{type(trainer.strategy).__name__} trains in processes that it starts, and the {added} parameters that "
            f"were added to {module} there would be lost at their end; call tokendrop.apply(module, methods) before "
            "trainer.fit, or give TokenDrop to the Trainer"
        )


def _wrap_launch() -> None:
    original = _MultiProcessingLauncher.launch

    @functools.wraps(original)
    def launch(self: Any, *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        for callback in getattr(trainer, "callbacks", ()):
            if trainer is not None and isinstance(callback, BeforeLaunch):
                callback.before_launch(trainer, trainer.lightning_module)
        return original(self, *args, trainer=trainer, **kwargs)

    setattr(_MultiProcessingLauncher, "launch", launch)  # noqa: B010


_wrap_launch()
