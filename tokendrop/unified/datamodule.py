"""Batches of both tasks for a Lightning trainer."""

from typing import Any, Literal, cast, get_args

import lightning as L
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from tokendrop.unified.data import TASKS, Batch, Scenes, mix
from tokendrop.unified.images import DataError

Update = Literal["alternating", "mixed"]
Tested = Literal["val", "test"]
EVALUATION_BATCH = 128


class TrainBatches(Dataset[Batch]):
    """Training batches of some tasks; batch k of a task is the same whichever tasks are trained beside it.

    alternating: one task a batch, in turn;    mixed: batch k of every task in one, their losses summed

    Args:
        scenes: what batches are made of.
        tasks: which tasks, in order.
        steps: batches of each task.
        batch_size: samples of a task in a batch.
        update: "alternating" or "mixed".
        seed: of the scenes.
    """

    def __init__(
        self, scenes: Scenes, tasks: tuple[str, ...], steps: int, batch_size: int, update: Update, seed: int
    ) -> None:
        self.scenes, self.tasks, self.steps, self.batch_size = scenes, tasks, steps, batch_size
        self.update: Update = update
        self.seed = seed

    def __len__(self) -> int:
        return self.steps if self.update == "mixed" else self.steps * len(self.tasks)

    def __getitem__(self, index: int) -> Batch:
        if self.update == "mixed":
            return mix([self._batch(task, index) for task in self.tasks])
        step, turn = divmod(index, len(self.tasks))
        return self._batch(self.tasks[turn], step)

    def _batch(self, task: str, step: int) -> Batch:
        rows = self.scenes.draw("train", self.batch_size, (self.seed, TASKS.index(task), step), task)
        return self.scenes.batch(task, rows, "train")


class UnifiedData(L.LightningDataModule):
    """Scenes of real digits for understanding and generation; training, validation and test digits are disjoint.

    Args:
        scenes: what batches are made of.
        tasks: which tasks, in the order in which they take turns.
        steps: training batches of each task.
        batch_size: samples of a task in a batch.
        update: "alternating" (one optimiser update per task batch, in turn) or "mixed" (summed loss).
        seed: of the training scenes; validation and test scenes are the same for all seeds.
        val_scenes: validation scenes of each task.
        test_scenes: test scenes of each task.
        tested: the split that test scenes are made of; "val" where something is chosen by them.

    Raises:
        DataError: an unknown task, update rule or split.

    Example:
        >>> data = UnifiedData(Scenes("digits", (1, 2), codes=16), steps=2, batch_size=4)
        >>> [batch["task"] for batch in data.train_dataloader()]
        ['understanding', 'generation', 'understanding', 'generation']
    """

    def __init__(
        self,
        scenes: Scenes,
        tasks: tuple[str, ...] = TASKS,
        steps: int = 400,
        batch_size: int = 32,
        update: Update = "alternating",
        seed: int = 0,
        val_scenes: int = 128,
        test_scenes: int = 512,
        tested: Tested = "test",
    ) -> None:
        super().__init__()
        if not tasks or not set(tasks) <= set(TASKS):
            raise DataError(f"tasks: found {tasks!r}; name one or more of {TASKS}")
        if update not in get_args(Update):
            raise DataError(f"update: found {update!r}; use one of {get_args(Update)}")
        if tested not in get_args(Tested):
            raise DataError(f"tested: found {tested!r}; use one of {get_args(Tested)}")
        self.scenes, self.tasks, self.tested = scenes, tasks, tested
        self.train = TrainBatches(scenes, tasks, steps, batch_size, update, seed)
        self.val_scenes, self.test_scenes = val_scenes, test_scenes

    @override
    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=None)

    @override
    def val_dataloader(self) -> Any:
        return self._evaluation("val", self.val_scenes)

    @override
    def test_dataloader(self) -> Any:
        return self._evaluation(self.tested, self.test_scenes)

    def _evaluation(self, split: Tested, count: int) -> Any:
        batches: list[Batch] = []
        for task in self.tasks:
            rows = self.scenes.draw(split, count, seed=(TASKS.index(task),))
            batches += [
                self.scenes.batch(task, rows[i : i + EVALUATION_BATCH], split)
                for i in range(0, count, EVALUATION_BATCH)
            ]
        return DataLoader(cast(Any, batches), batch_size=None)
