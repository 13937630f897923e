"""What a step of each run costs: FLOPs counted, bytes kept for the backward, and seconds side by side."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from tokendrop.analysis.flops import counter
from tokendrop.analysis.memory import saved_bytes
from tokendrop.engine.inject import apply
from tokendrop.study.study import Study
from tokendrop.study.train import Progress
from tokendrop.unified.data import Batch, layout_of

WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Cost:
    """What an optimiser step of a run costs, averaged over its tasks.

    Args:
        flops_ratio: FLOPs of its training over those of dense joint training, forward and backward.
        step_seconds: median seconds of a step.
        step_seconds_spread: half the interquartile range of the timed steps.
        timed_steps: how many steps were timed, of each task.
        peak_bytes: bytes that the forward keeps for the backward, parameters aside; the largest of its tasks.
    """

    flops_ratio: float
    step_seconds: float
    step_seconds_spread: float
    timed_steps: int
    peak_bytes: int


class Steps:
    """The optimiser steps of a run: an untrained model, and one batch for each step of its mix.

    Args:
        study: the size of everything.
        name: one of `study.runs()`.
        dense: leave the run's methods out.
    """

    def __init__(self, study: Study, name: str, dense: bool = False) -> None:
        run = study.runs()[name]
        self.model, train = study.model(seed=0), study.data(run, seed=0).train
        self.batches = [train[index] for index in range(len(train) // study.batches(run))]
        self._drop = apply(self.model, dict(run.methods)) if run.methods and not dense else None
        self._optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self, batch: Batch) -> None:
        """Forward, backward and update on one batch."""
        with self.layout(batch):
            self.model.training_step(batch).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def layout(self, batch: Batch) -> AbstractContextManager[object]:
        """What a batch runs under."""
        return nullcontext() if self._drop is None else self._drop.layout(layout_of(batch))

    def flops(self) -> int:
        """Counted FLOPs of forward and backward, over one step of each batch."""
        with counter() as counted:
            for batch in self.batches:
                with self.layout(batch):
                    self.model.training_step(batch).backward()
        self._optimizer.zero_grad()
        return counted.get_total_flops()

    def peak_bytes(self) -> int:
        """The largest number of bytes that a forward keeps for its backward."""
        return max(self._saved_bytes(batch) for batch in self.batches)

    def _saved_bytes(self, batch: Batch) -> int:
        with self.layout(batch):
            return saved_bytes(lambda: self.model.training_step(batch), self.model.parameters())


def costs(study: Study, progress: Progress = lambda done, due: None) -> dict[str, Cost]:
    """The cost of every run of a study, timed side by side: each round times one step mix of each run in turn.

    Args:
        study: the size of everything.
        progress: called with rounds done and due.
    """
    names = list(study.runs())
    steps = {name: Steps(study, name) for name in names}
    whole = steps["unified"].flops()
    ratios = {name: run.updates * steps[name].flops() / whole for name, run in study.runs().items()}
    peaks = {name: steps[name].peak_bytes() for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM_UP_ROUNDS, study.timing_rounds):
        for name, one in steps.items():
            elapsed = _mean_seconds(one)
            if turn >= 0:
                seconds[name].append(elapsed)
        progress(max(0, turn + 1), study.timing_rounds)
    return {name: _cost(ratios[name], seconds[name], peaks[name]) for name in names}


def _mean_seconds(steps: Steps) -> float:
    started = time.perf_counter()
    for batch in steps.batches:
        steps.step(batch)
    return (time.perf_counter() - started) / len(steps.batches)


def _cost(ratio: float, seconds: list[float], peak: int) -> Cost:
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    spread = max(float(high - low) / 2, time.get_clock_info("perf_counter").resolution)
    return Cost(ratio, float(middle), spread, len(seconds), peak)
