"""All runs of a study in worker processes, then their timing alone, and the rows that come of it."""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any

import torch

from tokendrop.analysis.where import made_where
from tokendrop.study.costs import Cost, costs
from tokendrop.study.study import Study
from tokendrop.study.train import Outcome, train

Event = tuple[str, int, int | None]
Watch = Callable[[str, int, int | None], None]
TIMING = "timing side by side"

_events: "Queue[Event] | None" = None


@dataclass(frozen=True)
class Finished:
    """A study that has run: what each run came to, by seed and in the order of the study, and what each costs."""

    study: Study
    outcomes: tuple[Outcome, ...]
    costs: Mapping[str, Cost]

    def rows(self) -> list[dict[str, Any]]:
        """One mapping for each run and seed, of plain values."""
        return [self._row(outcome) | made_where() for outcome in self.outcomes]

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        run = self.study.runs()[outcome.name]
        methods = {task: str(method) for task, method in run.methods.items()}
        return {
            "name": outcome.name,
            "seed": outcome.seed,
            "understanding": outcome.scores.get("understanding"),
            "generation": outcome.scores.get("generation"),
            **asdict(self.costs[outcome.name]),
            "steps": len(self.study.data(run, outcome.seed).train),
            "config": {**asdict(self.study), "tasks": list(run.tasks), "methods": methods},
        }


def run_study(study: Study, seeds: int = 1, workers: int = 2, watch: Watch = lambda job, done, due: None) -> Finished:
    """Train every run of a study with every seed, one thread each; then time all of them with the machine to itself.

    Args:
        study: the size of everything.
        seeds: how many; they are 0, 1, ...
        workers: runs at a time.
        watch: called with the name of a job, the steps done and the steps due (None where unknown).
    """
    context = get_context("spawn")  # a forked torch deadlocks in its thread pools
    events: Queue[Event] = context.Queue()
    names = list(study.runs())
    # The long ones first: the last to start should be short.
    order = sorted(names, key=lambda name: -len(study.runs()[name].tasks))
    with ProcessPoolExecutor(workers, context, _prepare, (events,)) as pool:
        try:
            jobs = {(seed, name): pool.submit(_train, study, name, seed) for seed in range(seeds) for name in order}
            _follow(jobs.values(), events, watch)
            timing = pool.submit(_time, study)
            _follow([timing], events, watch)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    outcomes = tuple(jobs[seed, name].result() for seed in range(seeds) for name in names)
    return Finished(study, outcomes, timing.result())


@contextmanager
def in_workers(call: Callable[..., Any], todo: Iterable[tuple[Any, ...]], workers: int) -> Generator[Iterator[Any]]:
    """What a function makes of its arguments, in processes, as it comes; an error ends the calls that wait."""
    with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
        jobs = [pool.submit(call, *arguments) for arguments in todo]
        try:
            yield (job.result() for job in as_completed(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def job_name(name: str, seed: int) -> str:
    """How a run is called while it runs."""
    return f"{name}, seed {seed}"


def _follow(jobs: Iterable[Future[Any]], events: "Queue[Event]", watch: Watch) -> None:
    waiting = set(jobs)
    while waiting:
        done, waiting = wait(waiting, timeout=0.2)
        for job in done:
            job.result()
        # The last words of a job may come a moment after its end.
        patience = 0.0 if waiting else 0.2
        with suppress(Empty):
            while True:
                watch(*events.get(timeout=patience))


def _prepare(events: "Queue[Event]") -> None:
    global _events
    _events = events
    events.cancel_join_thread()  # after an error nobody reads, and a full pipe would keep the worker alive
    torch.set_num_threads(1)
    end_with_parent()
    # The demo's own progress and table are all its output: Lightning's hints on loggers and workers do not apply.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")


def end_with_parent() -> None:
    """Let this worker end when its parent does: a pool ends its workers, but not where its process was killed."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tell(job: str, done: int, due: int | None) -> None:
    if _events is not None:
        _events.put((job, done, due))


def _train(study: Study, name: str, seed: int) -> Outcome:
    job = job_name(name, seed)
    _tell(job, 0, None)
    return train(study, name, seed, lambda done, due: _tell(job, done, due))


def _time(study: Study) -> dict[str, Cost]:
    return costs(study, lambda done, due: _tell(TIMING, done, due))
