"""What `tokendrop analyze` looks at when it is given nothing else: the demo's dense model, trained on both tasks."""

from collections.abc import Callable
from typing import Any

import lightning as L

from tokendrop.layout import TokenLayout
from tokendrop.study.study import Study
from tokendrop.unified.data import layout_of
from tokendrop.unified.model import UnifiedVLM

BATCHES = 4


def trained_dense(
    study: Study, seed: int = 0
) -> tuple[UnifiedVLM, list[Any], Callable[[Any], TokenLayout], Callable[[Any], Any]]:
    """The dense run of both tasks, and batches of them that it has not seen.

    Args:
        study: the size of everything.
        seed: of its weights and batches.

    Returns:
        Model, batches, their layout, and the loss of one.
    """
    run, model = study.runs()["unified"], study.model(seed)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_val_batches=0, gradient_clip_val=1.0, **quiet)
    trainer.fit(model, datamodule=study.data(run, seed))
    unseen = study.data(run, seed + 1000).train
    return model, [unseen[index] for index in range(2 * min(BATCHES, study.steps))], layout_of, model.training_step
