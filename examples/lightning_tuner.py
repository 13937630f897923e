"""Lightning's tuners under a method: a learning rate and a batch size, found on the steps that training will take.

python examples/lightning_tuner.py
"""

import lightning as L
import torch
from lightning.pytorch.tuner import Tuner
from tiny import Samples, collate, vlm
from torch.utils.data import DataLoader

import tokendrop as td

METHODS = {"understanding": td.HiMix("2:"), "generation": td.HMGen("1:3")}


class Module(L.LightningModule):
    """The tiny model; `lr` and `batch_size` are what the tuners set."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lr, self.batch_size = vlm(), 1e-3, 2
        self.losses: list[float] = []

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        loss = self.model(**{key: value for key, value in batch.items() if key != "task"}).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(64), self.batch_size, collate_fn=collate)


def main(folder: str = "runs/tuner") -> tuple[Module, L.Trainer, list[float]]:
    """Find both, and train; the last are the learning rates that were tried."""
    module = Module()
    callbacks: list[L.Callback] = [td.TokenDrop(METHODS)]
    trainer = L.Trainer(
        max_steps=3, callbacks=callbacks, default_root_dir=folder, logger=False, enable_checkpointing=False
    )
    found = Tuner(trainer).lr_find(module, num_training=6, early_stop_threshold=None)
    tried = list(found.results["lr"])
    Tuner(trainer).scale_batch_size(module, steps_per_trial=1, init_val=2, max_trials=2)
    trainer.fit(module)
    return module, trainer, tried


if __name__ == "__main__":
    found, _, _ = main()
    print(f"learning rate {found.lr:.2g}, batch size {found.batch_size}")
