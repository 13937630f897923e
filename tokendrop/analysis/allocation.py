"""Attention allocation: how much of a model's attention goes to each segment, layer by layer.

Shape letters: B batch, T tokens, C rows of a chunk, H heads, S segments, L layers, N blocks of a heat map.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tokendrop.analysis.attention_seen import attention_seen
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.decoder import check_module, find_layers
from tokendrop.engine.plan.plan import needed_rows
from tokendrop.errors import LayoutError, LayoutTypeError, MethodError, check_callable, check_flag, check_integer
from tokendrop.layout import IGNORED, Segment, TokenLayout
from tokendrop.synergy.evaluate import preserved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokendrop.analysis.advice import Advice

SEGMENTS = tuple(one.name.lower() for one in Segment)
Loss = Callable[[Any], Any]


@dataclass(frozen=True)
class HeatMap:
    """Attention of one sample, averaged over heads and over N x N blocks of rows and columns.

    Args:
        values: (L, N, N) float32, a block's mean probability.
        borders: the first row of each run of a segment, with its name, in blocks.
    """

    values: Tensor
    borders: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Allocation:
    """The share of attention that each segment gets.

    Args:
        share: (tasks, L, S) float64; each [task, layer] sums to 1.
        tasks: names, in order.
        segments: names, in order.
        heads: (tasks, L, H, S) float64, the same of each head; None where it was not asked for.
        maps: task -> heat map of its first sample; empty where it was not asked for.
        counts: of each task, the rows that were counted.
    """

    share: Tensor
    tasks: tuple[str, ...]
    segments: tuple[str, ...] = SEGMENTS
    heads: Tensor | None = None
    maps: Mapping[str, HeatMap] = field(default_factory=dict)
    counts: tuple[int, ...] = ()
    _measured: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    def plot(self) -> "Figure":
        """Pies of a shallow and of the last layer, a line for each segment over depth, and the heat maps there are."""
        from tokendrop.analysis.allocation_plot import plot

        return plot(self)

    def advise(self, budget: float = 0.5) -> "Advice":
        """What to drop on this model and these batches; see `tokendrop.analysis.advisor.advise`."""
        from tokendrop.analysis.advisor import advise

        model, batches, layout, loss = self._measured
        return advise(model, batches, layout, budget, loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tasks = {task: share.tolist() for task, share in zip(self.tasks, self.share, strict=True)}
        return {"segments": list(self.segments), "share": tasks}


def attention_allocation(
    model: nn.Module,
    batches: Iterable[Any],
    layout: Callable[[Any], TokenLayout],
    rows: Literal["all", "output"] = "all",
    heads: bool = False,
    blocks: int = 0,
    loss: Loss | None = None,
    layers: str | None = None,
) -> Allocation:
    """The share of attention that each segment gets in each layer of the dense model, by task.

    alpha[l, s] = sum over h, counted rows i and j in s of A[l, h, i, j] / (H * counted rows)

    Rows are recomputed from queries and keys in chunks, so memory grows with C x T. A dropped model is run dense.

    Args:
        model: any module with one decoder.
        batches: what `model` is called with as keywords, unless `loss` says otherwise.
        layout: batch -> TokenLayout. Without segments, images are IMAGE, or OUTPUT where most of their tokens are
            trained; labelled text is OUTPUT, text before an image that is not SYSTEM, and other text INSTRUCTION.
        rows: "all" counts every row but padding; "output" those whose output is trained, labels[t + 1] != -100.
        heads: also keep each head's.
        blocks: N of the heat maps; 0 for none.
        loss: batch -> anything, which runs the model.
        layers: dotted path of the decoder's layer list, where inspection finds several.

    Raises:
        LayoutError: no batches, or no counted row.
        LayoutTypeError: batches that are none.
        MethodError: unknown `rows`, or another argument that makes no sense.
        UnsupportedError: attention that cannot be seen.

    Source: arXiv 2606.01503 section 3; the division by the number of rows is ours.
    """
    check_module(model)
    check_rows(rows)
    check_flag("heads", heads)
    check_integer("blocks", blocks, 0)
    check_callable("layout", layout)
    check_callable("loss", loss or (lambda: None))
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str):
        raise LayoutTypeError(f"batches: expected a list of them, or a loader; found {batches!r}")
    batches, found = list(batches), find_layers(model, layers)[1]
    run: Loss = loss or (lambda batch: model(**batch))
    drop = next((one for one in model.modules() if isinstance(one, Handle)), None)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    maps: dict[str, HeatMap] = {}
    for batch in batches:
        made = layout(batch)
        each = _Batch(made, rows, len(found), blocks, maps)
        dense = nullcontext() if drop is None else drop.disabled()
        with torch.no_grad(), preserved(model), dense, attention_seen(found, made.image.shape[1], each.add):
            run(batch)
        for sample, name in enumerate(each.tasks):
            sums[name] = sums.get(name, 0) + each.sums[:, sample]
            counts[name] = counts.get(name, 0) + int(each.counted[sample].sum())
        maps |= {each.tasks[at]: HeatMap(one, borders(each.segments[at], blocks)) for at, one in each.maps.items()}
    empty = [name for name, count in counts.items() if count == 0]
    if not counts or empty:
        raise LayoutError(
            f"rows={rows!r}: found no row to count in {len(batches)} batches of the tasks {empty or list(counts)}; "
            "give batches with labels, or rows='all'"
        )
    each_head = torch.stack([sums[name] / counts[name] for name in sums])
    kept = each_head if heads else None
    measured, rows_of = (model, batches, layout, loss), tuple(counts.values())
    return Allocation(each_head.mean(2), tuple(sums), SEGMENTS, kept, maps, rows_of, measured)


def of_all(found: Sequence[Allocation]) -> Allocation:
    """The allocation of all batches, from those of some of them each: shares weighted by counted rows.

    Args:
        found: one or more; what they were measured on is the first one's.
    """
    tasks = tuple(dict.fromkeys(task for one in found for task in one.tasks))
    sums, counts = dict.fromkeys(tasks, torch.zeros(())), dict.fromkeys(tasks, 0)
    for one in found:
        for task, share, count in zip(one.tasks, one.share, one.counts, strict=True):
            sums[task], counts[task] = sums[task] + share * count, counts[task] + count
    share = torch.stack([sums[task] / counts[task] for task in tasks])
    return replace(found[0], share=share, tasks=tasks, heads=None, maps={}, counts=tuple(counts.values()))


def check_rows(rows: object) -> None:
    """Refuse an unknown choice of rows.

    Raises:
        MethodError: with the value.
    """
    if rows not in ("all", "output"):
        raise MethodError(f"rows={rows!r}: expected 'all' or 'output'")


class _Batch:
    """Sums over the counted rows of one batch, (L, B, H, S) float64, and a map of the first sample of each new task."""

    def __init__(self, layout: TokenLayout, rows: str, depth: int, blocks: int, known: Container[str]) -> None:
        self.tasks = [task or "all" for task in layout.tasks]
        self.segments = segments_of(layout)
        self.into = torch.nn.functional.one_hot(self.segments, len(SEGMENTS)).float()
        real = torch.ones_like(layout.image) if layout.padding is None else layout.padding
        self.counted = real if rows == "all" else needed_rows(layout)
        self.depth, self.blocks, self.sums = depth, blocks, torch.zeros(0)
        tokens = layout.image.shape[1]
        new = [self.tasks.index(name) for name in dict.fromkeys(self.tasks) if blocks and name not in known]
        self.maps = {sample: torch.zeros(depth, blocks, blocks) for sample in new}
        self.block = torch.arange(tokens) * blocks // tokens

    def add(self, layer: int, start: int, seen: Tensor) -> None:
        """The probabilities (B, H, C, T) of rows from `start` on."""
        if (len(seen), seen.shape[3]) != tuple(self.counted.shape):
            raise LayoutError(
                f"layer {layer} looks at {len(seen)} x {seen.shape[3]} tokens, and the layout has "
                f"{tuple(self.counted.shape)}; give the layout of the very tokens that the model runs on"
            )
        stop = start + seen.shape[2]
        if self.sums.numel() == 0:
            self.sums = torch.zeros(self.depth, len(seen), seen.shape[1], len(SEGMENTS), dtype=torch.float64)
        counted = self.counted[:, start:stop].to(seen.device)
        # A row that may see nothing is no number, and is never counted.
        seen = seen.masked_fill(~counted[:, None, :, None], 0)
        into = torch.einsum("bhct,bts->bhs", seen, self.into.to(seen.device))
        self.sums[layer] += into.double().cpu()
        for sample, one in self.maps.items():
            size = torch.bincount(self.block, minlength=self.blocks).clamp(min=1)
            rows = torch.zeros(self.blocks, seen.shape[3])
            rows.index_add_(0, self.block[start:stop], seen[sample].mean(0).cpu())
            one[layer].index_add_(1, self.block, rows)
            if stop == len(self.block):
                one[layer] /= size[:, None] * size


def segments_of(layout: TokenLayout) -> Tensor:
    """(B, T) int64 of `Segment`: the layout's own, or those that follow from images and labels.

    Example:
        >>> image = torch.tensor([[False, True, False, False]])
        >>> segments_of(TokenLayout(image, labels=torch.tensor([[-100, -100, -100, 7]]))).tolist()
        [[0, 1, 2, 3]]
    """
    if layout.segments is not None:
        return layout.segments.long()
    image = layout.image
    labelled = torch.zeros_like(image) if layout.labels is None else layout.labels != IGNORED
    before = image.long().cumsum(1) == 0
    # Most of a generated image is trained; of another, at most the token that text before it foretells.
    generated = 2 * (image & labelled).sum(1, keepdim=True) > image.sum(1, keepdim=True)
    given = before & ~generated & image.any(1, keepdim=True)
    segments = torch.where(given, Segment.SYSTEM, Segment.INSTRUCTION)
    return segments.masked_fill(labelled | image, Segment.OUTPUT).masked_fill(image & ~generated, Segment.IMAGE)


def borders(segments: Tensor, blocks: int) -> tuple[tuple[float, str], ...]:
    """Where runs of a segment begin in (T,) `segments`, in blocks, with their names."""
    tokens: Sequence[int] = segments.tolist()
    starts = [at for at, one in enumerate(tokens) if at == 0 or one != tokens[at - 1]]
    return tuple((at * blocks / len(tokens), SEGMENTS[tokens[at]]) for at in starts)
