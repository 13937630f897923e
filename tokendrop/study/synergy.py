"""The study of synergy: the paper's Table 3 at our scale, and configurations to predict synergy from gradients."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from tokendrop.callbacks import SynergyMonitor
from tokendrop.layout import IGNORED
from tokendrop.methods import Drop, HiMix, HMGen
from tokendrop.schedule import Schedule
from tokendrop.study.runner import in_workers
from tokendrop.study.study import Run, Study
from tokendrop.study.train import train
from tokendrop.synergy.history import append_history, read_history
from tokendrop.unified.data import TASKS
from tokendrop.unified.metrics import token_nll

TABLE_3 = ("U-only", "G-only", "unified", "HiMix-U", "HMGen-G", "share-all", "share-partial")
TWICE = "U-only, twice the updates"
EVENTS = 25


@dataclass(frozen=True)
class SynergyStudy(Study):
    """The seven runs of the paper's Table 3, a control with twice the updates, and more ways to drop for both tasks.

    Example:
        >>> len(SynergyStudy().joint)
        12
    """

    steps: int = 300
    few: int = 0
    timing_rounds: int = 7

    @override
    def runs(self) -> dict[str, Run]:
        """Every run by name."""
        u, g = TASKS
        paper = {name: replace(run, updates=1.0) for name, run in super().runs().items() if name in TABLE_3}

        def both(first: Any, second: Any) -> Run:
            return Run(TASKS, {u: first, g: second})

        hmgen = HMGen(self.shallow)
        more = {
            "late": both(HiMix("2:"), hmgen),
            "late, HMGen 2 layers": both(HiMix("3:"), HMGen("2:4")),
            "HiMix late half": both(HiMix("3:"), hmgen),
            "HiMix, dense G": Run(TASKS, {u: HiMix()}),
            "HMGen, dense U": Run(TASKS, {g: hmgen}),
            "late, image-only": both(HiMix("2:", "shared"), HMGen(self.shallow, "shared")),
            "drop half for good": both(Drop("2:", keep=0.5, then="gone"), hmgen),
            "drop three quarters": both(Drop(":", keep=0.25, then="gone"), hmgen),
            "share-all, scheduled": both(HiMix(), hmgen),
        }
        return paper | {TWICE: Run((u,), {})} | more

    @property
    def joint(self) -> list[str]:
        """The runs of both tasks."""
        return [name for name, run in self.runs().items() if len(run.tasks) == 2]

    def of(self, name: str) -> "SynergyStudy":
        """The study that a run is trained under."""
        return replace(self, steps=2 * self.steps) if name == TWICE else self

    @override
    def schedule(self, name: str) -> Schedule | None:
        """When dropping sets in."""
        return Schedule(steps=self.steps) if name == "share-all, scheduled" else None


QUICK = SynergyStudy(steps=25, val_scenes=32, test_scenes=32, curve_points=2, timing_rounds=2)


def task_loss(module: L.LightningModule, batch: Any) -> Tensor:
    """The loss of the rows that have labels, as the training step takes it."""
    labels = batch["labels"]
    return token_nll(module(batch), labels).sum() / (labels[:, 1:] != IGNORED).sum()


def one_run(study: SynergyStudy, name: str, seed: int, folder: str) -> dict[str, Any]:
    """Train and test a run, its gradients watched where it has both tasks.

    Args:
        study: the size of everything.
        name: one of `study.runs()`.
        seed: of its weights and batches.
        folder: where the monitor's history goes.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sized, history = study.of(name), Path(folder) / f"{name}-{seed}.jsonl"
    history.unlink(missing_ok=True)
    watch: list[L.Callback] = []
    if name in study.joint:
        every = max(1, 2 * study.steps // EVENTS)
        watch.append(SynergyMonitor(TASKS, every, task_loss, affinity=0.01, history=str(history)))
    start = time.process_time()
    outcome = train(sized, name, seed, callbacks=watch)
    seconds = time.process_time() - start
    events = read_history(history) if history.exists() else []
    run = study.runs()[name]
    return {
        "name": name,
        "seed": seed,
        **{task: outcome.scores.get(task) for task in TASKS},
        "seconds": seconds,
        "monitor_seconds": sum(event["seconds"] for event in events),
        "events": [short(event) for event in events],
        "config": {**asdict(sized), "methods": {task: str(method) for task, method in run.methods.items()}},
    }


def short(event: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of an event of the monitor."""
    kept = ("step", "alignment", "conflict", "magnitude", "fidelity", "affinity", "noise_floor", "gap")
    return {key: event[key] for key in kept if key in event}


def missing(study: SynergyStudy, seeds: int, more_seeds: int, path: Path) -> list[tuple[str, int]]:
    """The runs and seeds that a file of rows does not hold yet, the paper's first."""
    held = {(row["name"], row["seed"]) for row in read_history(path)} if path.exists() else set()
    first = (*TABLE_3, "late", TWICE)
    wanted = [(name, seed) for seed in range(seeds) for name in first]
    wanted += [(name, seed) for seed in range(more_seeds) for name in study.runs() if name not in first]
    return [one for one in wanted if one not in held]


def run_missing(
    study: SynergyStudy,
    seeds: int,
    more_seeds: int,
    out: Path,
    shared: Callable[[], dict[str, Any]],
    workers: int = 2,
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Run what is missing, each row appended to `out`/rows.jsonl as it comes; a broken study goes on where it stopped.

    Args:
        study: the size of everything.
        seeds: of the paper's runs; they are 0, 1, ...
        more_seeds: of the others.
        out: folder.
        shared: what each row says of where it was made.
        workers: runs at a time.

    Yields:
        Runs done, runs due, and the row.
    """
    out.mkdir(parents=True, exist_ok=True)
    todo = missing(study, seeds, more_seeds, out / "rows.jsonl")
    with in_workers(one_run, [(study, name, seed, str(out)) for name, seed in todo], workers) as rows:
        for done, row in enumerate(rows, start=1):
            row |= shared()
            append_history(out / "rows.jsonl", row)
            yield done, len(todo), row
