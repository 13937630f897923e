"""Training that is killed and goes on, on one rank or several, in processes forked from one that has imported all."""

import logging
import os
import random
import signal
import warnings
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from gradients import batch, llama, shard
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn.functional import cross_entropy

import tokendrop as td
from tokendrop.callbacks import synergy_monitor
from tokendrop.synergy.history import append_history

METHODS = {
    "u": td.HiMix("1:", separate="per-task"),
    "g": td.RandomLTD("1:3", keep=0.4, seed=3),
    "d": td.Drop("2:", keep=2, score="random", seed=5),
}
TASKS = (("u", "g"), ("d", "u"), ("g",), ("u", "text", "d"))
BATCHES, EPOCHS = 9, 2
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end", "history")


class Resumable:
    """Batches that go on where a checkpoint says."""

    def __init__(self, rank: int) -> None:
        self.rank, self.at, self.begin = rank, 0, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first, self.begin = self.begin, 0
        for self.at in range(first + 1, BATCHES + 1):
            tasks = TASKS[(self.at + self.rank) % len(TASKS)]
            ids, layout = batch(tasks, 100 * self.at + 10 * self.rank)
            names = ["u" if task == "text" else task for task in tasks]
            yield {"input_ids": ids, "image_mask": layout.image, "labels": layout.labels, "task": names}

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at % BATCHES}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["at"]


class Watched(L.LightningModule):
    """The tiny Llama with AdamW and a falling learning rate."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.sharded, self.model = sharded, None

    def configure_model(self) -> None:
        self.model = llama()
        if self.sharded:
            td.apply(self.model, METHODS, multiple=4)
            shard(self.model, self.device_mesh["data_parallel"])

    def training_step(self, given: dict[str, Any], index: int) -> Tensor:
        return loss(self, given)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loss(module: L.LightningModule, given: dict[str, Any]) -> Tensor:
    """Mean over the labels that are left, and what all batches have in common, so that norms are resolved."""
    logits = module.model(given["input_ids"]).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), given["labels"][:, 1:].flatten()) + logits.square().mean()


class Killer(L.Callback):
    """SIGKILL to its own process in a hook, at a batch or soon after."""

    def __init__(self, hook: str, at: int) -> None:
        self.at = at
        if hook == "history":
            synergy_monitor.append_history = self._half_a_line
        else:
            setattr(self, hook, self._kill)

    def _kill(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx >= self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _half_a_line(self, path: Path, event: dict[str, Any]) -> None:
        append_history(path, event)
        if event["step"] >= self.at:
            os.truncate(path, path.stat().st_size - 9)
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(folder: Path, rank: int, ranks: int, wrap: str, killer: Killer | None) -> L.Trainer:
    """With every callback; it saves after each second step."""
    watch = td.SynergyMonitor(
        ("u", "g"), every_n_steps=3, loss=loss, affinity=0.01, window=3, history=str(folder / "synergy.jsonl")
    )
    schedule = td.Schedule(start=2, steps=9, dense_tail=2)
    callbacks = [
        td.TokenDrop(METHODS, schedule=schedule, multiple=4),
        *([killer] if killer and rank == killer.at % ranks else []),
        watch,
        ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=-1),
    ]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if ranks > 1:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        fsdp = ModelParallelStrategy(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        quiet |= {"plugins": [TorchElasticEnvironment()], "strategy": fsdp if wrap == "fsdp" else "ddp"}
    return L.Trainer(
        callbacks=callbacks,
        accelerator="cpu",
        devices=ranks,
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        **quiet,
    )


def run(rank: int, ranks: int, wrap: str, folder: Path, hook: str, at: int) -> None:
    """Train from the last checkpoint, if there is one, to the end, or until killed; what is left goes to a file."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    killer = Killer(hook, at) if hook else None
    if ranks > 1:
        meeting = (folder / f"meeting-{hook}-{at}").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    one, module = trainer(folder, rank, ranks, wrap, killer), Watched(wrap == "fsdp")
    last = folder / "last.ckpt"
    one.fit(module, Resumable(rank), ckpt_path=last if last.exists() else None, weights_only=True)
    monitor = next(callback for callback in one.callbacks if isinstance(callback, td.SynergyMonitor))
    left = {"step": one.global_step, "monitor": monitor.state_dict()}
    torch.save(left, folder / f"left-{rank}.pt")


def kill_points(seed: int, kills: int) -> list[tuple[str, int]]:
    """Hooks, and batches behind the first checkpoint, ascending: where each run of a chain is killed."""
    chance = random.Random(seed)
    points = sorted(chance.sample(range(3, BATCHES * EPOCHS - 3), kills))
    return [(chance.choice(HOOKS), at) for at in points]


def chain(folder: Path, ranks: int, wrap: str = "", points: list[tuple[str, int]] | None = None) -> list[int]:
    """Train, killed at each point and begun again, until the end; the exit code of the rank that ended first.

    Raises:
        AssertionError: a run that nobody killed ended otherwise than it should.
    """
    folder.mkdir()
    codes = [
        _ended(partial(run, ranks=ranks, wrap=wrap, folder=folder, hook=hook, at=at), ranks)
        for hook, at in points or ()
    ]
    if _ended(partial(run, ranks=ranks, wrap=wrap, folder=folder, hook="", at=0), ranks):
        raise AssertionError("a run that nobody killed failed")
    return codes


def _ended(target: Any, ranks: int) -> int | None:
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=target, args=(rank,), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    left = processes
    while left:
        ended = wait([process.sentinel for process in left], timeout=120)
        codes = [process.exitcode for process in left if process.sentinel in ended]
        left = [process for process in left if process.sentinel not in ended]
        if not codes or any(codes):
            break
    # Where a rank dies, the others wait for it; a scheduler ends them.
    for process in processes:
        process.kill()
        process.join()
    return next((code for code in codes if code), None if codes else 1)
