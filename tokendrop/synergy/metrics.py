"""The monitor's state, and synergy itself, as torchmetrics.

Shape letters: E events, G groups, N tasks, S = 2 N samples.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from tokendrop.errors import LayoutError
from tokendrop.synergy.estimates import Estimate, alignment, between, conflict, conflicting_groups, jackknife, magnitude

STATISTICS = {"alignment": alignment, "magnitude": magnitude}


class TaskProducts(Metric):
    """Products of task gradients over the last events, and what they say.

    Every rank holds the same events, so that there is nothing to reduce.

    Args:
        tasks: their names.
        window: how many events count.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> samples = torch.stack([a, a, b, b])
        >>> held = TaskProducts(("u", "g"))
        >>> held.update((samples @ samples.T)[None], torch.zeros(1, 4, 4))
        >>> held.compute()["alignment"]["u/g"].value
        0.0

    Source: ours.
    """

    grams: list[Tensor]
    shares: list[Tensor]

    def __init__(self, tasks: tuple[str, ...], window: int = 20, **kwargs: Any) -> None:
        super().__init__(sync_on_compute=False, **kwargs)
        self.tasks, self.window = tasks, window
        self.add_state("grams", default=[], dist_reduce_fx=None, persistent=False)
        self.add_state("shares", default=[], dist_reduce_fx=None, persistent=False)

    def update(self, gram: Tensor, opposed: Tensor) -> None:
        """Take an event: (G, S, S) sums of products, and (G, S, S) shares of opposed coordinates weighted by size."""
        for held, new in ((self.grams, gram), (self.shares, opposed)):
            held.append(new)
            del held[: -self.window]

    def compute(self) -> dict[str, dict[str, Estimate]]:
        """Estimates of all groups together, by statistic and pair of tasks."""
        found = {
            name: self._pairs(*jackknife(statistic, torch.stack(self.grams).sum(1)))
            for name, statistic in STATISTICS.items()
        }
        found["conflict"] = self._pairs(*jackknife(conflict, torch.stack(self.shares).sum(1)))
        found["conflicting_groups"] = self._pairs(*jackknife(conflicting_groups, torch.stack(self.grams)))
        return found

    def by_group(self) -> dict[str, list[float]]:
        """The alignment of each pair in each of the G groups."""
        cosines = alignment(torch.stack(self.grams).mean(0))
        return {pair: cosines[:, a, b].tolist() for pair, (a, b) in self.pairs.items()}

    def parts(self) -> dict[str, float]:
        """Unbiased products of the tasks' gradients, which alignment and magnitude are made of; see `between`."""
        products = between(torch.stack(self.grams).sum(1).mean(0))
        own = {f"{task}/{task}": (at, at) for at, task in enumerate(self.tasks)}
        return {pair: products[at].item() for pair, at in (own | self.pairs).items()}

    def floor(self) -> dict[str, float]:
        """The share of coordinates in which a task's own two samples are opposed."""
        shares = conflict(torch.stack(self.shares).sum(1).mean(0))
        return {task: shares[index, index].item() for index, task in enumerate(self.tasks)}

    @property
    def pairs(self) -> dict[str, tuple[int, int]]:
        """Every pair of tasks by name."""
        count = range(len(self.tasks))
        return {f"{self.tasks[a]}/{self.tasks[b]}": (a, b) for a in count for b in count if a < b}

    def _pairs(self, value: Tensor, low: Tensor, high: Tensor) -> dict[str, Estimate]:
        return {pair: Estimate(value[at].item(), low[at].item(), high[at].item()) for pair, at in self.pairs.items()}


class Synergy(Metric):
    """Quality of a unified model beyond that of each task trained alone.

    synergy[t] = mean quality of task t - baseline[t]; positive where training together helps

    Args:
        baseline: the quality of each task trained alone; higher is better.

    Raises:
        LayoutError: a task without a baseline.

    Example:
        >>> synergy = Synergy({"understanding": 0.5})
        >>> synergy.update("understanding", torch.tensor([0.75, 0.5]))
        >>> synergy.compute()
        {'understanding': tensor(0.1250)}

    Source: arXiv 2606.01503, "synergy" of Table 3.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, baseline: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.baseline = dict(baseline)
        self.add_state("total", default=torch.zeros(len(self.baseline)), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros(len(self.baseline)), dist_reduce_fx="sum")

    def update(self, task: str, quality: Tensor) -> None:
        """Take the quality of some items of a task."""
        if task not in self.baseline:
            raise LayoutError(f"task {task!r} has no baseline; those given are {', '.join(map(repr, self.baseline))}")
        index = list(self.baseline).index(task)
        self.total[index] += quality.sum()
        self.count[index] += quality.numel()

    def compute(self) -> dict[str, Tensor]:
        """The synergy of each task that was seen."""
        mean = self.total / self.count
        pairs = zip(self.baseline.items(), mean, self.count, strict=True)
        return {task: value - alone for (task, alone), value, seen in pairs if seen > 0}
