"""One run of the study: trained, tested, and its curve and pictures kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from tokendrop.study.study import Study
from tokendrop.unified.data import TASKS
from tokendrop.unified.judge import judge

Progress = Callable[[int, int], None]
PICTURES = 6


@dataclass(frozen=True)
class Picture:
    """An image asked for and made: its caption and its (rows * H, columns * W) pixels from 0 to 1."""

    caption: str
    pixels: NDArray[np.float32]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        name: of the run.
        seed: of its weights and batches.
        scores: task -> metric -> value on the test split.
        curve: (batches per task, task -> validation NLL), in order.
        pictures: images it made for the first test captions.
    """

    name: str
    seed: int
    scores: dict[str, dict[str, float]]
    curve: list[tuple[int, dict[str, float]]]
    pictures: list[Picture]


class Witness(L.Callback):
    """Keeps a run's learning curve and first pictures, and says how far it is.

    Args:
        steps: training batches of each task.
        progress: called with optimiser steps done and due.
    """

    def __init__(self, steps: int, progress: Progress) -> None:
        super().__init__()
        self.steps, self.progress = steps, progress
        self.curve: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[Picture] = []

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.progress(trainer.global_step, int(trainer.num_training_batches))

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seen = {task: trainer.callback_metrics.get(f"val/{task}/nll") for task in TASKS}
        done = round(self.steps * trainer.global_step / trainer.num_training_batches)
        self.curve.append((done, {task: float(nll) for task, nll in seen.items() if nll is not None}))

    @override
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        room = PICTURES - len(self.pictures)
        if "codes" not in outputs or room <= 0:
            return
        scenes = pl_module.scenes
        captions = scenes.captions_in(batch)[:room].numpy(force=True)
        pixels = scenes.pictures(outputs["codes"][:room].numpy(force=True))
        self.pictures += [Picture(scenes.vocabulary.text(c), p) for c, p in zip(captions, pixels, strict=True)]


def train(
    study: Study,
    name: str,
    seed: int,
    progress: Progress = lambda done, due: None,
    callbacks: Sequence[L.Callback] = (),
) -> Outcome:
    """Train and test one run.

    Args:
        study: the size of everything.
        name: one of `study.runs()`.
        seed: of its weights and batches.
        progress: called with optimiser steps done and due.
        callbacks: more of them.
    """
    torch.manual_seed(seed)  # routers begin at random, and a worker has made other runs before
    run = study.runs()[name]
    data, model = study.data(run, seed), study.model(seed)
    witness = Witness(study.batches(run), progress)
    drop = study.callback(name)
    trainer = L.Trainer(
        accelerator=study.accelerator,
        precision=study.precision,
        devices=1,
        max_epochs=1,
        val_check_interval=max(1, len(data.train) // study.curve_points),
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[*([] if drop is None else [drop]), witness, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    scores = {
        task: {key.rsplit("/", 1)[1]: value for key, value in tested.items() if key.startswith(f"test/{task}/")}
        for task in run.tasks
    }
    if "agreement" in scores.get("generation", {}):
        scores["generation"]["judge_accuracy"] = judge(study.source).accuracy
    return Outcome(name, seed, scores, witness.curve, witness.pictures)
