"""SynergyMonitor on two ranks with other tasks on each, against one process that sees the same batches."""

import logging
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gradients import Case, batch, llama, whole
from lightning_ranks import STEPS, RankBatches, Step, trainer
from ranks import RANKS
from torch import Tensor
from torch.nn.functional import cross_entropy

import tokendrop as td
from tokendrop.synergy import read_history


def loss(module: L.LightningModule, given: dict[str, Any]) -> Tensor:
    """Mean over the labels that are left, and what all batches have in common, so that norms are resolved."""
    logits = module.model(given["input_ids"]).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), given["labels"][:, 1:].flatten()) + 10 * logits.square().mean()


class Still(Step):
    """Its weights do not move."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def watched(path: Path) -> td.SynergyMonitor:
    options = {"affinity": 0.01, "history": str(path), "loss": loss}
    return td.SynergyMonitor(("u", "g"), every_n_steps=len(STEPS), **options)


def on_rank(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    """What the monitor logs on this rank, for each case."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return [_one(rank, case) | {"same": _same(rank, case)} for case in cases]


class Left(L.Callback):
    """The gradients that are there when a batch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.grads: list[Tensor | None] = []
        self.trained: list[torch.nn.Parameter] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trained = list(pl_module.parameters())  # after a forward, FSDP2's root shows others

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        grads = [one.grad for one in self.trained]
        self.grads += [None if one is None else whole(one).clone() for one in grads]


def _same(rank: int, case: Case) -> bool:
    """Whether training with the monitor, of all parameters or of some, is training without it, to the bit."""
    runs, left = [], []
    for looked in (None, (), ("model.model.layers.0.",)):
        module, run = Step(case, applied=case.wrap == "fsdp" and case.separate != "none"), trainer(rank, case)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if looked is not None:
                watch = watched(Path(folder) / "synergy.jsonl")
                watch.every_n_steps, watch.next_step, watch.params = 1, 1, looked or None
                run.callbacks.append(watch)
            run.callbacks.append(Left())
            run.fit(module, RankBatches(rank))
        runs.append([whole(value.detach()).clone() for value in module.parameters()])
        left.append(run.callbacks[-1].grads)
    return all(_equal(one, other) for found in (runs, left) for one, other in pairwise(found))


def _equal(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def _one(rank: int, case: Case) -> dict[str, Any]:
    module = Still(case, applied=case.wrap == "fsdp" and case.separate != "none")
    run = trainer(rank, case)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.callbacks.append(watched(Path(folder) / "synergy.jsonl"))
        run.fit(module, RankBatches(rank))
        logged = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("synergy/")}
        return logged | {"events": len(read_history(Path(folder) / "synergy.jsonl")) if rank == 0 else None}


class Alone(L.LightningModule):
    """The same model in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def training_step(self, given: dict[str, Any], index: int) -> Tensor:
        return loss(self, given)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Newest:
    """The newest batches of both ranks, one after another."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        # Of "u" those of rank 0 in step 1 and of rank 1 in step 2, of "g" those of rank 0 in step 2 and of rank 1 in
        # step 1; each rank lists its newest first.
        for step, rank in ((1, 0), (2, 1), (2, 0), (1, 1)):
            tasks = STEPS[step]
            ids, layout = batch(tasks[rank], 0 if rank == 0 else len(tasks[0]))
            yield {"input_ids": ids, "image_mask": layout.image, "labels": layout.labels, "task": list(layout.task)}


def alone(case: Case, folder: Path) -> dict[str, Any]:
    """What the monitor logs in one process."""
    watch = watched(folder / "synergy.jsonl")
    watch.every_n_steps = watch.next_step = 4
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    callbacks = [td.TokenDrop(case.methods, multiple=4), watch]
    run = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=callbacks, **quiet)
    run.fit(Alone(), Newest())
    return {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("synergy/")}


assert RANKS == 2
