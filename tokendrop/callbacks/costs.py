"""What a batch costs under its methods, logged.

Shape letters: B batch.
"""

import lightning as L

from tokendrop.analysis.flops import task_costs
from tokendrop.engine.handle import Handle
from tokendrop.engine.plan.plan import Plan


def log_costs(
    pl_module: L.LightningModule, handle: Handle, plan: Plan, tasks: tuple[str | None, ...], training: bool
) -> None:
    """Log the kept ratio and the FLOPs ratio of each task of a batch.

    Args:
        pl_module: that logs.
        handle: of the dropped model.
        plan: of the batch.
        tasks: of its B samples.
        training: log each step; otherwise the mean of an epoch.
    """
    for task, cost in task_costs(handle, plan, tasks).items():
        name = task or next((key for key in handle.methods if key is not None), "all")
        for kind, value in (("kept_ratio", cost.kept_ratio), ("flops_ratio", cost.flops_ratio)):
            pl_module.log(
                f"tokendrop/{kind}/{name}", value, on_step=training, on_epoch=not training, batch_size=plan.shape[0]
            )
