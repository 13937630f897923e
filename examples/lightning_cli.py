"""LightningCLI whose callbacks, methods and schedule stand in a YAML file.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml

Shape letters: T tokens.
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

TEXT, IMAGE, VOCABULARY = 8, 24, 100
IMAGE_IDS = range(90, VOCABULARY)  # as image_ids in the YAML file


class Samples(Dataset):
    """Random samples: text is trained in "understanding", image tokens in "generation"."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        draw = torch.Generator().manual_seed(index)
        text = torch.randint(1, IMAGE_IDS.start, (TEXT,), generator=draw)
        image = torch.randint(IMAGE_IDS.start, VOCABULARY, (IMAGE,), generator=draw)
        understands = index % 2 == 0
        ids = torch.cat([image, text] if understands else [text, image])
        labels = ids.masked_fill(torch.arange(TEXT + IMAGE) < (IMAGE + 1 if understands else TEXT), -100)
        return {"input_ids": ids, "labels": labels, "task": "understanding" if understands else "generation"}


class Data(L.LightningDataModule):
    """The samples, in batches of both tasks."""

    def __init__(self, size: int = 8, batch_size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(self.hparams["size"]), self.hparams["batch_size"])


class Model(L.LightningModule):
    """A small decoder; nothing in it knows of tokendrop."""

    def __init__(self, layers: int = 4, width: int = 64, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **sizes))

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams["lr"])


def main() -> LightningCLI:
    """What the command line says."""
    return LightningCLI(Model, Data)


if __name__ == "__main__":
    main()
