"""A tiny Llama in a LightningModule, batches with images, and a quiet Trainer.

Shape letters: B batch, T tokens.
"""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokendrop as td

# Lightning 2.6.6 asks `isinstance(treespec, LeafSpec)` in its pytree helpers, which torch 2.13 deprecates.
LIGHTNING_WARNS = "ignore:.isinstance.treespec, LeafSpec:FutureWarning"

TEXT, IMAGES = 8, 8  # image tokens are 3..10 of 16
TOKENS = TEXT + IMAGES
WIDTH, INNER, LAYERS, VOCABULARY = 32, 48, 4, 50
METHODS: dict[str, Any] = {"u": td.HiMix("1:", separate="per-task"), "g": td.HMGen("1:3", separate="per-task")}


def llama(dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    """Four layers of width 32, the same whenever it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes, **heads, **config)).to(
            dtype
        )


def batch(seed: int, tasks: list[str] | str | None = "u", size: int = 2) -> dict[str, Any]:
    """Samples of 16 tokens, 8 of them image tokens; only text is trained in "u", only images in "g"."""
    ids = torch.randint(1, VOCABULARY, (size, TOKENS), generator=torch.Generator().manual_seed(seed))
    image = torch.zeros(size, TOKENS, dtype=torch.bool)
    image[:, 3 : 3 + IMAGES] = True
    labels = ids.clone()
    names = tasks if isinstance(tasks, list) else [tasks] * size
    for row, name in enumerate(names):
        if name != "g":
            labels[row, : 4 + IMAGES] = -100
    made = {"input_ids": ids, "image_mask": image, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return made if tasks is None else made | {"task": tasks}


class Batches:
    """Batches that are ready; not a DataLoader, for which Lightning would want workers."""

    def __init__(self, *made: dict[str, Any]) -> None:
        self.made = made

    def __len__(self) -> int:
        return len(self.made)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.made)


def loader(count: int = 3) -> Batches:
    """Batches of "u", of "g", of both, and so on."""
    kinds = ("u", "g", ["u", "g"])
    return Batches(*(batch(seed, kinds[seed % 3]) for seed in range(count)))


class Lit(L.LightningModule):
    """A tiny Llama trained by SGD.

    Args:
        made: the hook that makes the model: "init", "setup", "configure_model", or "never".
    """

    def __init__(self, made: str = "init") -> None:
        super().__init__()
        self.made, self.model = made, None
        self.losses: list[float] = []
        self.seen: list[set[str]] = []
        self.hooks: list[str] = []
        self._make("init")

    def _make(self, hook: str) -> None:
        self.hooks.append(hook)
        if self.made == hook and self.model is None:
            self.model = llama()

    def setup(self, stage: str) -> None:
        self._make("setup")

    def configure_model(self) -> None:
        self._make("configure_model")

    def loss(self, given: dict[str, Any]) -> Tensor:
        self.seen.append(set(given))
        names = ("input_ids", "attention_mask", "labels")
        return self.model(**{name: given[name] for name in names if name in given}).loss

    def training_step(self, given: dict[str, Any], index: int) -> Tensor:
        loss = self.loss(given)
        self.losses.append(loss.item())
        return loss

    def test_step(self, given: dict[str, Any], index: int) -> None:
        self.log("loss", self.loss(given), batch_size=len(given["input_ids"]))

    def predict_step(self, given: dict[str, Any], index: int) -> Tensor:
        return self.model(given["input_ids"]).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Lit):
    """The same with a validation, which Lightning wants a loader for in every fit."""

    validation_step = Lit.test_step


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer that says nothing and writes nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rest = {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu", "devices": 1}
    return L.Trainer(callbacks=list(callbacks), **(quiet | rest | options))


def dropped_keys(model: nn.Module) -> list[str]:
    """Names of the parameters that `apply` added."""
    return [name for name, _ in model.named_parameters() if "tokendrop." in name]
