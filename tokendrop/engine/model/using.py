"""What the parts of the layer that this thread runs do at the moment: which rows use which weights.

Shape letters: B batch, K rows.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from tokendrop.engine.plan.rows import Own, Split
from tokendrop.kernels import gather_tokens


class _Using(threading.local):
    """Of one thread."""

    def __init__(self) -> None:
        self.split: Split | None = None
        self.sets: nn.ModuleDict | None = None
        self.shape = (0, 0)
        self.queries = True


current = _Using()


@contextmanager
def using(split: Split | None, sets: nn.ModuleDict, shape: tuple[int, int], queries: bool = True) -> Generator[None]:
    """Split the (B, K) rows of this thread's layer over the `sets` of its own weights; without `queries`, make none."""
    before = current.split, current.sets, current.shape, current.queries
    current.split, current.sets, current.shape, current.queries = split, sets, shape, queries
    try:
        yield
    finally:
        current.split, current.sets, current.shape, current.queries = before


def own(name: Own) -> dict[str, nn.Module]:
    """The image-only parts that are used of a set, by "q", "k", "v", "o", "norm" and "ffn"; none for None."""
    if name is None or current.sets is None:
        return {}
    return {part: module for part, module in cast(nn.ModuleDict, current.sets[name[0]]).items() if part in name[1]}


def split_run(split: Split, flat: Tensor, run: Callable[[Tensor, Own], Tensor]) -> Tensor:
    """What `run` makes of flat rows (B * K, ...) and the name of their set, in the order of the rows."""
    counts = [len(rows) for rows in split.rows]
    still = len(flat) in counts  # all rows are of one set, and stay where they are
    if still:
        parts = [flat if count else flat.new_empty(0, *flat.shape[1:]) for count in counts]
    else:
        parts = _moved(flat, torch.cat(split.rows)).split(counts)
    outputs = [run(part, name) for part, name in zip(parts, split.names, strict=True)]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if still else _moved(out, split.inverse)


def _moved(flat: Tensor, rows: Tensor) -> Tensor:
    # Each row moves once: index_select's backward would add, as if rows came twice.
    return gather_tokens(flat.flatten(1)[None], rows[None]).view(flat.shape)
