"""The callback that logs attention allocation while a model trains.

Shape letters: none.
"""

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
from typing_extensions import override

from tokendrop.analysis.allocation import Allocation, attention_allocation, check_rows
from tokendrop.callbacks.batch import batch_layout
from tokendrop.callbacks.evaluation import model_loss
from tokendrop.callbacks.token_drop import TokenDrop
from tokendrop.errors import check_callable, check_integer
from tokendrop.layout import TokenLayout


class AttentionAllocation(L.Callback):
    """How much attention of the dense model goes to each segment, at the end of each validation.

    Logged: `allocation/<task>/<segment>/<layer>`, see `tokendrop.attention_allocation`. The last one is `allocation`.

    Args:
        batches: validation batches that are looked at, each run once more without dropping.
        rows: which rows are counted, "all" or "output".
        layout: batch -> TokenLayout; by default TokenDrop's, or `tokendrop.callbacks.batch.batch_layout`.
        loss: (pl_module, batch) -> anything, which runs the model; `pl_module.model(**batch)` by default.

    Raises:
        MethodError: an argument that makes no sense.

    Example:
        >>> AttentionAllocation(batches=4).batches
        4

    Source: ours.
    """

    def __init__(
        self,
        batches: int = 2,
        rows: Literal["all", "output"] = "all",
        layout: Callable[[Any], TokenLayout] | None = None,
        loss: Callable[[L.LightningModule, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        check_integer("batches", batches, 1)
        check_rows(rows)
        for name, given in (("layout", layout), ("loss", loss)):
            check_callable(name, given or batch_layout)
        self.batches, self.rows, self.layout, self.loss = batches, rows, layout, loss or model_loss
        self.allocation: Allocation | None = None
        self._held: list[tuple[Any, TokenLayout]] = []

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if len(self._held) == self.batches or trainer.sanity_checking:
            return
        drop = next((one for one in getattr(trainer, "callbacks", ()) if isinstance(one, TokenDrop)), None)
        layout = None if drop is None else drop.current
        if self.layout is not None or layout is None:
            layout = self.layout(batch) if self.layout is not None else batch_layout(batch, pl_module, ())
        self._held.append((batch, layout))

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        held, self._held = self._held, []
        if not held:
            return
        self.allocation = found = attention_allocation(
            pl_module, held, lambda pair: pair[1], self.rows, loss=lambda pair: self.loss(pl_module, pair[0])
        )
        for task, share in zip(found.tasks, found.share.tolist(), strict=True):
            for layer, segments in enumerate(share):
                for name, value in zip(found.segments, segments, strict=True):
                    pl_module.log(f"allocation/{task}/{name}/{layer}", value, sync_dist=True)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._held = []
