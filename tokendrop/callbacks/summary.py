"""What is to be seen at the start of a training: a table of what each task drops, and its settings in loggers.

Shape letters: B batch, T tokens, L layers.
"""

import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokendrop.analysis.inspection import refusals
from tokendrop.analysis.spent import task_costs, unknown_flops
from tokendrop.config import described
from tokendrop.engine.handle import Handle
from tokendrop.engine.plan.plan import Planner
from tokendrop.engine.summary import IMAGES, computed_share, in_words
from tokendrop.engine.support import Methods
from tokendrop.errors import NoEffectWarning
from tokendrop.layout import TokenLayout
from tokendrop.roles import Method
from tokendrop.routes import route_of
from tokendrop.schedule import Schedule

TEXT = 64
HEADER = ("task", "method", "image tokens", "computed", "FLOPs")


def show_summary(trainer: L.Trainer, handle: Handle, schedule: Schedule | None) -> None:
    """Print the table on rank zero, where Lightning prints its own of the model (`enable_model_summary`)."""
    if not trainer.is_global_zero or not any(isinstance(one, ModelSummary) for one in trainer.callbacks):  # ty: ignore
        return
    shown = Table(title="TokenDrop", title_justify="left")
    for name in HEADER:
        shown.add_column(name, justify="right" if name in HEADER[3:] else "left")
    for row in summary_rows(handle):
        shown.add_row(*map(Text, row))  # no word of the user's is a style
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(shown)
    for note in summary_notes(handle, schedule):
        console.print(note, soft_wrap=True)


def summary_rows(handle: Handle) -> list[tuple[str, ...]]:
    """For each task its method, what image tokens do, and the shares of their token-layers and of the FLOPs left."""
    rows = []
    for task, method in handle.methods.items():
        name = task or "any"
        if method is None:
            rows.append((name, "dense", "", "100%", "100%"))
            continue
        route = route_of(method, len(handle.layers))
        ratio = flops_ratio(handle, task, method)
        shares = (f"{computed_share(route):.0%}", "unknown" if ratio is None else f"{ratio:.0%}")
        rows.append((name, str(method), in_words(route), *shares))
    return rows


def flops_ratio(handle: Handle, task: str | None, method: Method) -> float | None:
    """FLOPs of a step over dense ones, for a sample of 576 image tokens and then 64 of text, the method whole."""
    if unknown_flops(handle) is not None:
        return None
    at = torch.arange(IMAGES + TEXT)[None]
    layout = TokenLayout(at < IMAGES, frames=torch.zeros_like(at))
    plan = Planner(layout, [route_of(method, len(handle.layers))], [handle.names.get(task)], handle.multiple).plan()
    (cost,) = task_costs(handle, plan, (task,)).values()
    return cost.flops_ratio


def summary_notes(handle: Handle, schedule: Schedule | None) -> list[str]:
    """What the table's figures are of, when dropping sets in, and what runs dense or is refused."""
    methods = handle.methods.values()
    notes = [f"For {IMAGES} image and {TEXT} text tokens a sample; FLOPs of decoder and head, forward and backward."]
    if reason := unknown_flops(handle):
        notes.append(f"FLOPs are unknown: {reason}.")
    notes.append("Whole from the first step on." if schedule is None else f"Switched on and off by {schedule}.")
    trained = sorted({type(one).__name__ for one in methods if getattr(one, "training_only", False)})
    if trained:
        notes.append(f"Evaluation runs dense under {', '.join(trained)}.")
    if None not in handle.methods:
        notes.append("Samples of any other task run dense, and so do samples without images.")
    refused = refusals(handle.owner, handle.decoder_layers, handle.path, handle.specs)
    if refused:
        notes.append(
            f"Refused in this model, with the reason in tokendrop.inspect of it undropped: {', '.join(refused)}."
        )
    return notes


def log_methods(trainer: L.Trainer, pl_module: L.LightningModule, methods: Methods, schedule: Schedule | None) -> None:
    """Put methods and schedule beside the user's hyperparameters in each logger, as `to_config` writes them.

    Args:
        trainer: whose loggers these are.
        pl_module: whose hyperparameters, with those of the data module, Lightning logs after this.
        methods: in force.
        schedule: in force.
    """
    if not trainer.is_global_zero:
        return
    own: dict[str, Any] = {}
    for one in (pl_module, getattr(trainer, "datamodule", None)):
        # What Lightning logs itself; TensorBoard shows the first that it is given, so both go together.
        own |= dict(one.hparams_initial) if one is not None and one._log_hyperparams else {}
    own.pop("_class_path", None)
    name = "tokendrop"
    while name in own:
        name += "_"
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams({**own, name: described(methods, schedule)})
        except Exception as reason:
            warnings.warn(
                f"{type(logger).__name__} took no methods as hyperparameters: {reason}; they are in the checkpoint",
                NoEffectWarning,
                stacklevel=2,
            )
