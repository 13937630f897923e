"""What the kernel benchmarks run: every Triton kernel once, with the row traffic that its mathematics needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokendrop.kernels import ops, reference


@dataclass(frozen=True)
class Case:
    """One run of a kernel.

    Args:
        op: its name in `ops` and `reference`.
        args: of the op.
        rows: read and written at least, in all, of D elements each; indices are not counted.
        loads: row-wide pointers that the kernel reads.
        stores: row-wide pointers that it writes, in the dtype of the rows.
    """

    op: str
    args: tuple[Any, ...]
    rows: int
    loads: int
    stores: int

    def runs(self) -> dict[str, Callable[[], Any]]:
        """The op and its torch reference, without their gradients."""
        return {"triton": lambda: getattr(ops, self.op)(*self.args), "torch": self.reference}

    def reference(self) -> Any:
        return getattr(reference, self.op)(*self.args)


def cases(dtype: torch.dtype, width: int, batch: int, tokens: int, kept: int, device: str) -> dict[str, Case]:
    """Every kernel, and every form of it, on random rows."""

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    full, update = rows(batch, tokens, width), rows(batch, kept, width)
    idx = torch.rand(batch, tokens, device=device).argsort(1)[:, :kept].sort(1).values
    valid = torch.rand(batch, kept, device=device) < 0.9
    T, K = batch * tokens, batch * kept
    return {
        "gather": Case("gather", (full, idx, None), 2 * K, 1, 1),
        "gather valid": Case("gather", (full, idx, valid), 2 * K, 1, 1),
        "scatter": Case("select", (full, update, idx, None, tokens), 2 * T, 2, 1),
        "gather backward": Case("select", (None, update, idx, None, tokens), T + K, 1, 1),
        "scatter backward": Case("select", (full, None, idx, None, tokens), 2 * T - K, 1, 1),
        "gather cos and sin": Case("gather_rotary", (full, full, idx), 4 * K, 2, 2),
    }
