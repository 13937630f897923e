"""A tiny SmolVLM with random weights, and samples of two tasks for it; nothing is downloaded."""

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMVisionConfig

IMAGE, PATCHES, VOCABULARY = 5, 4, 64


def vlm(seed: int = 0) -> SmolVLMForConditionalGeneration:
    """A SmolVLM of four layers whose images are four tokens each."""
    sizes = {"num_attention_heads": 4, "intermediate_size": 40, "hidden_size": 32}
    text = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=VOCABULARY, pad_token_id=0, max_position_embeddings=64)
    vision = SmolVLMVisionConfig(**sizes, num_hidden_layers=2, image_size=8, patch_size=2)
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=IMAGE, pad_token_id=0)
    torch.manual_seed(seed)
    return SmolVLMForConditionalGeneration(config)


class Samples(Dataset):
    """Samples of an image with a question and an answer, and of a text with an image to be made.

    Args:
        size: number of samples.
        tasks: of samples in turn.
    """

    def __init__(self, size: int, tasks: tuple[str, ...] = ("understanding", "generation")) -> None:
        self.size, self.tasks = size, tasks

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, object]:
        task = self.tasks[index % len(self.tasks)]
        draw = torch.Generator().manual_seed(index)
        text = torch.randint(6, VOCABULARY, (5 + index % 3,), generator=draw)
        image, first = torch.full((PATCHES,), IMAGE), 2 if task == "understanding" else len(text)
        ids = torch.cat([text[:first], image, text[first:]])
        labels = ids.clone()
        labels[: first + PATCHES + 1 if task == "understanding" else first] = -100
        pixels = torch.randn(1, 3, 8, 8, generator=draw)  # one image
        return {"input_ids": ids.tolist(), "labels": labels.tolist(), "pixel_values": pixels.tolist(), "task": task}


def collate(samples: list[dict[str, object]]) -> dict[str, object]:
    """A padded batch; `task` has a name for each sample."""

    def padded(name: str, fill: int) -> Tensor:
        rows = [torch.tensor(sample[name]) for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    ids = padded("input_ids", 0)
    pixels = torch.stack([torch.tensor(sample["pixel_values"]) for sample in samples])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded("labels", -100)}
    return batch | {"pixel_values": pixels, "task": [sample["task"] for sample in samples]}
