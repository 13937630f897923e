"""What the code blocks of README and docs take as given: tiny models, batches and a user's own classes.

Shape letters: B batch, T tokens.
"""

import tempfile

import lightning as L
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMVisionConfig,
)

import tokendrop as td

IMAGE, PATCHES, TOKENS, VOCABULARY = 5, 8, 16, 64
SIZES = {"num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
FIRST = {"understanding": 2, "generation": 7}  # where the image stands


DEPTH = 4  # of the models; blocks.py makes it that of a 7B model where a section names such layers


def vlm() -> SmolVLMForConditionalGeneration:
    """A SmolVLM as narrow as can be; ids alone are enough for it."""
    more = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(**SIZES, **more, num_hidden_layers=DEPTH, max_position_embeddings=64)
    vision = SmolVLMVisionConfig(**SIZES, num_hidden_layers=1, image_size=8, patch_size=4)
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=1, image_token_id=IMAGE, pad_token_id=0)
    torch.manual_seed(0)
    return SmolVLMForConditionalGeneration(config)


def sample(index: int, task: str) -> dict[str, object]:
    """A sample whose answer, text or image, is labelled."""
    draw, first = torch.Generator().manual_seed(index), FIRST[task]
    ids = torch.randint(6, VOCABULARY, (TOKENS,), generator=draw)
    ids[first : first + PATCHES] = IMAGE
    labels = ids.clone()
    labels[: first + PATCHES + 1 if task == "understanding" else first] = -100
    made = {"input_ids": ids, "labels": labels, "image_mask": ids == IMAGE}
    return {name: one.tolist() for name, one in made.items()} | {"task": task}


def collate(samples: list[dict]) -> dict:
    """A batch; `task` has a name for each sample."""
    names = ("input_ids", "labels", "image_mask")
    batch = {name: torch.stack([torch.as_tensor(one[name]) for one in samples]) for name in names}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"]), "task": [one["task"] for one in samples]}


class MyData(L.LightningDataModule):
    """Four samples of each of the tasks."""

    def __init__(self, tasks: tuple[str, ...] = tuple(FIRST), seed: int = 0) -> None:
        super().__init__()
        self.samples = [sample(index + seed, tasks[index % len(tasks)]) for index in range(4 * len(tasks))]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, 2, collate_fn=collate)

    val_dataloader = test_dataloader = train_dataloader


class ShortTrainer(L.Trainer):
    """Lightning's, short and quiet by default; blocks get it as `L.Trainer`."""

    def __init__(self, **given: object) -> None:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        limits = {"limit_train_batches": 2, "limit_val_batches": 1, "max_steps": 2, "log_every_n_steps": 1}
        here = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
        super().__init__(**quiet | limits | here | given)


class MyModule(L.LightningModule):
    """A user's module; nothing in it knows of tokendrop."""

    def __init__(self, tasks: tuple[str, ...] = tuple(FIRST)) -> None:
        super().__init__()
        self.model, self.prompt_length = vlm(), 12

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        self.log("loss", loss, batch_size=len(batch["input_ids"]))
        return loss

    validation_step = test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def _folder(names: dict) -> str:
    folder = tempfile.mkdtemp(dir=".")
    vlm().save_pretrained(folder)
    return folder


def _understood(names: dict) -> dict:
    return collate([sample(index, "understanding") for index in range(2)])


def _tokenizer(names: dict) -> PreTrainedTokenizerFast:
    words = {f"w{at}": at for at in range(VOCABULARY)}
    special = {"pad_token": "w0", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), **special)


MADE = {  # name -> how it is made, given the names that are there
    "td": lambda names: td,
    "torch": lambda names: torch,
    "L": lambda names: L,
    "model": lambda names: vlm(),
    "module": lambda names: MyModule(),
    "MyModule": lambda names: MyModule,
    "MyData": lambda names: MyData,
    "datamodule": lambda names: MyData(),
    "methods": lambda names: {"understanding": td.HiMix(), "generation": td.HMGen("1:3")},
    "batch": lambda names: {key: value for key, value in _understood(names).items() if key in ("input_ids", "labels")},
    "batches": lambda names: [_understood(names)],
    "input_ids": lambda names: _understood(names)["input_ids"],
    "labels": lambda names: _understood(names)["labels"],
    "image_mask": lambda names: _understood(names)["image_mask"],
    "IMAGE_IDS": lambda names: [IMAGE],
    "drop": lambda names: td.apply(names.setdefault("model", vlm()), td.HiMix()),
    "collate": lambda names: collate,
    "data": lambda names: MyData().samples,
    "loader": lambda names: MyData().train_dataloader(),
    "folder": _folder,
    "tokenizer": _tokenizer,
}


def make(name: str, names: dict) -> None:
    """Put a name, and what it is made of, into a namespace."""
    if name not in names:
        names[name] = MADE[name](names)
