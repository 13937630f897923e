"""What a unified model is judged by, as torchmetrics: means over test items, each with its standard error.

Shape letters: B batch, T tokens, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from tokendrop.layout import IGNORED


class ItemMean(Metric):
    """The mean over items, and its standard error.

    mean = sum_i x_i / n;    se = sqrt((sum_i x_i^2 / n - mean^2) / (n - 1)), at least `resolution` / n

    Args:
        resolution: the least change that one item can make; 1 for shares, so that 0 of n is not called certain.

    Returns:
        `compute` gives "value" and "se", scalar float64.

    Example:
        >>> mean = ItemMean(resolution=1.0)
        >>> mean.update(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]))
        >>> {name: round(float(x), 3) for name, x in mean.compute().items()}
        {'value': 0.6, 'se': 0.245}
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, resolution: float = 0.0) -> None:
        super().__init__()
        self.resolution = resolution
        for name in ("total", "squares", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, items: Tensor) -> None:
        """Add (B,) items."""
        items = items.double()
        self.total += items.sum()
        self.squares += items.square().sum()
        self.count += len(items)

    @override
    def compute(self) -> dict[str, Tensor]:
        """The mean of all items and its standard error."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean**2).clamp(min=0)
        error = (variance / (self.count - 1).clamp(min=1)).sqrt()
        return {"value": mean, "se": error.clamp(min=self.resolution / float(self.count))}


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of each label, 0 where there is none.

    nll[b, t] = -log softmax(logits[b, t])[labels[b, t + 1]]

    Args:
        logits: (B, T, V) float.
        labels: (B, T) int64, unshifted, -100 for none.

    Returns:
        (B, T - 1) float32.
    """
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return loss.view(labels.shape[0], -1)


def item_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The (B,) mean negative log-likelihood of each sample's labels."""
    return token_nll(logits, labels).sum(1) / (labels[:, 1:] != IGNORED).sum(1)


def greedy_exact(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether greedy decoding writes exactly the labels.

    exact[b] = all_{t: labels[b, t + 1] != -100} argmax logits[b, t] = labels[b, t + 1]

    One causal forward over the true answer decides it: greedy decoding follows the true answer up to its first error.

    Args:
        logits: (B, T, V) float, of the prompt and the true answer.
        labels: (B, T) int64, unshifted, -100 for none.

    Returns:
        (B,) bool.
    """
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return (right | (labels[:, 1:] == IGNORED)).all(1)


def measured(task: str) -> dict[str, ItemMean]:
    """The metrics of a task: how well it is done, and how surprised the model is by the truth."""
    return {"accuracy" if task == "understanding" else "agreement": ItemMean(resolution=1.0), "nll": ItemMean()}


def results(metrics: Any) -> dict[str, float]:
    """Metric -> value, and metric_se -> its standard error."""
    found = {name: metric.compute() for name, metric in metrics.items()}
    return {
        name + suffix: float(both[part])
        for name, both in found.items()
        for part, suffix in (("value", ""), ("se", "_se"))
    }
