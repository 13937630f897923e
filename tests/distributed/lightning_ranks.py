"""A Lightning Trainer on two ranks against one process on the union of their batches."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gradients import SCALE, Case, backward, batch, differences, llama, relative, shard, whole
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import RANKS
from torch import Tensor
from torch.nn.functional import cross_entropy

import tokendrop as td

STEPS = ((("u", "g"), ("g", "u", "dense")), (("u", "u"), ("g",)), (("g",), ("text", "u")))


class Step(L.LightningModule):
    """The tiny Llama, sharded in configure_model where asked.

    Args:
        case: how it is wrapped.
        applied: whether it is dropped where it is made, so that the root of fully_shard holds the projections.
    """

    def __init__(self, case: Case, applied: bool) -> None:
        super().__init__()
        self.case, self.applied = case, applied
        self.model = None if applied else llama()

    def configure_model(self) -> None:
        if self.applied:
            self.model = llama()
            td.apply(self.model, self.case.methods, multiple=4)
        if self.case.wrap == "fsdp":
            shard(self.model, self.device_mesh["data_parallel"])

    def training_step(self, given: dict[str, Any], index: int) -> Tensor:
        logits = self.model(given["input_ids"]).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), given["labels"][:, 1:].flatten(), reduction="sum") / SCALE

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class RankBatches:
    """This rank's batch of each step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return len(STEPS)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for tasks in STEPS:
            ids, layout = batch(tasks[self.rank], 0 if self.rank == 0 else len(tasks[0]))
            yield {"input_ids": ids, "image_mask": layout.image, "labels": layout.labels, "task": list(layout.task)}


def by_hand(case: Case) -> dict[str, Tensor]:
    """The parameters after the same steps in one process."""
    model = llama()
    drop = td.apply(model, case.methods, multiple=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for tasks in STEPS:
        backward(model, drop, tasks[0] + tasks[1], 0, SCALE * RANKS)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def trainer(rank: int, case: Case) -> L.Trainer:
    """A Trainer of both ranks, who have met already."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    fsdp = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        strategy=fsdp if case.wrap == "fsdp" else "ddp",
        plugins=[TorchElasticEnvironment()],
        callbacks=[td.TokenDrop(case.methods, multiple=4)],
        accelerator="cpu",
        devices=RANKS,
        max_epochs=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        **quiet,
    )


def train(rank: int, case: Case) -> tuple[float, list[str], list[str]]:
    """How far the trained parameters are from the ones by hand; what was logged; warnings."""
    module = Step(case, applied=case.wrap == "fsdp" and case.separate != "none")
    run = trainer(rank, case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, RankBatches(rank), RankBatches(rank))
    check_saved(run, case)
    found = {name.removeprefix("model."): whole(value.detach()) for name, value in module.named_parameters()}
    expected = by_hand(case)
    if found.keys() != expected.keys():
        raise AssertionError(f"parameters {found.keys() ^ expected.keys()}")
    worst = max(relative(found[name], value.detach()) for name, value in expected.items())
    return worst, sorted(run.callback_metrics), sorted({str(one.message) for one in caught})


def check_saved(run: L.Trainer, case: Case) -> None:
    """The checkpoint, one file or a folder of shards, says under which methods it was made."""
    with tempfile.TemporaryDirectory() as folder:
        run.save_checkpoint(Path(folder) / "it.ckpt")
        if run.is_global_zero and td.methods_of(Path(folder) / "it.ckpt") != (case.methods, None):
            raise AssertionError(f"the checkpoint says {td.methods_of(Path(folder) / 'it.ckpt')}")


def refusal(rank: int, case: Case) -> str:
    """What a Trainer says to a module that shards its model, and leaves the projections outside."""
    module = Step(case, applied=False)
    try:
        trainer(rank, case).fit(module, RankBatches(rank))
    except td.UnsupportedError as error:
        return str(error)
    return "nothing"


def everything(rank: int, cases: list[Case], trained: list[Case], refused: Case) -> tuple[Any, Any, str]:
    """All that needs two ranks and the right engine."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return differences(rank, cases), [train(rank, case) for case in trained], refusal(rank, refused)
