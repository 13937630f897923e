"""What a batch costs under its methods: logged, and where Lightning's ThroughputMonitor looks for it.

Shape letters: B batch.
"""

import inspect
from typing import Any

import lightning as L

from tokendrop.analysis.spent import TaskCost, task_costs, unknown_flops
from tokendrop.engine.handle import Handle
from tokendrop.engine.plan.plan import Plan

NAME = "flops_per_batch"
_NONE = object()


def log_costs(pl_module: L.LightningModule, handle: Handle, costs: dict[str | None, TaskCost], training: bool) -> None:
    """Log the kept ratio and, where it is known, the FLOPs ratio of each task of a batch.

    Args:
        pl_module: that logs.
        handle: of the dropped model.
        costs: of each task.
        training: log each step; otherwise the mean of an epoch over the task's own tokens.
    """
    for task, cost in costs.items():
        name = task or next((key for key in handle.methods if key is not None), "all")
        kinds = {"kept_ratio": cost.kept_ratio}
        if unknown_flops(handle) is None:
            kinds["flops_ratio"] = cost.flops_ratio
        for kind, value in kinds.items():
            weight = cost.dense_token_layers
            pl_module.log(f"tokendrop/{kind}/{name}", value, on_step=training, on_epoch=not training, batch_size=weight)


class FlopsPerBatch:
    """The FLOPs of the batch under way, as `flops_per_batch` of a LightningModule that has none of its own."""

    def __init__(self) -> None:
        self._set: Any = _NONE

    def enter(
        self, pl_module: L.LightningModule, handle: Handle, plan: Plan | None, tasks: Any = (), training: bool = False
    ) -> dict[str | None, TaskCost]:
        """Set it: to those of forward and backward in training, else of a forward, and to None where nobody knows.

        Args:
            pl_module: where.
            handle: of the dropped model.
            plan: of the batch; None for one whose layouts its step enters.
            tasks: of its B samples.
            training: whether the batch is trained on.

        Returns:
            Task -> cost.
        """
        costs = {} if plan is None else task_costs(handle, plan, tasks)
        known = plan is not None and unknown_flops(handle) is None
        spent = sum(cost.flops if training else cost.forward for cost in costs.values()) if known else None
        if self._is_ours(pl_module):
            self._set = vars(pl_module)[NAME] = spent
        return costs

    def remove(self, pl_module: L.LightningModule) -> None:
        """Leave the module as it was."""
        if self._set is not _NONE and vars(pl_module).get(NAME, _NONE) is self._set:
            del vars(pl_module)[NAME]
        self._set = _NONE

    def _is_ours(self, pl_module: L.LightningModule) -> bool:
        own = vars(pl_module).get(NAME, _NONE)
        if own is not _NONE:
            return own is self._set
        # A property of the user's is not asked: it may not be ready.
        return inspect.getattr_static(pl_module, NAME, _NONE) is _NONE and NAME not in pl_module._buffers
