"""The tasks of a batch: remembered, isolated from one another, and the same on every rank.

Shape letters: B batch, T tokens.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection

from tokendrop.errors import BatchError, MethodError
from tokendrop.layout import IGNORED, TokenLayout


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """A batch in which one task has labels.

    Args:
        inputs: the batch.
        layout: what its tokens are, if known.
        draw: its number at an event, for random numbers of its own.
    """

    inputs: Any
    layout: TokenLayout | None
    draw: int = 0

    def to(self, device: torch.device) -> "TaskBatch":
        """The same on another device."""
        layout = None if self.layout is None else self.layout.to(device)
        return TaskBatch(move_data_to_device(self.inputs, device), layout, self.draw)


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
    inputs = dict(batch.items()) if isinstance(batch, Mapping) else batch
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
        self.clear()

    def clear(self) -> None:
        """Forget all batches."""
        self.held = {task: deque(maxlen=2) for task in self.tasks}

    def add(self, batch: Any, layout: TokenLayout | None, tasks: tuple[str | None, ...]) -> None:
        """Remember a batch for each task in it."""
        for task in self.tasks:
            if task in tasks:
                self.held[task].append(isolated(batch, layout, tasks, task))

    def gathered(self, trainer: L.Trainer, device: torch.device) -> dict[str, list[TaskBatch]]:
        """Two batches of each task, numbered and the same on every rank; fewer where there are none yet."""
        found = {task: list(held) for task, held in self.held.items()}
        if trainer.world_size > 1:
            every = _from_ranks({task: list(map(_on_cpu, held)) for task, held in self.held.items()})
            # Newest first, rank by rank: at one step ranks hold different samples.
            for task in self.tasks:
                age = [rank[task][::-1] for rank in every]
                found[task] = [held[back] for back in range(2) for held in age if len(held) > back][:2]
        draws = count()
        return {task: [replace(one.to(device), draw=next(draws)) for one in held] for task, held in found.items()}

    def saved(self, trainer: L.Trainer) -> list[dict[str, list[Any]]]:
        """The batches of each rank as plain data; none of a task whose batches are not made of it."""
        own = {task: [_plain(one) for one in map(_on_cpu, held)] for task, held in self.held.items()}
        own = {task: [] if None in held else held for task, held in own.items()}
        return [own] if trainer.world_size == 1 else _from_ranks(own)

    def load(self, trainer: L.Trainer, saved: list[dict[str, list[Any]]]) -> None:
        """Take back what `saved` gave to as many ranks; with other ranks, or other tasks, begin anew."""
        own = saved[trainer.global_rank] if len(saved) == trainer.world_size else {}
        self.clear()
        for task, held in self.held.items():
            for inputs, layout in own.get(task, ()):
                held.append(TaskBatch(inputs, None if layout is None else TokenLayout(**layout)))


def _on_cpu(batch: TaskBatch) -> TaskBatch:
    return batch.to(torch.device("cpu"))


def _from_ranks(own: Any) -> list[Any]:
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return every


def _plain(batch: TaskBatch) -> tuple[Any, dict[str, Any] | None] | None:
    held = (batch.inputs, None if batch.layout is None else dict(vars(batch.layout)))
    # Cloned: a view would bring all that it is a part of into the file.
    return apply_to_collection(held, torch.Tensor, torch.clone) if is_plain(held) else None


def is_plain(value: Any) -> bool:
    """Whether a value is read back by `torch.load(weights_only=True)`: tensors, text, numbers, dicts, lists, tuples."""
    if type(value) is dict:
        return all(is_plain(key) and is_plain(one) for key, one in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (torch.Tensor, str, int, float, bool, bytes)


def batch_tasks(batch: Any, size: int | None = None) -> tuple[str | None, ...]:
    """The task of each sample, from `batch["task"]`; one None where it says nothing."""
    given = batch.get("task") if isinstance(batch, Mapping) else None
    return (given,) if given is None or isinstance(given, str) else tuple(given)


def check_names(name: str, given: Any) -> tuple[str, ...]:
    """Names given as one or as several.

    Raises:
        MethodError: with the value.
    """
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if not names or not all(isinstance(one, str) for one in names):
        raise MethodError(f"{name}={given!r}: expected names, as text")
    return names
