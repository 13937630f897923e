"""A unified model that learns from some of its labels, or now and then from its own dense forward.

Shape letters: B batch, T tokens, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from tokendrop.engine.inject import handle
from tokendrop.layout import IGNORED
from tokendrop.study.plans import FrontierError
from tokendrop.unified.data import TASKS, Batch
from tokendrop.unified.model import UnifiedVLM


class LearntVLM(UnifiedVLM):
    """A unified model with another loss in training.

    loss = mean over a random share of the labels of -log p(label)
    in each `distil`-th batch of a task: CE(dense forward) + mean over labels of KL(dense forward || dropped forward)

    Args:
        sizes: as `UnifiedVLM` takes them.
        labelled: share of the labels of generation.
        distil: 0 for none; batches of tasks take turns.

    Raises:
        FrontierError: no share of labels, no count of batches, or in training a batch of several tasks.

    Source: ours; the second after arXiv 2602.03815, whose slow step is distilled to the fast one.
    """

    def __init__(self, *sizes: Any, labelled: float = 1.0, distil: int = 0) -> None:
        if not 0 < labelled <= 1 or distil < 0:
            raise FrontierError(
                f"found labelled={labelled}, distil={distil}; give a share above 0, at most 1, and a count"
            )
        super().__init__(*sizes)
        self.labelled, self.distil = labelled, distil

    def lesson(self, batch_idx: int) -> bool:
        """Whether the dense forward teaches in a batch."""
        return self.distil > 0 and (batch_idx // len(TASKS) + 1) % self.distil == 0

    @override
    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        if not isinstance(batch["task"], str):
            raise FrontierError("found a batch of several tasks; lessons and fewer labels take update='alternating'")
        if not self.lesson(batch_idx):
            return super().training_step(self._some(batch, batch_idx), batch_idx)
        with handle(self).disabled():
            dense = self(batch)
        asked = batch["labels"][:, 1:] != IGNORED
        teacher, pupil = (logits[:, :-1][asked].float() for logits in (dense, self(batch)))
        taught = F.log_softmax(teacher.detach(), -1)
        return F.cross_entropy(teacher, batch["labels"][:, 1:][asked]) + F.kl_div(
            F.log_softmax(pupil, -1), taught, reduction="batchmean", log_target=True
        )

    def _some(self, batch: Batch, batch_idx: int) -> Batch:
        labels = batch["labels"]
        if batch["task"] == TASKS[0] or self.labelled == 1:
            return batch
        drawn = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1000003 * self.seed + batch_idx))
        return {**batch, "labels": labels.where(drawn.to(labels.device) < self.labelled, IGNORED)}
