"""What the monitor costs at its default interval: fits of the demo's model with and without it, in turns.

    python benchmarks/synergy/overhead.py --out benchmarks/results/monitor.jsonl

Shape letters: none.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tokendrop as td
from benchmarks.results import append, environment, row
from tokendrop.study.study import Study
from tokendrop.study.synergy import task_loss
from tokendrop.synergy import read_history
from tokendrop.unified.data import TASKS


def fit(study: Study, *callbacks: L.Callback) -> float:
    """CPU seconds of a fit under Share All."""
    run = study.runs()["share-all"]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rest = {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0}
    trainer = L.Trainer(callbacks=[td.TokenDrop(dict(run.methods)), *callbacks], **quiet, **rest)
    model, data = study.model(0), study.data(run, 0)
    start = time.process_time()
    trainer.fit(model, datamodule=data)
    return time.process_time() - start


def main() -> None:
    """Measure, print, and append to the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="batches of each task")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    study, ratios, events = Study(steps=given.steps), [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.rounds):
            history = Path(folder) / f"{turn}.jsonl"
            watched = fit(study, td.SynergyMonitor(TASKS, loss=task_loss, history=str(history)))
            ratios.append(watched / fit(study))
            events.append(len(read_history(history)))
    config = {"updates": 2 * given.steps, "run": "share-all", "threads": 1, "fidelity": True, "affinity": None}
    shared = environment()
    rows = [
        row("SynergyMonitor, default interval", "tokendrop", "time ratio", "1", ratios, config, **shared),
        row("SynergyMonitor, default interval", "tokendrop", "events", "1", events, config, **shared),
    ]
    for one in rows:
        print(f"{one['metric']}: {one['median']:.3f} [{one['p20']:.3f} {one['p80']:.3f}] n={one['n']}")
    if given.out:
        append(given.out, rows)


if __name__ == "__main__":
    main()
