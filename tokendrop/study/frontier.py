"""Quality of both tasks against the FLOPs of training: the regime, the plans, and one run of one of them.

Shape letters: L layers.
"""

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from typing_extensions import override

from tokendrop.errors import TokenDropError
from tokendrop.methods import Drop, HiMix, HMGen, RandomLTD
from tokendrop.roles import Method
from tokendrop.schedule import Schedule
from tokendrop.study.costs import Steps
from tokendrop.study.study import Run, Study
from tokendrop.study.train import train
from tokendrop.synergy.history import append_history, read_history
from tokendrop.unified.data import TASKS, Question, Scenes
from tokendrop.unified.datamodule import Tested, UnifiedData
from tokendrop.unified.model import UnifiedVLM

ALONE, JOINT, PLACEBO = ("U alone", "G alone"), "dense", "placebo G"
NAMED = re.compile(r"(?P<plan>.+?)(?: x(?P<updates>\d*\.?\d+))?")


class FrontierError(TokenDropError, ValueError):
    """A run or a scale that the study of the frontier does not have."""


@dataclass(frozen=True)
class Plan(Run):
    """What is trained, and under what.

    Args:
        tasks: one or both.
        methods: task -> method; a task without one is dense.
        schedule: from the number of optimiser updates of the run; None drops throughout.
        placebo: captions of generation are shuffled among images.
    """

    schedule: Callable[[int], Schedule] | None = None
    placebo: bool = False


def _joint(u: Method | None, g: Method | None, schedule: Callable[[int], Schedule] | None = None) -> Plan:
    found = {task: one for task, one in zip(TASKS, (u, g), strict=True) if one is not None}
    return Plan(TASKS, found, schedule)


def _tail(share: float) -> Callable[[int], Schedule]:
    return lambda updates: Schedule(dense_tail=round(share * updates))


def plans(layers: int) -> dict[str, Plan]:
    """Every plan by name, for a decoder of L layers, a multiple of 6; names give layers as those of 6.

    Example:
        >>> plans(6)["U 2:, G 2:5 skipped"].methods["generation"]
        HMGen(shallow='2:5', separate='none')
    """
    if layers % 6:
        raise FrontierError(f"layers: found {layers}; plans are written for 6 layers or a multiple of it")

    def at(start: int, stop: int | None = None, step: int = 1) -> str:
        deep = layers // 6
        last = "" if stop is None else str(layers - deep * (6 - stop))
        return f"{deep * start}:{last}" + (f":{step}" if step > 1 else "")

    u, g = ((task,) for task in TASKS)
    late, alternate, middle = HiMix(at(2)), HMGen(at(1, 5, 2)), HMGen(at(2, 5))

    def some(then: Any, score: str = "random") -> Drop:
        return Drop(at(1, 5), 0.25, score, then)

    def twice(one: Method, schedule: Callable[[int], Schedule] | None = None) -> Plan:
        return _joint(one, one, schedule)

    return {
        ALONE[0]: Plan(u, {}),
        ALONE[1]: Plan(g, {}),
        JOINT: Plan(TASKS, {}),
        PLACEBO: Plan(TASKS, {}, placebo=True),
        "Share All": _joint(HiMix(), alternate),
        "Share Partial": _joint(HiMix(separate="per-task"), HMGen(at(1, 5, 2), "per-task")),
        # Where in depth, for each task: U reads its image in the first layers, G needs the last ones.
        "U 2:, G 1:5:2 skipped": _joint(late, alternate),
        "U 2:, G 2:5 skipped": _joint(late, middle),
        "U 3:, G 1:5 skipped": _joint(HiMix(at(3)), HMGen(at(1, 5))),
        "U 1:, G 2:4 skipped": _joint(HiMix(at(1)), HMGen(at(2, 4))),
        # Image tokens that stay visible for G, too, in its own layers or in those of U.
        "U 2:, G 2:5 visible": _joint(late, HiMix(at(2, 5))),
        "both 2:5 visible": twice(HiMix(at(2, 5))),
        # A random quarter over the middle range in both tasks, and a dense end.
        "quarter rejoins, dense end": twice(some("rejoin"), _tail(0.2)),
        "quarter, rest visible, dense end": twice(some("context"), _tail(0.2)),
        "RandomLTD quarter, dense end": twice(RandomLTD(at(1, 5), 0.25), _tail(0.2)),
        # Severe at first, dense at the end; or dense now and then, an odd number so that both tasks have their turn.
        "Share All, growing": _joint(
            HiMix(), alternate, lambda updates: Schedule(steps=round(0.9 * updates), direction="out")
        ),
        "both 1:5 visible, dense end": twice(HiMix(at(1, 5)), _tail(0.2)),
        "U 2:, G 2:5 skipped, each 5th dense": _joint(late, middle, lambda updates: Schedule(dense_every=5)),
    }


@dataclass(frozen=True)
class FrontierStudy(Study):
    """The size of everything at one scale: understanding has few images, generation all others.

    Args:
        few: training images of understanding.
        question: what understanding is asked.
        placebo: captions of generation are shuffled.
        tested: the split of every figure: "val" to choose, "test" to report.
        drawn: images that are drawn for the agreement of generation, rounded up to a batch.

    Example:
        >>> FrontierStudy(steps=100).of("dense x0.6").steps
        60
    """

    few: int = 300
    question: Question = "caption"
    placebo: bool = False
    tested: Tested = "val"
    drawn: int = 128
    test_scenes: int = 4096
    val_scenes: int = 256
    curve_points: int = 5

    @override
    def runs(self) -> dict[str, Run]:
        """Every plan by name."""
        return dict(plans(self.layers))

    @property
    @override
    def scenes(self) -> Scenes:
        return Scenes(self.source, self.grid, self.codes, self.few, self.question, self.placebo)

    @override
    def data(self, run: Run, seed: int) -> UnifiedData:
        sizes = {"val_scenes": self.val_scenes, "test_scenes": self.test_scenes, "tested": self.tested}
        made: Any = {"steps": self.steps, "batch_size": self.batch_size, "update": self.update, **sizes}
        return UnifiedData(self.scenes, run.tasks, seed=seed, **made)

    @override
    def model(self, seed: int) -> UnifiedVLM:
        sizes = self.hidden, self.layers, self.heads, self.learning_rate
        return UnifiedVLM(self.scenes, *sizes, seed, self.drawn)

    def of(self, name: str) -> "FrontierStudy":
        """The study that a run is trained under: `plan`, or `plan x0.6` for 0.6 of the updates."""
        plan, updates = parsed(name)
        placebo = self.plan(plan).placebo
        return replace(self, steps=round(updates * self.steps), placebo=placebo)

    def plan(self, name: str) -> Plan:
        """A plan by its name.

        Raises:
            FrontierError: there is none of that name.
        """
        found = plans(self.layers)
        if name not in found:
            raise FrontierError(f"found the plan {name!r}; use one of {', '.join(found)}")
        return found[name]

    @override
    def schedule(self, name: str) -> Schedule | None:
        """When dropping sets in and ends."""
        plan = self.plan(name)
        return None if plan.schedule is None else plan.schedule(self.steps * len(plan.tasks))


MNIST = FrontierStudy("mnist", few=500, steps=250)
SCALES = {
    "digits": FrontierStudy(),
    "digits, 12 layers": FrontierStudy(layers=12),
    "mnist": MNIST,
    "mnist, 12 layers": replace(MNIST, layers=12),
    "mnist 2x2": replace(MNIST, grid=(2, 2)),
}


def parsed(name: str) -> tuple[str, float]:
    """The plan of a run and its updates over those of the study.

    Example:
        >>> parsed("dense x0.6"), parsed("Share All")
        (('dense', 0.6), ('Share All', 1.0))
    """
    found = cast(re.Match[str], NAMED.fullmatch(name))
    return found["plan"], float(found["updates"] or 1)


class Spent(L.Callback):
    """Sums the FLOPs of training: those that `TokenDrop` found for each batch, or, in a dense run, the counted ones.

    Args:
        dense: of a batch, where nothing drops.
    """

    def __init__(self, dense: float | None) -> None:
        super().__init__()
        self.dense, self.flops, self.updates = dense, 0.0, 0

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.flops += self.dense if self.dense is not None else cast(Any, pl_module).flops_per_batch
        self.updates = trainer.global_step


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
    steps = Steps(sized, plan, dense=True)
    spent = Spent(None if study.plan(plan).methods else steps.flops() / len(steps.batches))
    start = time.process_time()
    outcome = train(sized, plan, seed, callbacks=[spent])
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
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Run what is missing; each row is appended to a file as it comes, so that a broken study goes on there.

    Args:
        scale: one of `SCALES`.
        split: "val" to choose, "test" to report.
        names: of runs, as `one_run` takes them.
        seeds: of each.
        path: of the rows.
        shared: what each row says of where it was made.
        jobs: runs at a time.

    Yields:
        Runs done, runs due, and the row.

    Raises:
        FrontierError: an unknown scale or plan.
    """
    if scale not in SCALES:
        raise FrontierError(f"found the scale {scale!r}; use one of {', '.join(SCALES)}")
    study = replace(SCALES[scale], tested=split)
    for name in names:
        study.of(name)
    todo = missing(scale, split, names, seeds, path)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        running = [pool.submit(one_run, study, name, seed) for name, seed in todo]
        try:
            for done, job in enumerate(as_completed(running), start=1):
                row = {"scale": scale, **job.result(), **shared()}
                append_history(path, row)
                yield done, len(todo), row
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
