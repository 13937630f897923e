"""Where a dropped model stands in its training, and the strength of its methods there.

Shape letters: none.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import lightning as L
from torch import nn

from tokendrop.callbacks.progress import Progress
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.decoder import find_layers
from tokendrop.engine.support import check_methods
from tokendrop.schedule import Schedule


def progress_of(handle: Handle) -> Progress | None:
    """How far the model is trained; None where nobody knows."""
    return handle.progress if isinstance(handle.progress, Progress) else None


def count(handle: Handle, trainer: L.Trainer) -> Progress:
    """Count what a fit has done since it was asked last."""
    handle.progress = progress = (progress_of(handle) or Progress()).now(trainer)
    return progress


def evaluated(schedule: Schedule | None, progress: Progress | None) -> float:
    """The strength that a model is evaluated with: that where its training is, or if nobody knows, where it ends."""
    if schedule is None:
        return 1.0
    return schedule.final if progress is None else schedule.evaluated(progress.steps, progress.total)


def evaluated_strength(handle: Handle, schedule: Schedule | None) -> float:
    """The same of a dropped model."""
    return evaluated(schedule, progress_of(handle))


def begin(handle: Handle, schedule: Schedule | None, trainer: L.Trainer, batch_idx: int) -> int:
    """Give the methods the strength of a batch that begins, of training or of an evaluation.

    Returns:
        The optimiser steps done.
    """
    training = bool(trainer.training)
    # A pretrained model may be in eval mode, and Lightning leaves it there.
    handle.in_training = training and not handle.decoder_layers[0].training
    progress = count(handle, trainer) if trainer.state.fn == "fit" else progress_of(handle)
    if schedule is not None and training and progress is not None:
        if schedule.dense_tail:
            handle.progress = progress = progress.ending(trainer, batch_idx)
        handle.strength = schedule.strength(progress.steps, progress.total)
    elif schedule is not None:
        handle.strength = evaluated(schedule, progress)
    return 0 if progress is None else progress.steps


def end(handle: Handle, schedule: Schedule | None, trainer: L.Trainer) -> None:
    """Leave a stage: from here on, the model runs as in an evaluation."""
    if trainer.state.fn == "fit":
        count(handle, trainer)
    handle.in_training = False
    if schedule is not None:
        handle.strength = evaluated_strength(handle, schedule)


@contextmanager
def evaluating(handle: Handle | None, schedule: Schedule | None) -> Generator[None]:
    """As in an evaluation inside: a step that is drawn, or dense for `dense_every`, is like the others."""
    if handle is None or schedule is None or not (schedule.dense_every or schedule.drawn):
        yield
        return
    before, handle.strength = handle.strength, evaluated_strength(handle, schedule)
    try:
        yield
    finally:
        handle.strength = before


@contextmanager
def uncounted(module: nn.Module) -> Generator[None]:
    """Leave out of `handle.entered`, which random selections follow, the layouts that are entered inside."""
    before = [(one, one.entered) for one in module.modules() if isinstance(one, Handle)]
    try:
        yield
    finally:
        for handle, entered in before:
            handle.entered = entered


def progress_state(handle: Handle, trainer: L.Trainer) -> dict[str, Any]:
    """How far the training is, as plain data for a checkpoint; nothing where nobody knows."""
    progress = progress_of(handle)
    if trainer.state.fn == "fit":
        progress = (progress or Progress()).now(trainer)
    return {} if progress is None else {"progress": asdict(progress)}


def saved_progress(state: Mapping[str, Any] | None) -> Progress | None:
    """How far the training of a checkpoint was; None where it does not say."""
    return None if state is None or "progress" not in state else Progress(**state["progress"])


def differs(handle: Handle, module: nn.Module, asked: Any) -> str | None:
    """What a callback asks for that a module, which is dropped already, does not have; or None.

    Args:
        handle: of the module.
        module: given to the callback.
        asked: the callback, with the arguments of `apply`.
    """
    head = f"{type(module).__name__} is dropped already"
    if handle.methods != check_methods(asked.methods):
        return f"{head} with {handle.methods}, and TokenDrop was given {asked.methods}"
    if asked.layers is not None and find_layers(module, asked.layers)[1] is not handle.decoder_layers:
        return f"{head} in {handle.path!r} of {type(handle.owner).__name__}, and TokenDrop was given {asked.layers!r}"
    if asked.labelled_logits and not handle.labelled_logits:
        return f"{head} with labelled_logits=False, and TokenDrop was given True"
    if asked.multiple not in (64, handle.multiple):
        return f"{head} with multiple={handle.multiple}, and TokenDrop was given {asked.multiple}"
    return None
