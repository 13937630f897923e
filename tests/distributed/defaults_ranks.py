"""Every callback on two ranks as the README writes it: no path, no function, no schedule of ours is given.

Shape letters: none.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from gradients import Case, batch, llama
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_ranks import STEPS, RankBatches
from monitor_ranks import Still
from ranks import RANKS

import tokendrop as td
from tokendrop.synergy import read_history

HELD = 2  # batches that AttentionAllocation looks at by default


def on_rank(rank: int, cases: list[Case], folder: str) -> list[dict[str, Any]]:
    """What the callbacks say on this rank, for each case."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return [_one(rank, case, Path(folder) / case.wrap) for case in cases]


def _one(rank: int, case: Case, folder: Path) -> dict[str, Any]:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    fsdp = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched = td.AttentionAllocation()
        # Logger, checkpoints and sanity check are Lightning's defaults, too.
        run = L.Trainer(
            strategy=fsdp if case.wrap == "fsdp" else "ddp",
            plugins=[TorchElasticEnvironment()],
            callbacks=[td.TokenDrop(case.methods), td.SynergyMonitor(("u", "g")), watched],
            accelerator="cpu",
            devices=RANKS,
            max_epochs=3,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        run.fit(Still(case, applied=False), RankBatches(rank), RankBatches(rank))
        logged = {name: value.item() for name, value in run.callback_metrics.items()}
        history = Path(run.log_dir or "") / "synergy.jsonl"
    return {
        "synergy": {name: value for name, value in logged.items() if name.startswith("synergy/")},
        "allocation": {name: value for name, value in logged.items() if name.startswith("allocation/")},
        "layers": watched.allocation.to_dict()["share"] if watched.allocation else None,
        "steps": [event["step"] for event in read_history(history)],
    }


def allocation() -> td.Allocation:
    """Of one process that sees the batches of both ranks."""
    model = llama()
    held = [batch(tasks[rank], 0 if rank == 0 else len(tasks[0])) for rank in range(RANKS) for tasks in STEPS[:HELD]]
    return td.attention_allocation(model, held, lambda pair: pair[1], loss=lambda pair: model(pair[0]))
