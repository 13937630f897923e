"""The callback that logs attention allocation while a model trains.

Shape letters: none.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from typing_extensions import override

from tokendrop.analysis.allocation import Allocation, attention_allocation, check_rows, of_all
from tokendrop.callbacks.batch import batch_layout
from tokendrop.callbacks.evaluation import as_given, run_model, runnable
from tokendrop.callbacks.loggers import log_figure, warn_of_unknown
from tokendrop.callbacks.token_drop import TokenDrop
from tokendrop.engine.model.decoder import decoders, find_layers
from tokendrop.errors import NoEffectWarning, TokenDropError, check_callable, check_integer
from tokendrop.layout import TokenLayout


class AttentionAllocation(L.Callback):
    """How much attention of the dense model goes to each segment, at the end of each validation.

    Logged: `allocation/<task>/<segment>`, the mean over layers of `tokendrop.attention_allocation`, and its figure to
    loggers that take one. The last one, with every layer, is `allocation`. Several ranks count as one process with the
    batches of all. Where it cannot be measured, that is said once, NaN is logged, and training goes on.

    Args:
        batches: validation batches that are looked at on each rank, each run once more without dropping.
        rows: which rows are counted, "all" or "output".
        layout: batch -> TokenLayout; by default TokenDrop's, or `tokendrop.callbacks.batch.batch_layout`.
        loss: (pl_module, batch) -> anything, which runs the model; by default `pl_module.model(**batch)`, or the
            outermost module that holds the decoder, whatever its name.

    Raises:
        MethodError: an argument that makes no sense.
        DecoderError: in `setup`, or where the stage begins, a module without such a model.

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
        self.batches, self.rows, self.layout, self.loss = batches, rows, layout, loss
        self.allocation: Allocation | None = None
        self._held: list[tuple[Any, TokenLayout]] = []
        self._given: Any = None  # the batch, before the validation step
        self._drop: TokenDrop | None = None
        self._logged: set[str] = set()
        self._warned = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._drop = next((one for one in trainer.callbacks if isinstance(one, TokenDrop)), None)  # ty: ignore
        if stage == "fit":
            warn_of_unknown(trainer, "allocation/")
        # A decoder that is made later is looked for where the stage begins.
        if stage in ("fit", "validate") and decoders(pl_module):
            self._check(trainer, pl_module)

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        find_layers(pl_module, self._layers)
        if self.loss is None:
            runnable(pl_module, self._layers)

    on_fit_start = on_validation_start = _check

    @property
    def _layers(self) -> str | None:
        return None if self._drop is None else self._drop.layers

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if len(self._held) < self.batches and not trainer.sanity_checking:
            self._given = as_given(batch)

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
        batch, self._given = self._given, None
        if batch is None:
            return
        layout = None if self._drop is None else self._drop.current
        if self.layout is not None or layout is None:
            layout = self.layout(batch) if self.layout is not None else batch_layout(batch, pl_module, ())
        self._held.append((batch, layout))

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        held, self._held = self._held, []
        if trainer.sanity_checking:
            return
        found = self._measured(trainer, pl_module, held)
        values = dict.fromkeys(self._logged, math.nan)  # what loggers would go on to show
        if found is not None:
            for task, share in zip(found.tasks, found.share.mean(1).tolist(), strict=True):
                values |= {f"allocation/{task}/{name}": one for name, one in zip(found.segments, share, strict=True)}
            log_figure(trainer, "allocation", found.plot)
        for name, value in values.items():
            pl_module.log(name, value, sync_dist=True)
        self.allocation, self._logged = found, set(values)

    def _measured(
        self, trainer: L.Trainer, pl_module: L.LightningModule, held: list[tuple[Any, TokenLayout]]
    ) -> Allocation | None:
        run = self._run(pl_module)
        own: Allocation | str | None = None
        try:
            if held:
                own = attention_allocation(
                    pl_module, held, lambda pair: pair[1], self.rows, loss=run, layers=self._layers
                )
        except TokenDropError as gap:
            own = str(gap)
        every = _of_ranks(trainer, own)
        gap = next((one for one in every if isinstance(one, str)), None)
        if gap is not None and not self._warned:
            self._warned = True
            warnings.warn(f"AttentionAllocation has measured nothing: {gap}", NoEffectWarning, stacklevel=2)
        found = [one for one in every if isinstance(one, Allocation)]
        return of_all(found) if found and gap is None else None

    def _run(self, pl_module: L.LightningModule) -> Callable[[tuple[Any, TokenLayout]], Any]:
        loss = self.loss
        if loss is not None:
            return lambda pair: loss(pl_module, pair[0])
        return lambda pair: run_model(pl_module, pair[0], self._layers)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._held, self._given = [], None


def _of_ranks(trainer: L.Trainer, own: Allocation | str | None) -> list[Allocation | str | None]:
    """What each rank has, this one's as it is; every rank gets here, also one without batches or with a gap."""
    if trainer.world_size == 1:
        return [own]
    every: list[Any] = [None] * trainer.world_size
    sent = own
    if isinstance(own, Allocation):
        sent = Allocation(own.share, own.tasks, counts=own.counts, own_images=own.own_images)
    torch.distributed.all_gather_object(every, sent)
    return every
