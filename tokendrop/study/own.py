"""The study of synergy on a user's own module: each task alone and dense, and all jointly, dense and dropped."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from tokendrop.analysis.bench import named
from tokendrop.analysis.flops import counter
from tokendrop.callbacks import TokenDrop
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.attention import seen_kernels
from tokendrop.engine.support import Methods, check_methods
from tokendrop.errors import MethodError, UnsupportedError
from tokendrop.roles import Method
from tokendrop.synergy.history import append_history, read_history

ROWS = "runs.jsonl"
JOINT = "joint, dense"
COUNTED = 16  # training batches of each run whose FLOPs are counted, the first ones
OURS = ("tokendrop/", "synergy/", "allocation/")  # what our callbacks log is no quality
QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "devices": 1,
}  # fmt: skip
Parts = tuple[L.LightningModule, L.LightningDataModule | None, Mapping[str, Any]]
Make = Callable[[tuple[str, ...], dict[str, Method | None], int], Parts]
Run = tuple[tuple[str, ...], dict[str, Method | None]]


@dataclass(frozen=True)
class OwnStudy:
    """What is trained.

    Args:
        source: the name of the function.
        make: (tasks, task -> method or None, seed) -> (module, datamodule, trainer arguments).
        tasks: two or more.
        methods: each is a joint dropped run: a method for all tasks, or task -> method.

    Raises:
        MethodError: fewer than two tasks, or methods of others.
    """

    source: str
    make: Make
    tasks: tuple[str, ...]
    methods: Sequence[Methods]

    def __post_init__(self) -> None:
        if len(set(self.tasks)) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise MethodError(f"tasks: expected two or more, each once; found {list(self.tasks)}")
        for one in self.methods:
            others = [task for task in check_methods(one) if task is not None and task not in self.tasks]
            if others:
                raise MethodError(f"found methods for {others}, which are none of the tasks {list(self.tasks)}")

    def runs(self) -> dict[str, Run]:
        """Tasks and methods of each run, by name; every task of a run has an entry, None for dense."""
        found: dict[str, Run] = {f"{task} alone": ((task,), {task: None}) for task in self.tasks}
        dense: dict[str, Method | None] = dict.fromkeys(self.tasks)
        found[JOINT] = (self.tasks, dense)
        for one in self.methods:
            given = dict(one) if isinstance(one, Mapping) else dict.fromkeys(self.tasks, one)
            found[f"joint, {named(one)}"] = (self.tasks, dense | given)
        return found


class Counted(L.Callback):
    """Counts FLOPs of the first training batches, forward and backward, as they are spent.

    What other callbacks spend when a batch begins or ends, as a monitor does, is none of the training's: this one goes
    behind all others, to begin last, and has one before them, to end first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[int] = []
        self._counter: FlopCounterMode | None = None
        self._counting = ExitStack()
        self._ends = _Ends(self)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if len(self.flops) < COUNTED:
            self._counting.enter_context(seen_kernels(pl_module))  # flash kernels have no formula
            self._counter = self._counting.enter_context(counter())

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Around those of the module's configure_callbacks, too; a new list, as the old one is gone through now.
        callbacks: list[Any] = trainer.callbacks  # ty: ignore
        others = [one for one in callbacks if one not in (self, self._ends)]
        trainer.callbacks = [self._ends, *others, self]  # ty: ignore

    def taken(self) -> None:
        """Take what the batch has spent."""
        if self._counter is not None:
            self.flops.append(self._counter.get_total_flops())
            self._stop()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        self._counting.close()
        self._counter = None


class _Ends(L.Callback):
    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counted.taken()


def one_run(study: OwnStudy, name: str, seed: int) -> dict[str, Any]:
    """Train a run with a seed, and test it.

    Args:
        study: whose run.
        name: one of `study.runs()`.
        seed: everything is seeded with it before the function is called, which gets it too.

    Raises:
        UnsupportedError: no batch was trained, or there is nothing to test with.
        MethodError: the run would be trained under other methods than its own.
    """
    tasks, methods = study.runs()[name]
    L.seed_everything(seed, workers=True, verbose=False)
    module, data, arguments = study.make(tasks, dict(methods), seed)
    given = arguments.get("callbacks") or []
    callbacks: list[L.Callback] = [given] if isinstance(given, L.Callback) else list(given)
    callbacks += _drop(study, name, methods, callbacks, module)
    stage = _stage(study, module, data)
    counted, start = Counted(), time.perf_counter()
    with warnings.catch_warnings():
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"lightning\.")
        all_arguments: dict[str, Any] = {**QUIET, **arguments, "callbacks": [*callbacks, counted]}
        trainer = L.Trainer(**all_arguments)
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - start
        evaluate = trainer.test if stage == "test" else trainer.validate
        logged = {
            key: float(value) for one in evaluate(module, datamodule=data, verbose=False) for key, value in one.items()
        }
    if not counted.flops:
        raise UnsupportedError(f"{study.source!r}, {name}: the Trainer ran no training batch")
    return {
        "source": study.source,
        "name": name,
        "seed": seed,
        "tasks": list(tasks),
        "all_tasks": list(study.tasks),
        "methods": {task: None if one is None else named(one) for task, one in methods.items()},
        "stage": stage,
        "metrics": {key: value for key, value in logged.items() if not key.startswith(OURS)},
        "flops": sum(counted.flops) / len(counted.flops),
        "batches_counted": len(counted.flops),
        "steps": trainer.global_step,
        "seconds": seconds,
    }


def _drop(
    study: OwnStudy,
    name: str,
    methods: Mapping[str, Method | None],
    callbacks: Sequence[L.Callback],
    module: L.LightningModule,
) -> list[L.Callback]:
    """The callback that drops the run's tokens, where the user's function has not put one there already."""
    theirs: list[Any] = [one.methods for one in callbacks if isinstance(one, TokenDrop)]
    theirs += [one.methods for one in module.modules() if isinstance(one, Handle)]
    wanted = {task: one for task, one in methods.items() if one is not None}
    for one in theirs:
        held = one if isinstance(one, Mapping) else {None: one}
        served = {task: held.get(task, held.get(None)) for task in methods}
        if {task: method for task, method in served.items() if method is not None} != wanted:
            raise MethodError(
                f"{study.source!r}, {name}: the function was given {dict(methods)} and made a TokenDrop of {one}; give "
                "it the methods that the function gets, or leave it out"
            )
    return [TokenDrop(dict(methods))] if wanted and not theirs else []


def _stage(study: OwnStudy, module: L.LightningModule, data: L.LightningDataModule | None) -> str:
    for stage, step in (("test", "test_step"), ("val", "validation_step")):
        loader = f"{stage}_dataloader"
        loads = is_overridden(loader, module, L.LightningModule)
        loads = loads or (data is not None and is_overridden(loader, data, L.LightningDataModule))
        if loads and is_overridden(step, module, L.LightningModule):
            return "test" if stage == "test" else "validate"
    raise UnsupportedError(
        f"{study.source!r}: {type(module).__name__} has neither a test_step with a test_dataloader nor a "
        "validation_step with a val_dataloader; qualities are what they log"
    )


def rows_of(study: OwnStudy, out: Path) -> list[dict[str, Any]]:
    """The rows that a folder holds of this function and these tasks, the last of each run and seed."""
    path, known = out / ROWS, study.runs()
    found = {
        (row["name"], row["seed"]): row
        for row in (read_history(path) if path.exists() else [])
        if row.get("source") == study.source and row.get("all_tasks") == list(study.tasks) and row["name"] in known
    }
    return list(found.values())


def run_missing(
    study: OwnStudy, seeds: int, out: Path, shared: Callable[[], dict[str, Any]]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Run what `out` does not hold yet, seed by seed, each row appended as it comes.

    Args:
        study: what is trained.
        seeds: how many; they are 0, 1, ...
        out: folder.
        shared: what each row says of where it was made.

    Yields:
        Runs done, runs due, and the row.
    """
    held = {(row["name"], row["seed"]) for row in rows_of(study, out)}
    due = [(name, seed) for seed in range(seeds) for name in study.runs() if (name, seed) not in held]
    for done, (name, seed) in enumerate(due, start=1):
        row = one_run(study, name, seed) | shared()
        append_history(out / ROWS, row)
        yield done, len(due), row
