"""Quality of both tasks against the FLOPs of training: the regime, one run of a plan in it, and all missing ones."""

import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import lightning as L
import torch
from typing_extensions import override

from tokendrop.callbacks import SynergyMonitor
from tokendrop.schedule import Schedule
from tokendrop.study.costs import Steps
from tokendrop.study.learnt import LearntVLM
from tokendrop.study.plans import FrontierError, Plan, plans
from tokendrop.study.runner import in_workers
from tokendrop.study.study import Run, Study
from tokendrop.study.synergy import short, task_loss
from tokendrop.study.train import train
from tokendrop.synergy.history import append_history, read_history
from tokendrop.unified.data import TASKS, Scenes
from tokendrop.unified.datamodule import Tested, UnifiedData
from tokendrop.unified.model import UnifiedVLM

NAMED = re.compile(r"(?P<plan>.+?)(?: x(?P<updates>\d*\.?\d+))?")


@dataclass(frozen=True)
class FrontierStudy(Study):
    """The size of everything at one scale: understanding has few images, generation all others.

    Args:
        placebo: captions of generation are shuffled.
        others: training images of generation, after those of understanding; 0 for all that are left.
        labelled, distil: as in `Plan`.
        tested: the split of every figure: "val" to choose, "test" to report.
        drawn: images that are drawn on test for the agreement of generation, rounded up to a batch; 0 for none.
        events: of the monitor, in the first fifth of a run of both tasks; 0 leaves it out.

    Example:
        >>> FrontierStudy(steps=100).of("dense x0.6").steps
        60
    """

    placebo: bool = False
    others: int = 0
    labelled: float = 1.0
    distil: int = 0
    tested: Tested = "val"
    drawn: int = 128
    test_scenes: int = 4096
    val_scenes: int = 256
    curve_points: int = 5
    events: int = 5

    def plans(self) -> dict[str, Plan]:
        """Every plan by name."""
        return plans(self.layers)

    @override
    def runs(self) -> dict[str, Run]:
        """Every plan by name."""
        return dict(self.plans())

    @property
    @override
    def scenes(self) -> Scenes:
        return Scenes(self.source, self.grid, self.codes, self.few, self.question, self.placebo, self.others)

    @override
    def data(self, run: Run, seed: int) -> UnifiedData:
        sizes = {"val_scenes": self.val_scenes, "test_scenes": self.test_scenes, "tested": self.tested}
        made: Any = {"steps": self.steps, "batch_size": self.batch_size, "update": self.update, **sizes}
        return UnifiedData(self.scenes, run.tasks, seed=seed, **made)

    @override
    def model(self, seed: int) -> UnifiedVLM:
        sizes = self.hidden, self.layers, self.heads, self.learning_rate
        made = self.scenes, *sizes, seed, self.drawn if self.tested == "test" else 0
        plain = (self.labelled, self.distil) == (1.0, 0)
        return UnifiedVLM(*made) if plain else LearntVLM(*made, labelled=self.labelled, distil=self.distil)

    def of(self, name: str) -> "FrontierStudy":
        """The study that a run is trained under: `plan`, or `plan x0.6` for 0.6 of the updates."""
        plan, updates = parsed(name)
        asked = {part: getattr(self.plan(plan), part) for part in ("placebo", "labelled", "distil")}
        return replace(self, steps=round(updates * self.steps), **asked)

    def plan(self, name: str) -> Plan:
        """A plan by its name.

        Raises:
            FrontierError: there is none of that name.
        """
        found = self.plans()
        if name not in found:
            raise FrontierError(f"found the plan {name!r}; use one of {', '.join(found)}")
        return found[name]

    @override
    def schedule(self, name: str) -> Schedule | None:
        """When dropping sets in and ends."""
        plan = self.plan(name)
        return None if plan.schedule is None else plan.schedule(self.steps * len(plan.tasks))


MNIST = FrontierStudy("mnist", few=500, steps=250)
ONE_DIGIT: dict[str, Any] = {"question": "digit", "events": 0}
SCALES = {
    "digits": FrontierStudy(),
    "digits, 12 layers": FrontierStudy(layers=12),
    "mnist": MNIST,
    "mnist, long": replace(MNIST, steps=500),
    "mnist, 12 layers": replace(MNIST, layers=12),
    "mnist 2x2": replace(MNIST, grid=(2, 2)),
    # Understanding is asked for one digit, generation is told all; neither has many images. No gradient is watched.
    "digits, one digit": replace(FrontierStudy(), **ONE_DIGIT),
    "digits, one digit, 12 layers": replace(FrontierStudy(layers=12), **ONE_DIGIT),
    "mnist, one digit": replace(MNIST, few=200, others=500, steps=500, **ONE_DIGIT),
    "mnist 2x2, one digit": replace(MNIST, grid=(2, 2), others=1000, steps=500, **ONE_DIGIT),
    # The learning rate is that of width 64 times the root of 64 / 512, between one for all widths and one that falls as
    # they grow; it is not tuned. Images are not drawn: each of their 196 codes is a forward of its own.
    "mnist 2x2, 19M": replace(
        MNIST, grid=(2, 2), hidden=512, heads=8, learning_rate=1e-3, test_scenes=2048, drawn=0, events=0,
        accelerator="gpu", precision="bf16-mixed",
    ),
}  # fmt: skip


def parsed(name: str) -> tuple[str, float]:
    """The plan of a run and its updates over those of the study.

    Example:
        >>> parsed("dense x0.6"), parsed("Share All")
        (('dense', 0.6), ('Share All', 1.0))
    """
    found = cast(re.Match[str], NAMED.fullmatch(name))
    return found["plan"], float(found["updates"] or 1)


class Spent(L.Callback):
    """Sums the FLOPs of training: those that `TokenDrop` found for each batch, and the counted ones of dense forwards.

    Args:
        dense: of a dense batch.
        drops: whether every batch runs dropped; the dense ones are then lessons beside it.
    """

    def __init__(self, dense: float, drops: bool) -> None:
        super().__init__()
        self.dense, self.drops, self.flops, self.updates = dense, drops, 0.0, 0

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.drops or (isinstance(pl_module, LearntVLM) and pl_module.lesson(batch_idx)):
            self.flops += self.dense
        if self.drops:
            self.flops += cast(Any, pl_module).flops_per_batch
        self.updates = trainer.global_step


class FirstFifth(L.Callback):
    """Lets a monitor take its figures in the first fifth of training only.

    Args:
        monitor: that has the study's `events` in it.
    """

    def __init__(self, monitor: SynergyMonitor) -> None:
        super().__init__()
        self.monitor = monitor

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.monitor.next_step > trainer.estimated_stepping_batches / 5:
            self.monitor.next_step = sys.maxsize


def dense_flops(study: FrontierStudy, plan: str) -> float:
    """FLOPs of a dense batch, the mean over the tasks of a plan: counted on the CPU for one sample, times the samples.

    Args:
        study: the size of everything.
        plan: whose tasks are meant.
    """
    one = Steps(replace(study, batch_size=1), plan, dense=True)
    return study.batch_size * one.flops() / len(one.batches)


def one_run(study: FrontierStudy, name: str, seed: int) -> dict[str, Any]:
    """Train a run and judge it on the study's split.

    Args:
        study: the size of everything, of a run of one times the updates.
        name: a plan, and its updates as in "dense x0.6".
        seed: of weights and batches.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    (plan, updates), sized = parsed(name), study.of(name)
    drops = bool(study.plan(plan).methods)
    spent = Spent(dense_flops(sized, plan) if sized.distil or not drops else 0.0, drops)
    start = time.process_time()
    with TemporaryDirectory() as folder:
        history = Path(folder) / "synergy.jsonl"
        watch: list[L.Callback] = []
        if sized.events and len(study.plan(plan).tasks) == 2:
            every = max(1, 2 * sized.steps // (5 * sized.events))
            monitor = SynergyMonitor(TASKS, every, task_loss, history=str(history))
            watch = [monitor, FirstFifth(monitor)]
        outcome = train(sized, plan, seed, callbacks=[spent, *watch])
        events = read_history(history) if history.exists() else []
    return {
        "plan": plan,
        "updates": updates,
        "seed": seed,
        "split": sized.tested,
        **{task: outcome.scores.get(task) for task in TASKS},
        "flops": spent.flops,
        "optimiser_steps": spent.updates,
        "seconds": time.process_time() - start,
        "curve": outcome.curve,
        "events": [short(event) for event in events],
        "config": {**asdict(sized), **described(sized, plan)},
    }


def described(study: FrontierStudy, plan: str) -> dict[str, Any]:
    """Methods and schedule of a plan, as text."""
    methods = {task: str(method) for task, method in study.plan(plan).methods.items()}
    schedule = study.schedule(plan)
    return {"methods": methods, "schedule": None if schedule is None else str(schedule)}


def key(row: Any) -> tuple[str, str, str, float, int]:
    """What tells one run from all others: scale, split, plan, updates and seed."""
    return row["scale"], row["split"], row["plan"], row["updates"], row["seed"]


def missing(scale: str, split: Tested, names: Sequence[str], seeds: Iterable[int], path: Path) -> list[tuple[str, int]]:
    """The runs that a file of rows does not hold yet, all plans of a seed before the next seed."""
    held = {key(row) for row in read_history(path)} if path.exists() else set()
    wanted = [(name, seed) for seed in seeds for name in names]
    return [(name, seed) for name, seed in wanted if (scale, split, *parsed(name), seed) not in held]


def run_missing(
    scale: str,
    split: Tested,
    names: Sequence[str],
    seeds: Iterable[int],
    path: Path,
    shared: Callable[[], dict[str, Any]],
    jobs: int = 1,
    scales: Mapping[str, FrontierStudy] = SCALES,
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Run what is missing; each row is appended to a file as it comes, so that a broken study goes on there.

    Args:
        scale: one of `scales`.
        split: "val" to choose, "test" to report.
        names: of runs, as `one_run` takes them.
        seeds: of each.
        path: of the rows.
        shared: what each row says of where it was made.
        jobs: runs at a time.
        scales: studies by scale.

    Yields:
        Runs done, runs due, and the row.

    Raises:
        FrontierError: an unknown scale or plan.
    """
    if scale not in scales:
        raise FrontierError(f"found the scale {scale!r}; use one of {', '.join(scales)}")
    study = replace(scales[scale], tested=split)
    for name in names:
        study.of(name)
    todo = missing(scale, split, names, seeds, path)
    with in_workers(one_run, [(study, name, seed) for name, seed in todo], jobs) as rows:
        for done, made in enumerate(rows, start=1):
            row = {"scale": scale, **made, **shared()}
            append_history(path, row)
            yield done, len(todo), row
