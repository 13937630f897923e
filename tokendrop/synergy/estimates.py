"""Figures of task gradients without the bias of their noise, and how sure they are.

Each of N tasks has two independent samples of its gradient in each event, in the order a1, a2, b1, b2, ...: products of
different samples are unbiased, also of one task with itself, which a sample with itself is not.
Shape letters: E events, N tasks, S = 2 N samples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

# Where the true figure must lie. An affinity is 1 - a ratio of two losses that are positive.
RANGES = {
    "alignment": (-1.0, 1.0),
    "conflict": (0.0, 1.0),
    "conflicting_groups": (0.0, 1.0),
    "magnitude": (0.0, 1.0),
    "fidelity": (-1.0, 1.0),
    "affinity": (-math.inf, 1.0),
}
ROUNDING = 1e-3  # how far rounding alone may carry a figure beyond its range


class Estimate(NamedTuple):
    """A figure and its interval.

    Args:
        value: the figure.
        low: lower end of the 95 % interval, NaN where there is none.
        high: upper end, likewise.
    """

    value: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the interval is known and does not hold zero."""
        return self.low > 0 or self.high < 0

    def within(self, least: float, most: float) -> "Estimate":
        """What may be said of a figure that lies between `least` and `most`.

        Noise that carries an estimate out of that range leaves nothing to say: all three are NaN. An interval is cut
        to the range, which the truth never leaves.

        Example:
            >>> Estimate(1.41, -1.7, 4.5).within(-1, 1)
            Estimate(value=nan, low=nan, high=nan)
            >>> Estimate(0.5, -1.7, 4.5).within(-1, 1)
            Estimate(value=0.5, low=-1, high=1)
        """
        if not least - ROUNDING <= self.value <= most + ROUNDING:
            return UNKNOWN
        return Estimate(*(one if math.isnan(one) else min(max(one, least), most) for one in self))

    def __str__(self) -> str:
        interval = f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"
        return interval if self.resolved else f"{interval}, not resolved"


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def between(gram: Tensor) -> Tensor:
    """Unbiased products of the N true gradients.

    p[a, b] = mean over i, j of <a_i, b_j>, and p[a, a] = <a_1, a_2>

    Args:
        gram: (..., S, S).

    Returns:
        (..., N, N).
    """
    tasks = gram.shape[-1] // 2
    pairs = gram.unflatten(-1, (tasks, 2)).unflatten(-3, (tasks, 2))
    crossed, own = pairs.mean((-3, -1)), pairs[..., 0, :, 1].diagonal(dim1=-2, dim2=-1)
    same = torch.eye(tasks, dtype=torch.bool, device=gram.device)
    return torch.where(same, own[..., None], crossed)


def alignment(gram: Tensor) -> Tensor:
    """Cosines between the N true gradients, from sums over events; NaN where a norm is not resolved.

    cos[a, b] = p[a, b] / sqrt(p[a, a] p[b, b]), with p of `between`

    Args:
        gram: (..., S, S).

    Returns:
        (..., N, N); it may lie outside [-1, 1] by noise.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> samples = torch.stack([a, a, b, b])
        >>> alignment(samples @ samples.T)[0, 1].item()
        0.7071067690849304

    Source: ours; the norms' product as in facts of split-half reliability.
    """
    pairs = between(gram)
    own = pairs.diagonal(dim1=-2, dim2=-1)
    own = own.where(own > 0, torch.nan)
    return pairs / (own[..., :, None] * own[..., None, :]).sqrt()


def magnitude(gram: Tensor) -> Tensor:
    """Similarity of the norms of the N true gradients, 1 where they are equal.

    m[a, b] = 2 |a| |b| / (|a|^2 + |b|^2)

    Args:
        gram: (..., S, S).

    Returns:
        (..., N, N).

    Source: Yu et al. 2020, arXiv 2001.06782, definition 3.
    """
    own = between(gram).diagonal(dim1=-2, dim2=-1)
    own = own.where(own > 0, torch.nan)
    return 2 * (own[..., :, None] * own[..., None, :]).sqrt() / (own[..., :, None] + own[..., None, :])


def conflict(opposed: Tensor) -> Tensor:
    """Share of coordinates in which two tasks are opposed; on the diagonal, a task's two samples, the noise floor.

    Args:
        opposed: (..., S, S) shares.

    Returns:
        (..., N, N).
    """
    return between(opposed)


def conflicting_groups(gram: Tensor) -> Tensor:
    """Share of groups of parameters in which two tasks' gradients point away from each other.

    Args:
        gram: (G, S, S), of each group.

    Returns:
        (N, N), of the groups whose alignment is known: a number in [-1, 1].
    """
    cosines = alignment(gram)
    return (cosines < 0).double().where(cosines.abs() <= 1 + ROUNDING, torch.nan).nanmean(0)


def over_events(values: Sequence[float]) -> Estimate:
    """The mean of a figure over events; those in which it is no finite number do not count."""
    known = [one for one in values if math.isfinite(one)]
    if not known:
        return UNKNOWN
    value, low, high = jackknife(lambda x: x, torch.tensor(known, dtype=torch.float64))
    return Estimate(value.item(), low.item(), high.item())


def jackknife(
    statistic: Callable[[Tensor], Tensor], records: Tensor, confidence: float = 0.95
) -> tuple[Tensor, Tensor, Tensor]:
    """A statistic of mean records, and its interval by leaving out an event at a time.

    se^2 = (E - 1) / E sum over e of (x_e - mean x)^2, and the interval is value +- t se with E - 1 degrees of freedom

    Args:
        statistic: of the mean of some records.
        records: (E, ...).
        confidence: of the interval.

    Returns:
        value, low and high; low and high are NaN for fewer than 3 events.

    Example:
        >>> value, low, high = jackknife(lambda x: x, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> value.item(), round(low.item(), 3), round(high.item(), 3)
        (2.5, 0.446, 4.554)

    Source: Efron and Stein 1981.
    """
    from scipy.stats import t

    count, total = len(records), records.sum(0)
    value = statistic(total / count)
    if count < 3:
        unknown = torch.full_like(value, torch.nan)
        return value, unknown, unknown
    without = torch.stack([statistic((total - one) / (count - 1)) for one in records])
    spread = ((count - 1) / count * (without - without.mean(0)).square().sum(0)).sqrt()
    reach = spread * float(t.ppf((1 + confidence) / 2, count - 1))
    return value, value - reach, value + reach


def affinity(ahead: float, loss: float) -> float:
    """What a step of one task is worth to another's loss; NaN for a loss that has no share to speak of.

    1 - loss ahead / loss

    Args:
        ahead: the loss after the step.
        loss: before it; zero or below it is no scale.

    Source: Fifty et al. 2021, arXiv 2109.04617.
    """
    return 1 - ahead / loss if loss > 0 else math.nan


def affinities(
    tasks: Sequence[str], rate: float, ahead: Mapping[str, Sequence[float]], losses: Mapping[str, float], gram: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """The affinity of each task to each, and its first order: rate * <g_from, g_to> / loss.

    Args:
        tasks: N names.
        rate: of the step.
        ahead: task -> losses of the N tasks' second samples after a step down its first sample's gradient.
        losses: task -> its second sample's loss before it.
        gram: (S, S) products of the samples' gradients.
    """
    found, first_order = {}, {}
    for (i, source), (j, target) in product(enumerate(tasks), repeat=2):
        name, before = f"{source}/{target}", losses[target]
        found[name] = affinity(ahead[source][j], before)
        first_order[name] = rate * gram[2 * i, 2 * j + 1].item() / before if before > 0 else math.nan
    return found, first_order
