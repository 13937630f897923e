"""The tasks of a batch: remembered, isolated from one another, and the same on every rank.

Shape letters: B batch, T tokens.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from tokendrop.callbacks.batch import OURS
from tokendrop.errors import BatchError
from tokendrop.layout import IGNORED, TokenLayout


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """A batch in which one task has labels.

    Args:
        inputs: the batch, without the keys that are ours.
        layout: what its tokens are, if known.
    """

    inputs: Any
    layout: TokenLayout | None

    def to(self, device: torch.device) -> "TaskBatch":
        """The same on another device."""
        layout = None if self.layout is None else self.layout.to(device)
        return TaskBatch(move_data_to_device(self.inputs, device), layout)


def isolated(batch: Any, layout: TokenLayout | None, tasks: tuple[str | None, ...], task: str) -> TaskBatch:
    """A batch whose rows of other tasks are trained on nothing; it keeps every row, since pixels are packed.

    Args:
        batch: of B samples.
        layout: what its tokens are, if known.
        tasks: of its B samples, or one for all.
        task: the one that keeps its labels.

    Raises:
        BatchError: rows of several tasks, and no labels to take away.
    """
    inputs = {key: value for key, value in batch.items() if key not in OURS} if isinstance(batch, Mapping) else batch
    if set(tasks) == {task}:
        return TaskBatch(inputs, layout)
    labels = inputs.get("labels") if isinstance(inputs, dict) else None
    if not isinstance(labels, torch.Tensor):
        raise BatchError(
            f"a batch of the tasks {sorted(map(str, set(tasks)))} has no 'labels' to tell them apart by; expected a "
            "mapping with labels (B, T), or batches of one task each"
        )
    others = torch.tensor([name != task for name in tasks], device=labels.device)
    labels = labels.masked_fill(others[:, None], IGNORED)
    if layout is not None and layout.labels is not None:
        layout = replace(layout, labels=labels)
    return TaskBatch(inputs | {"labels": labels}, layout)


@dataclass
class Recent:
    """The two most recent batches of each task.

    Args:
        tasks: their names.
    """

    tasks: tuple[str, ...]
    held: dict[str, deque[TaskBatch]] = field(init=False)

    def __post_init__(self) -> None:
        self.held = {task: deque(maxlen=2) for task in self.tasks}

    def add(self, batch: Any, layout: TokenLayout | None, tasks: tuple[str | None, ...]) -> None:
        """Remember a batch for each task in it."""
        for task in self.tasks:
            if task in tasks:
                self.held[task].append(isolated(batch, layout, tasks, task))

    def gathered(self, trainer: L.Trainer, device: torch.device) -> dict[str, list[TaskBatch]]:
        """Two batches of each task, the same on every rank; fewer where there are none yet."""
        own = {task: list(held) for task, held in self.held.items()}
        if trainer.world_size == 1:
            return own
        sent = {task: [one.to(torch.device("cpu")) for one in held] for task, held in own.items()}
        every: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, sent)
        # Newest first, rank by rank: at one step ranks hold different samples.
        found: dict[str, list[TaskBatch]] = {}
        for task in self.tasks:
            age = [rank[task][::-1] for rank in every]
            newest = [held[back] for back in range(2) for held in age if len(held) > back]
            found[task] = [one.to(device) for one in newest[:2]]
        return found


def batch_tasks(batch: Any, size: int | None = None) -> tuple[str | None, ...]:
    """The task of each sample, from `batch["task"]`; one None where it says nothing."""
    given = batch.get("task") if isinstance(batch, Mapping) else None
    return (given,) if given is None or isinstance(given, str) else tuple(given)
