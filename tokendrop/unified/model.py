"""A small unified vision-language model: one Llama decoder over words and image codes.

Shape letters: B batch, T tokens, V vocabulary, M image tokens, D hidden, L layers.
"""

import math
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from typing_extensions import override

from tokendrop.layout import IGNORED
from tokendrop.unified.data import TASKS, Batch, Scenes, row_tasks
from tokendrop.unified.judge import agreement
from tokendrop.unified.metrics import greedy_exact, item_nll, measured, results, token_nll
from tokendrop.unified.sampling import sample_codes

# What decides the signs of the study: output projections start near zero, and embeddings at unit size. The short
# rotary base tells neighbours in a sequence of some 40 tokens apart.
OUTPUT_STD, EMBEDDING_STD, ROTARY_BASE = 0.02, 1.0, 100.0
WARM_UP, FINAL_SHARE, WEIGHT_DECAY = 40, 0.1, 0.5


class UnifiedVLM(L.LightningModule):
    """A decoder trained by next-token prediction on understanding and generation.

    loss = sum over the tasks of a batch of mean_t -log p(labels[t + 1] | tokens up to t)

    Args:
        scenes: the data, whose vocabulary the model has.
        hidden: D.
        layers: L.
        heads: attention heads.
        learning_rate: its peak, after 40 steps of warm-up; then a cosine to 10 %.
        seed: of the initial weights, and of the images drawn in tests.
        drawn: in a test images are drawn for the batches in which the first so many scenes are; None for all scenes.

    Example:
        >>> scenes = Scenes("digits", (1, 2), codes=16)
        >>> module = UnifiedVLM(scenes, hidden=16, layers=2)
        >>> module(scenes.batch("generation", scenes.draw("val", 2, seed=(0,)))).shape
        torch.Size([2, 42, 35])

    Source: ours, after the unified models of arXiv 2606.01503; initialisation and schedule as measured.
    """

    def __init__(
        self,
        scenes: Scenes,
        hidden: int = 64,
        layers: int = 6,
        heads: int = 4,
        learning_rate: float = 3e-3,
        seed: int = 0,
        drawn: int | None = None,
    ) -> None:
        super().__init__()
        self.scenes, self.learning_rate, self.seed, self.drawn = scenes, learning_rate, seed, drawn
        self.model = LlamaForCausalLM(_config(len(scenes.vocabulary), hidden, layers, heads))
        _initialise(self.model, torch.Generator().manual_seed(seed))
        self.metrics = nn.ModuleDict({task: nn.ModuleDict(measured(task)) for task in TASKS})

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The (B, T, V) logits of a batch."""
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

    @override
    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        labels = batch["labels"]
        nll = token_nll(self(batch), labels)
        labelled = labels[:, 1:] != IGNORED
        losses = [nll[rows].sum() / labelled[rows].sum() for rows in _rows(batch)]
        return torch.stack(losses).sum()

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._metric(batch, "nll").update(item_nll(self(batch), batch["labels"]))

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Score a batch of one task; for generation also draw its images and return their (B, M) `codes`."""
        logits, labels = self(batch), batch["labels"]
        self._metric(batch, "nll").update(item_nll(logits, labels))
        if batch["task"] == "understanding":
            self._metric(batch, "accuracy").update(greedy_exact(logits, labels).double())
            return {}
        if self.drawn is not None and self._metric(batch, "agreement").count >= self.drawn:
            return {}
        codes = sample_codes(self.model, batch, self.scenes.codes, seed=self.seed + batch_idx)
        self._metric(batch, "agreement").update(agreement(self.scenes, codes, self.scenes.captions_in(batch)))
        return {"codes": codes}

    @override
    def on_validation_epoch_end(self) -> None:
        self._log("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _metric(self, batch: Batch, name: str) -> Any:
        return cast(nn.ModuleDict, self.metrics[row_tasks(batch)[0]])[name]

    def _log(self, stage: str) -> None:
        for task, metrics in self.metrics.items():
            seen = {name: metric for name, metric in cast(nn.ModuleDict, metrics).items() if metric.update_called}
            for name, value in results(seen).items():
                self.log(f"{stage}/{task}/{name}", value)
            for metric in seen.values():
                cast(Any, metric).reset()

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY)
        total = max(int(self.trainer.estimated_stepping_batches), WARM_UP + 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_share(step: int, total: int) -> float:
    """The learning rate of an optimiser step, as a share of its peak: warm-up, then a cosine to 10 %.

    Example:
        >>> [round(learning_rate_share(step, 440), 2) for step in (0, 39, 240, 440)]
        [0.03, 1.0, 0.55, 0.1]
    """
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = min(1.0, (step - WARM_UP) / (total - WARM_UP))
    return FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2


def _rows(batch: Batch) -> list[Tensor]:
    tasks = row_tasks(batch)
    return [torch.tensor([task == name for task in tasks]) for name in dict.fromkeys(tasks)]


def _config(vocabulary: int, hidden: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * round(hidden / 3),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


@torch.no_grad()
def _initialise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    depth_scale = (2 * model.config.num_hidden_layers) ** -0.5
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            continue
        std = weight.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std = OUTPUT_STD * depth_scale
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            std = EMBEDDING_STD if "embed" in name else OUTPUT_STD
        nn.init.normal_(weight, 0.0, std, generator=generator)
