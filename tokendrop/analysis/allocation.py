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
from tokendrop.analysis.segments import SEGMENTS, HeatMap, borders, segments_of
from tokendrop.analysis.subject import Subject
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.decoder import find_layers
from tokendrop.engine.plan.plan import needed_rows
from tokendrop.errors import LayoutError, MethodError, check_flag, check_integer
from tokendrop.layout import Segment, TokenLayout
from tokendrop.synergy.evaluate import preserved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokendrop.analysis.advice import Advice


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
        own_images: tasks whose output is mostly image tokens, which tables and figures call their own image.
    """

    share: Tensor
    tasks: tuple[str, ...]
    segments: tuple[str, ...] = SEGMENTS
    heads: Tensor | None = None
    maps: Mapping[str, HeatMap] = field(default_factory=dict)
    counts: tuple[int, ...] = ()
    own_images: tuple[str, ...] = ()
    _subject: Any = field(default=None, repr=False, compare=False)

    def plot(self) -> "Figure":
        """Shares of the segments stacked over depth, and heat maps of a shallow and of the last layer if there are."""
        from tokendrop.analysis.allocation_plot import plot

        return plot(self.share, self.tasks, self.segments, self.maps, self.own_images)

    def advise(self, budget: float = 0.5) -> "Advice":
        """What to drop on this model and these batches; see `tokendrop.analysis.advisor.advise`."""
        from tokendrop.analysis.advisor import advise

        held: Subject = self._subject
        return advise(held.model, held.batches, held.layout, budget, held.loss, held.layers)

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
    loss: Callable[[Any], Any] | None = None,
    layers: str | None = None,
) -> Allocation:
    """The share of attention that each segment gets in each layer of the dense model, by task.

    alpha[l, s] = sum over h, counted rows i and j in s of A[l, h, i, j] / (H * counted rows)

    Rows are recomputed from queries and keys in chunks, so memory grows with C x T. A dropped model is run dense.

    Args:
        model: any module with one decoder.
        batches: what `model` is called with as keywords, unless `loss` says otherwise; put on the model's device.
        layout: batch -> TokenLayout. Without segments, images are IMAGE, or OUTPUT where most of their tokens are
            trained; labelled text is OUTPUT, text before an image that is not SYSTEM, and other text INSTRUCTION.
        rows: "all" counts every row but padding; "output" those whose output is trained, labels[t + 1] != -100.
        heads: also keep each head's.
        blocks: N of the heat maps; 0 for none.
        loss: batch -> anything, which runs the model once; by default a LightningModule's `training_step`, and of
            another model its forward. Of a batch that is a mapping neither gets `image_mask`, `segments` and `task`.
        layers: dotted path of the decoder's layer list, where inspection finds several.

    Raises:
        LayoutError: no batches, no counted row, or a layout of other tokens.
        LayoutTypeError: batches that are none, or a layout that is none.
        MethodError: unknown `rows`, or another argument that makes no sense.
        UnsupportedError: attention that cannot be seen, or layers that run not once.

    Source: arXiv 2606.01503 section 3; the division by the number of rows is ours.
    """
    check_rows(rows)
    check_flag("heads", heads)
    check_integer("blocks", blocks, 0)
    subject = Subject(model, batches, layout, loss, layers)
    found = find_layers(model, layers)[1]
    drop = next((one for one in model.modules() if isinstance(one, Handle)), None)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    own: dict[str, int] = {}  # image tokens less others, in the output
    maps: dict[str, HeatMap] = {}
    for batch, made in subject.held():
        each = _Batch(made, rows, len(found), blocks, maps)
        dense = nullcontext() if drop is None else drop.disabled()
        with torch.no_grad(), preserved(model), dense, attention_seen(found, made.image.shape[1], each.add):
            subject.run(batch)
        for sample, name in enumerate(each.tasks):
            sums[name] = sums.get(name, 0) + each.sums[:, sample]
            counts[name] = counts.get(name, 0) + int(each.counted[sample].sum())
            own[name] = own.get(name, 0) + each.own[sample]
        maps |= {each.tasks[at]: HeatMap(one, borders(each.segments[at], blocks)) for at, one in each.maps.items()}
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise LayoutError(
            f"rows={rows!r}: found no row to count in the {len(subject.batches)} batches of the tasks {empty}; "
            "give batches with labels, or rows='all'"
        )
    each_head = torch.stack([sums[name] / counts[name] for name in sums])
    images = tuple(name for name, more in own.items() if more > 0)
    kept = each_head if heads else None
    return Allocation(each_head.mean(2), tuple(sums), SEGMENTS, kept, maps, tuple(counts.values()), images, subject)


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
    own = tuple(task for task in tasks if any(task in one.own_images for one in found))
    same = {"heads": None, "maps": {}, "own_images": own}
    return replace(found[0], share=share, tasks=tasks, counts=tuple(counts.values()), **same)


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
        kinds = torch.where(layout.image, 1, -1)
        self.own: list[int] = kinds.masked_fill(self.segments != Segment.OUTPUT, 0).sum(1).tolist()
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
